"""Parameters that are not trained."""

from pathlib import Path

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.policy import PolicySpec
from tests.tiny import save_tiny


def test_named_parts_are_frozen_and_unknown_ones_refused(tmp_path: Path):
    save_tiny(tmp_path / "model")
    model = PolicySpec(str(tmp_path / "model"), freeze=["embed_tokens", "layers.0."]).load()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "embed" in n or "layers.0." in n}
    assert len(frozen) < len(list(model.parameters()))
    with pytest.raises(ConfigError, match=r"'embed_tokns' .*They look like"):
        PolicySpec(str(tmp_path / "model"), freeze=["embed_tokns"]).load()
