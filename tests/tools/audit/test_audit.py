"""`opd audit`: the package's objectives pass, known-bad ones are convicted, the page is current."""

import json
import math
from pathlib import Path

import pytest
import torch

from opd_lightning.cli import main
from opd_lightning.errors import ConfigError
from opd_lightning.objectives import (
    ForwardKL,
    HeadTailReverseKL,
    Mixture,
    Objective,
    ReverseKL,
    SampledTokenReverseKL,
    SequenceReverseKL,
    TopKReverseKL,
    known_objectives,
    known_terms,
)
from opd_lightning.tools.audit import (
    Finding,
    as_json,
    as_markdown,
    as_table,
    audit,
    audited_objectives,
    objective_from,
    write_page,
)
from opd_lightning.tools.audit.names import label
from opd_lightning.tools.audit.report import MARKER
from opd_lightning.tools.audit.targets import SEQUENCE_LEVEL, TOKEN_LEVEL, target_gradient
from opd_lightning.tools.audit.world import World
from tests.tools.audit import bad_objectives as bad

PAGE = Path(__file__).parents[3] / "docs" / "objectives.md"


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    return {finding.name: finding for finding in audit(audited_objectives())}


def finding_of(objective: Objective) -> Finding:
    return audit([objective])[0]


def test_every_known_objective_and_term_is_audited_and_passes(findings: dict[str, Finding]):
    names = {name.split("(")[0] for name in findings}
    assert names >= {n for n, c in known_objectives().items() if c.__module__.startswith("opd_")}
    assert names >= set(known_terms())
    assert [f"{f.name} {f.complaint}" for f in findings.values() if f.complaint] == []
    assert len(findings) == len(audited_objectives()), "two variants have one label"


def test_a_target_or_a_reason_and_never_both(findings: dict[str, Finding]):
    for f in findings.values():
        assert (f.target is None) == bool(f.target_reason), f.name


# what the mathematics says of some of them
@pytest.mark.parametrize(("name", "expected"), [
    ("SampledTokenReverseKL", {"follows": "reverse_kl", "pull": ("0", "in"), "needs": "sampled"}),
    ("SequenceReverseKL", {"follows": "sequence_reverse_kl"}),
    ("SequenceReverseKL(gamma=0.0)", {"follows": "reverse_kl"}),
    ("SequenceReverseKL(normalize='length')", {"follows": "a multiple of sequence_reverse_kl"}),
    ("TopKReverseKL", {"pull": ("0", "0"), "head_rows": "K", "teacher_numbers": "2K"}),
    ("TopKReverseKL(tail='bucket')", {"pull": ("0", "in"), "head_rows": "V", "needs": "topk"}),
    ("TopKReverseKL(renormalize=False)", {"pull": ("out", "out"), "target": None}),
    ("TopKReverseKL(tail='sampled', detach_log_ratio=False)", {"pull": ("out", "in")}),
    ("HeadTailReverseKL", {"follows": "reverse_kl", "pull": ("0", "in")}),
    ("ReverseKL", {"head_rows": "V", "teacher_numbers": "V", "needs": "full"}),
    ("ForwardKL", {"follows": "forward_kl"}),
    ("SupportMass", {"pull": ("in", "in")}),
    ("OutcomeReward", {"teacher_numbers": "0", "follows": "expected_reward"}),
])  # fmt: skip
def test_what_is_found(findings: dict[str, Finding], name: str, expected: dict):
    seen = {key: getattr(findings[name], key) for key in expected}
    assert seen == expected


def test_divergences_have_no_variance_at_one_prefix_and_estimators_have(
    findings: dict[str, Finding],
):
    for name in ("ReverseKL", "ForwardKL", "JensenShannon", "TopKReverseKL"):
        assert findings[name].variance[0] < 1e-25
    one = {n: f.variance[0] for n, f in findings.items()}
    assert one["SampledTokenReverseKL(baseline='kl')"] < 0.8 * one["SampledTokenReverseKL"]
    assert one["HeadTailReverseKL"] < one["SampledTokenReverseKL"]
    three = {n: f.variance[1] for n, f in findings.items()}
    assert three["SequenceReverseKL"] > 2 * three["SampledTokenReverseKL"]


def test_differentiable_losses_agree_with_finite_differences(findings: dict[str, Finding]):
    errors = {n: f.difference_error for n, f in findings.items() if f.difference_error is not None}
    assert len(errors) >= 15 and max(errors.values()) < 1e-7


