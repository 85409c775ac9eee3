"""`opd report` on run folders: what stands on the page, and what is refused."""

import base64
import json
import re
from pathlib import Path

import pytest
import yaml

from opd_lightning.cli import main
from opd_lightning.errors import ConfigError
from opd_lightning.tools.report import report


def write_run(folder: Path, objective: str, last: float, summary: bool = True) -> Path:
    folder.mkdir(parents=True)
    rows = ["step,loss,val/kl/reverse,eval/math/avg@4,eval/math/avg@4/low,eval/math/avg@4/high"]
    rows += ["0,,2.0,,,", "1,1.5,,,,", "2,1.25,,,,", f"2,,{last},0.5,0.375,0.625"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    config = {"model": {"objective": {"class_path": objective}, "mini_batches": 1}, "seed": 0}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if summary:
        sample = {"prompt": "2 < 3?", "completion": "<b>yes</b> & so on"}
        content = {"steps": 2, "samples": {"before": [sample], "after": [sample]}}
        (folder / "summary.json").write_text(json.dumps(content))
    diagnostics = folder / "diagnostics"
    diagnostics.mkdir()
    entry = {"token_id": 7, "count": 3, "share": 0.5, "advantage": -11.0, "string": "<think>"}
    entry |= {"student_logprob": -0.1, "teacher_logprob": -11.1, "mismatched": 3}
    found = {"step": 2, "measures": {}, "by_position": [], "offending_tokens": [entry]}
    (diagnostics / "step_000002.json").write_text(json.dumps(found))
    (diagnostics / "step_000002.html").write_text('<span title="A">x</span>')
    return folder


def test_two_runs_side_by_side(tmp_path: Path):
    first = write_run(tmp_path / "a" / "version_0", "ReverseKL", 1.0)
    second = write_run(tmp_path / "b" / "version_0", "ForwardKL", 1.5, summary=False)
    page = report([first, second], tmp_path / "out")
    text = page.read_text()
    assert "a/version_0, b/version_0" in text, "names are as long as they must be"
    assert "2 → 1 (-50%)" in text
    assert "2 → 1.5 (-25%)" in text
    assert "0.5 [0.375, 0.625]" in text
    assert "<code>model.objective.class_path</code></td><td>ReverseKL</td><td>ForwardKL" in text
    assert "model.mini_batches" not in text, "settings that agree are left out"
    assert "&lt;b&gt;yes&lt;/b&gt; &amp; so on" in text, "text of models is no HTML"
    assert "&lt;think&gt;" in text
    assert 'srcdoc="&lt;span' in text
    pictures = re.findall(r"src='data:image/png;base64,([^']+)'", text)
    names = ["eval_math_avg@4.png", "loss.png", "val_kl_reverse.png"]
    assert sorted(path.name for path in page.parent.glob("*.png")) == names
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert not re.search(r"(src|href)=['\"]?(http|/|\.)", text), "nothing is fetched"


def test_the_newest_version_of_a_folder_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_run(tmp_path / "version_0", "ReverseKL", 1.0)
    main(["report", str(tmp_path)])
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "version_0" / "report" / "index.html"
    assert "Settings that differ" not in page.read_text()


def test_what_is_no_run_is_refused(tmp_path: Path):
    write_run(tmp_path / "mine", "ReverseKL", 1.0)
    with pytest.raises(ConfigError, match=r"metrics.csv is missing.*mine"):
        report([tmp_path / "mini"])
    with pytest.raises(ConfigError, match="given twice"):
        report([tmp_path / "mine", tmp_path / "mine"])
