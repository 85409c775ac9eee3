"""Wrong settings and names: the message shows the value seen and says what to do."""

import sys

import pytest

from opd_lightning.errors import ConfigError
from opd_lightning.objectives import (
    EntropyAware,
    HeadTailReverseKL,
    JensenShannon,
    Mixture,
    Objective,
    PowerOPD,
    ReverseKL,
    SampledTokenReverseKL,
    SequenceReverseKL,
    SkewReverseKL,
    TopKReverseKL,
    known_objectives,
    resolve_objective,
)

REFUSED = {
    "k=1": (lambda: TopKReverseKL(k=1), r"k must be at least 2; got 1\. .*no loss"),
    "k=0": (lambda: HeadTailReverseKL(k=0), r"k must be at least 2; got 0\."),
    "k=-3": (lambda: TopKReverseKL(k=-3, tail="bucket"), r"k must be at least 2; got -3\."),
    **{
        f"beta={beta}": (
            lambda beta=beta: JensenShannon(beta),
            rf"beta must lie strictly between 0 and 1; got {beta}\. .*ForwardKL .*ReverseKL",
        )
        for beta in (0, 1, -0.1, 1.5, float("nan"))
    },
    **{
        f"gamma={gamma}": (
            lambda gamma=gamma: SequenceReverseKL(gamma=gamma),
            rf"gamma must lie within 0 and 1; got {gamma}\. 0 is token-level",
        )
        for gamma in (-0.1, 1.01, float("nan"))
    },
    "dual_clip alone": (
        lambda: SampledTokenReverseKL(dual_clip=3.0),
        r"dual_clip=3\.0 has no effect .*; set clip_ratio .*0\.2.*leave dual_clip out",
    ),
    "dual_clip alone in a sequence": (
        lambda: SequenceReverseKL(dual_clip=2.0),
        r"dual_clip=2\.0 has no effect without clip_ratio",
    ),
    "dual_clip below 1": (
        lambda: SampledTokenReverseKL(clip_ratio=0.2, dual_clip=0.5),
        r"dual_clip must be at least 1\.0; got 0\.5\. The paper takes 3",
    ),
    "clip_ratio=0": (
        lambda: SampledTokenReverseKL(clip_ratio=0.0),
        r"clip_ratio must be above 0; got 0\.0\. Leave it out to switch it off",
    ),
    "log_ratio_clamp<0": (
        lambda: SequenceReverseKL(log_ratio_clamp=-5.0),
        r"log_ratio_clamp must be above 0; got -5\.0\. Leave it out",
    ),
    "support": (
        lambda: TopKReverseKL(support="techer"),
        r"support 'techer' is not known.*teacher, student, teacher\+sampled, student\+sampled",
    ),
    "tail": (
        lambda: TopKReverseKL(tail="none"),
        r"tail 'none' is not known.*drop, bucket, sampled",
    ),
    "renormalize": (
        lambda: TopKReverseKL(renormalize=False),
        r"renormalize=False with tail='drop' is biased.*q\(S\)/e.*tail='bucket'.*biased_ok=True",
    ),
    "detach_log_ratio without a sampled tail": (
        lambda: TopKReverseKL(detach_log_ratio=False),
        r"detach_log_ratio=False goes with tail='sampled'; the tail is 'drop'",
    ),
    "the published head and tail": (
        lambda: TopKReverseKL(tail="sampled", detach_log_ratio=False),
        r"published head and tail.*pushes mass out.*biased_ok=True",
    ),
    "p without top-p": (
        lambda: TopKReverseKL(p=0.5),
        r"p=0\.5 must lie in \(0, 1\] and goes with support='top-p'; the support is 'teacher'",
    ),
    "p above 1": (lambda: TopKReverseKL(support="top-p", p=1.5), r"p=1\.5 must lie in"),
    "baseline": (
        lambda: SampledTokenReverseKL(baseline="klx"),
        r"baseline 'klx' is not known\. Did you mean kl\? Known: none, kl",
    ),
    "baseline_k alone": (
        lambda: SampledTokenReverseKL(baseline_k=8),
        r"baseline_k=8 has no effect without baseline='kl'",
    ),
    "k2 with what acts on an advantage": (
        lambda: SampledTokenReverseKL(estimator="k2", clip_ratio=0.2, baseline="kl"),
        r"estimator='k2' .* no advantage for clip_ratio, baseline to act on",
    ),
    "importance_cap": (
        lambda: SampledTokenReverseKL(importance_cap=0.0),
        r"importance_cap must be above 0; got 0\.0",
    ),
    "across_masked": (
        lambda: SequenceReverseKL(across_masked="jump"),
        r"across_masked 'jump' is not known.*Known: skip, reset",
    ),
    "normalize": (
        lambda: SequenceReverseKL(normalize="len"),
        r"normalize 'len' is not known.*Did you mean length",
    ),
    "power": (lambda: PowerOPD(alpha=0.0), r"alpha must be above 0; got 0\.0"),
    "skew": (
        lambda: SkewReverseKL(1.0),
        r"strictly between 0 and 1; got 1\.0\. At 0 it is ReverseKL",
    ),
    "entropy": (lambda: EntropyAware(width=-1.0), r"width must be at least 0\.0; got -1\.0"),
    "scaled beta": (
        lambda: JensenShannon(1.5, scaled=True),
        r"beta must lie within 0 and 1; got 1\.5",
    ),
    "mixture of unequal lists": (
        lambda: Mixture([ReverseKL()], [0.5, 0.5]),
        r"one coefficient for each.*got 1 objectives and coefficients \[0\.5, 0\.5\]",
    ),
    "mixture of nothing": (lambda: Mixture([], []), r"got 0 objectives"),
    "mixture with a zero": (
        lambda: Mixture([ReverseKL()], [0.0]),
        r"finite and not 0; got \[0\.0\]",
    ),
    "sampled tail that is never off the support": (
        lambda: TopKReverseKL(support="teacher+sampled", tail="sampled"),
        r"tail='sampled' has no effect with support='teacher\+sampled'.*support='teacher'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_setting_is_refused_when_the_objective_is_made(case: str):
    make, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("gamma", [0, 1])
def test_the_ends_of_gamma_are_allowed(gamma: int):
    assert SequenceReverseKL(gamma=gamma).gamma == gamma


def test_known_objectives_are_those_of_the_design():
    assert set(known_objectives()) >= {
        "SampledTokenReverseKL",
        "SequenceReverseKL",
        "TopKReverseKL",
        "ReverseKL",
        "ForwardKL",
        "JensenShannon",
        "HeadTailReverseKL",
    }


@pytest.mark.parametrize("name", known_objectives())
def test_a_name_and_its_dotted_path_give_the_same_class(name: str):
    cls = resolve_objective(name)
    assert issubclass(cls, Objective) and cls.__name__ == name
    assert resolve_objective(f"{cls.__module__}.{name}") is cls


@pytest.mark.parametrize(("wrong", "meant"), [
    ("TopKReversKL", "TopKReverseKL"),
    ("reversekl", "ReverseKL"),
    ("JensenShanon", "JensenShannon"),
])  # fmt: skip
def test_an_unknown_name_is_answered_by_the_nearest_and_by_all(wrong: str, meant: str):
    with pytest.raises(ConfigError) as error:
        resolve_objective(wrong)
    text = str(error.value)
    assert f"objective '{wrong}' is not known. Did you mean {meant}?" in text
    for name in known_objectives():
        assert name in text
    assert "dotted path" in text and "opd_lightning.objectives" in text


def test_a_name_far_from_all_gets_the_list_without_a_guess():
    with pytest.raises(
        ConfigError, match=r"'qqqqqq' is not known\. Known: EntropyAware, ForwardKL"
    ):
        resolve_objective("qqqqqq")


@pytest.mark.parametrize(("path", "why"), [
    ("nowhere.at.all.Loss", "No module named 'nowhere'"),
    ("opd_lightning.objectives.Missing", "has no attribute 'Missing'"),
])  # fmt: skip
def test_a_dotted_path_that_leads_nowhere_says_why(path: str, why: str):
    with pytest.raises(
        ConfigError, match=r"is not known.*Known: EntropyAware, ForwardKL.*Tried to import it"
    ) as error:
        resolve_objective(path)
    assert path in str(error.value) and why in str(error.value)


@pytest.mark.parametrize("path", ["collections.OrderedDict", "math.pi"])
def test_a_dotted_path_to_something_else_is_refused_by_what_it_is(path: str):
    with pytest.raises(
        ConfigError, match=rf"{path} is .*not a subclass of opd_lightning.Objective"
    ):
        resolve_objective(path)


def install(tmp_path, monkeypatch, entry: str) -> None:  # noqa: ANN001
    """Put a distribution with one entry point on the path, as pip would."""
    (tmp_path / "my_losses_for_test.py").write_text(
        "from opd_lightning.objectives import ReverseKL\n\n\nclass Mine(ReverseKL):\n    pass\n"
    )
    info = tmp_path / "my_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[opd_lightning.objectives]\n{entry}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses_for_test", raising=False)


def test_an_entry_point_adds_a_name(tmp_path, monkeypatch):  # noqa: ANN001
    install(tmp_path, monkeypatch, "Mine = my_losses_for_test:Mine")
    assert "Mine" in known_objectives()
    assert resolve_objective("Mine").__module__ == "my_losses_for_test"
    assert resolve_objective("my_losses_for_test.Mine") is resolve_objective("Mine")


def test_an_entry_point_that_takes_a_known_name_is_refused(tmp_path, monkeypatch):  # noqa: ANN001
    install(tmp_path, monkeypatch, "ReverseKL = my_losses_for_test:Mine")
    with pytest.raises(ConfigError, match=r"'ReverseKL' \(my_losses_for_test:Mine\).*Rename one"):
        known_objectives()


def test_an_entry_point_that_is_no_objective_is_refused(tmp_path, monkeypatch):  # noqa: ANN001
    install(tmp_path, monkeypatch, "Other = collections:OrderedDict")
    with pytest.raises(ConfigError, match=r"Other = collections:OrderedDict is .*not a subclass"):
        known_objectives()