@pytest.mark.parametrize(("objective", "follows"), [
    (bad.K1Backpropagated(), "nothing: its expected gradient is 0"),
    (bad.K3Backpropagated(), "follows forward_kl"),
    (bad.KLAsAdvantage(), "nothing: its expected gradient is 0"),
    (bad.PublishedHeadTail(), "follows none; nearest reverse_kl"),
    (bad.ClampOne(), "follows none; nearest"),
    (bad.HalfReverseKL(), "follows 0.5 x reverse_kl"),
])  # fmt: skip
def test_known_bad_objectives_are_convicted(objective: Objective, follows: str):
    complaint = finding_of(objective).complaint
    assert "declares reverse_kl, but follows" in complaint and follows in complaint
    assert "relative bias" in complaint


@pytest.mark.parametrize(("objective", "follows"), [
    (K, "reverse_kl") for K in (ReverseKL(), HeadTailReverseKL(3), bad.DetachedValue())
])  # fmt: skip
def test_good_ones_of_the_same_shape_are_not(objective: Objective, follows: str):
    found = finding_of(objective)
    assert found.complaint == "" and found.follows == follows and found.bias < 1e-12


def test_a_bias_of_one_in_a_million_is_seen():
    slightly = Mixture([ReverseKL(), ForwardKL()], [1.0, 1e-6])
    assert finding_of(slightly).complaint == ""

    class Claims(Mixture):
        target = "reverse_kl"
        target_reason = ""

    found = finding_of(Claims([ReverseKL(), ForwardKL()], [1.0, 1e-6]))
    assert "relative bias" in found.complaint and 1e-7 < found.bias < 1e-5


def test_an_objective_that_changes_when_chunked_is_convicted():
    found = finding_of(bad.WrongOnlyWhenChunked())
    assert "not the same on a chunked head" in found.complaint
    assert found.chunked_error == pytest.approx(1e-3, rel=1e-2)


def test_an_undeclared_objective_is_told_what_it_follows():
    found = finding_of(bad.Undeclared())
    assert "declares neither a target nor a target_reason; it follows reverse_kl" in found.complaint
    assert found.bias < 1e-12


def test_a_value_that_is_not_what_the_gradient_follows_is_shown():
    assert finding_of(bad.DetachedValue()).difference_error > 0.1
    assert finding_of(ReverseKL()).difference_error < 1e-8


def test_an_unknown_target_lists_the_known_and_the_nearest():
    with pytest.raises(ConfigError, match=r"'revers_kl', which is not known\. Did you mean rev"):
        audit([bad.Misspelt()])


# -------------------------------------------------------------------------- worlds and targets


def test_a_world_lists_every_completion_once_with_its_probability():
    world = World.random(4, 3, seed=5)
    assert world.sequences.unique(dim=0).shape == (64, 3)
    assert float(world.probabilities.sum()) == pytest.approx(1, abs=1e-12)
    p = world.student.softmax(-1)
    y = world.sequences[37].tolist()
    by_hand = p[4, y[0]] * p[y[0], y[1]] * p[y[1], y[2]]
    assert float(world.probabilities[37]) == pytest.approx(float(by_hand), rel=1e-12)
    assert float(world.occupancy.sum()) == pytest.approx(3)
    assert float(world.occupancy[4]) == pytest.approx(1)
    visits = p[4] + p[4] @ p[:4]  # states after one and after two tokens
    torch.testing.assert_close(world.occupancy[:4], visits)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_token_level_targets_hold_the_prefixes_fixed(name: str):
    world = World.random(4, 3, seed=5)
    p, q = world.student.softmax(-1), world.teacher.softmax(-1)
    ratio = (p / q).log()
    closed = {
        "reverse_kl": p * (ratio - (p * ratio).sum(-1, keepdim=True)),
        "forward_kl": p - q,
    }[name]
    found = target_gradient(name, ReverseKL(), world)
    torch.testing.assert_close(found, world.occupancy[:, None] * closed)


def test_the_sequence_level_target_equals_finite_differences_of_propagated_states():
    world = World.random(3, 4, seed=1)
    q = world.teacher.log_softmax(-1)

    def divergence(logits: torch.Tensor) -> float:
        p = logits.softmax(-1)
        kl = (p * (p.log() - q)).sum(-1)
        state, total = torch.tensor([0, 0, 0, 1.0], dtype=torch.float64), 0.0
        for _ in range(4):
            total += float(state @ kl)
            state = torch.cat([state @ p, torch.zeros(1, dtype=torch.float64)])
        return total

    gradient = target_gradient("sequence_reverse_kl", SequenceReverseKL(), world)
    step = torch.zeros_like(world.student)
    for s, v in [(3, 0), (1, 2), (0, 0)]:
        step.zero_()[s, v] = 1e-5
        slope = (divergence(world.student + step) - divergence(world.student - step)) / 2e-5
        assert float(gradient[s, v]) == pytest.approx(slope, abs=1e-9)


