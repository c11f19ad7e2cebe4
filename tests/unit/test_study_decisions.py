"""Single decisions of a rule, on an estimate with its error and by seed: properties for any numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.study.decision_rules import Band
from megatron_rl.study.verdicts import decide, decide_by_seed

FLOATS = st.floats(-5, 5)
CONFIRMS, REFUTES = Band(min=1.0), Band(max=0.0)


def test_a_missing_seed_may_agree_with_either_band() -> None:
    assert decide_by_seed({0: 2.0, 1: None}, CONFIRMS, REFUTES, 1) == "underpowered"
    assert decide_by_seed({0: -1.0, 1: None}, CONFIRMS, REFUTES, 1) == "underpowered"
    assert decide_by_seed({0: 2.0, 1: None}, CONFIRMS, None, 1) == "confirmed"


@given(FLOATS, st.floats(0, 5))
def test_no_verdict_holds_against_its_own_interval(estimate: float, error: float) -> None:
    verdict = decide(estimate, error, CONFIRMS, REFUTES)
    low, high = estimate - 2 * error, estimate + 2 * error
    assert (verdict == "confirmed") == (estimate >= 1 and low > 0)
    assert (verdict == "refuted") == (estimate <= 0 and high < 1)
    assert (verdict == "undecided") == (low > 0 and high < 1)


@given(FLOATS, st.floats(0, 1), st.floats(1, 3))
def test_more_error_never_makes_a_verdict(estimate: float, error: float, factor: float) -> None:
    less, more = (decide(estimate, e, CONFIRMS, REFUTES) for e in (error, factor * error))
    assert more in (less, "underpowered")


@given(st.dictionaries(st.integers(0, 9), st.one_of(st.none(), FLOATS), min_size=1), st.integers(1, 10))
def test_a_missing_seed_can_only_make_a_verdict_weaker(values: dict[int, float | None], needed: int) -> None:
    """If it is underpowered, some values of the missing seeds would decide; and no others do."""
    verdict = decide_by_seed(values, CONFIRMS, REFUTES, needed)
    filled = {
        decide_by_seed({s: v if v is not None else fill for s, v in values.items()}, CONFIRMS, REFUTES, needed)
        for fill in (2.0, -1.0, 0.5)
    }
    if verdict in ("confirmed", "refuted", "undecided"):
        assert filled == {verdict}
    elif needed <= len(values):
        assert filled & {"confirmed", "refuted"}
