"""One pair of tiny models for all runs."""

from pathlib import Path

import pytest

from tests.module.harness import save_pair


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models"))
