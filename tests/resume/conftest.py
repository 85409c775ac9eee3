"""The world that all runs of these tests train in."""

from pathlib import Path

import pytest

from tests.resume.kit import write_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, prompts and `run.yaml`."""
    return write_world(tmp_path_factory.mktemp("resume"))