def test_every_name_has_a_divergence_that_is_zero_or_least_at_the_teacher():
    world = World.random(5, 2, seed=0)
    at_teacher = world.with_student(world.teacher)
    settings = {"k": 3, "beta": 0.3, "scaled": False, "alpha": 0.2, "threshold": 1.0, "width": 0.0}
    holder = type("Holder", (), settings)()
    for name in [*TOKEN_LEVEL, *SEQUENCE_LEVEL]:
        norm = float(target_gradient(name, holder, at_teacher).norm())
        assert (norm < 1e-14) == (name not in ("support_surprisal", "expected_reward")), name


# -------------------------------------------------------------------------- names and output


@pytest.mark.parametrize("text", [
    "ReverseKL",
    "TopKReverseKL(tail='bucket')",
    "TopKReverseKL(k=4, support='union')",
    "Mixture(objectives=[TopKReverseKL, SupportMass], coefficients=[1.0, 0.1])",
    "SequenceReverseKL(gamma=0.5)",
])  # fmt: skip
def test_what_is_read_is_shown_again(text: str):
    called = text.replace("[TopKReverseKL, SupportMass]", "[TopKReverseKL(), SupportMass()]")
    assert label(objective_from(called)) == text


def test_positional_settings_and_dotted_paths():
    assert objective_from("SequenceReverseKL(0.25)").gamma == 0.25
    assert objective_from("TopKReverseKL").k == 3
    path = "tests.tools.audit.bad_objectives.ClampOne"
    assert isinstance(objective_from(path), SampledTokenReverseKL)
    assert isinstance(objective_from(f"{path}()"), SampledTokenReverseKL)


@pytest.mark.parametrize(("text", "message"), [
    ("Reverskl", r"'Reverskl' is not known\. Did you mean ReverseKL"),
    ("ReverseKL(", r"'ReverseKL\(' names no objective"),
    ("ReverseKL(3)", r"ReverseKL cannot be made: too many positional"),
    ("TopKReverseKL(kk=3)", r"TopKReverseKL cannot be made: got an unexpected keyword .*kk"),
    ("TopKReverseKL(k=open('x'))", r"'open' is not known"),
    ("TopKReverseKL(k=a.b)", r"'a\.b' names no objective"),
    ("TopKReverseKL(k=1)", r"k must be at least 2; got 1"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        objective_from(text)


def test_table_json_and_markdown_say_the_same():
    found = audit([TopKReverseKL(3), bad.K3Backpropagated()])
    table = as_table(found)
    assert "FAILED K3Backpropagated declares reverse_kl, but follows forward_kl" in table
    assert all(len(line) < 400 for line in table.splitlines())
    parsed = json.loads(as_json(found))["findings"]
    assert [f["name"] for f in parsed] == ["TopKReverseKL", "K3Backpropagated"]
    assert parsed[0]["complaint"] == "" and parsed[1]["bias"] == pytest.approx(found[1].bias)
    assert parsed[0]["head_rows"] == "K" and math.isclose(
        parsed[0]["variance"][1], 0.226, abs_tol=1e-3
    )
    markdown = as_markdown(found)
    assert "| `TopKReverseKL` | support_reverse_kl |" in markdown
    assert "- **Choose**:" in markdown and "- **Gradient on z_v**:" in markdown


def test_json_of_an_infinite_number_can_be_read_everywhere():
    found = audit([bad.K1Backpropagated()])
    text = as_json(found)
    assert "Infinity" not in text and "NaN" not in text


def test_the_page_is_current(findings: dict[str, Finding]):
    text = PAGE.read_text()
    above, marker, below = text.partition(MARKER)
    assert marker and len(above) > 1000
    wanted = as_markdown(list(findings.values()))
    assert below.strip() == wanted.strip(), "run: opd audit --write docs/objectives.md"


def test_writing_keeps_what_stands_above_the_marker(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(f"# Mine\n\n{MARKER}\n\nold")
    write_page(str(page), audit([ReverseKL()]))
    text = page.read_text()
    assert text.startswith("# Mine\n") and "old" not in text and "`ReverseKL`" in text
    with pytest.raises(ConfigError, match="is no page with the line"):
        write_page(str(tmp_path / "other.md"), [])


def test_the_command_exits_with_1_where_one_fails(capsys: pytest.CaptureFixture):
    main(["audit", "--objective", "ReverseKL", "HeadTailReverseKL"])
    assert "reverse_kl" in capsys.readouterr().out
    path = "tests.tools.audit.bad_objectives"
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--objective", "ReverseKL", f"{path}.K3Backpropagated", f"{path}.ClampOne"])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert "FAILED K3Backpropagated" in said.out
    assert "2 of 3 objectives fail: K3Backpropagated declares" in said.err
