"""`opd study`: what the command hands to a study, and which options a study has."""

import json
from pathlib import Path

import pytest

from opd_lightning.cli import main
from opd_lightning.study import control as study
from opd_lightning.study.control import Setting


def test_the_verb_takes_version_and_seeds_and_writes_what_overflowed_as_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(study, "STRESS", Setting("stress", 8, 1e30, 8, 2))
    main(["study", "control", "--out", str(tmp_path), "--stress", "--seeds", "2"])
    printed = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted(tmp_path.iterdir())
    assert {p.name for p in printed if p.suffix == ".png"} == {"control_stress.png"} | {
        f"control_stress_{what}_{seed}.png" for what in ("variance", "visits") for seed in (42, 43)
    }
    summary = json.loads((tmp_path / "summary_stress.json").read_text())
    assert (summary["setting"]["name"], summary["seeds"]) == ("stress", [42, 43])
    assert all(row["distance"] is None and row["outside"] > 0.9 for row in summary["rows"])
    assert all(row["fixed_variance"] > 0 for row in summary["rows"])


@pytest.mark.parametrize("options", [["--stress"], ["--seeds", "2"]])
def test_no_other_study_takes_them(options: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["study", "bigram", *options])
    assert stopped.value.code == 2
    wanted = f"opd study bigram has no {options[0]}; only opd study control has."
    assert wanted in capsys.readouterr().err
