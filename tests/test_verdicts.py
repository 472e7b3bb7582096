"""Three-valued verdicts, Holm's correction, and the words that come of them."""

import math

import numpy as np
import pandas as pd
import pytest

from toolkit.comparison.metrics import METRICS, QUANTILE_METRICS, Metrics
from toolkit.comparison.overall import overall
from toolkit.comparison.sentences import at_most, directions, guide_sentence, probability, whose
from toolkit.comparison.tables import TABLE_COLUMNS, metric_rows, quantity_verdicts, worst
from toolkit.comparison.verdicts import (
    Thresholds,
    Verdict,
    beyond,
    beyond_reach,
    combine,
    holm,
    interval,
    judge,
    judge_rows,
    more_draws,
    reach,
    simultaneous_z,
)
from toolkit.estimate import Estimate
from toolkit.variational.certificates import Certificate, Scope

RIGHT, WRONG, CANNOT_TELL = Verdict.RIGHT, Verdict.WRONG, Verdict.CANNOT_TELL
NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "se", "verdict"),
    [
        (0.0, 0.01, RIGHT),
        (0.08, 0.01, RIGHT),
        (0.09, 0.01, CANNOT_TELL),
        (0.11, 0.01, CANNOT_TELL),
        (0.13, 0.01, WRONG),
        (-0.13, 0.01, WRONG),
        (0.0, 0.1, CANNOT_TELL),
        (0.1, 0.0, RIGHT),
        (0.11, 0.0, WRONG),
        (NAN, 0.1, CANNOT_TELL),
        (0.0, NAN, CANNOT_TELL),
        (0.0, math.inf, CANNOT_TELL),
    ],
)
def test_judge_reads_the_interval(value: float, se: float, verdict: Verdict) -> None:
    assert judge(value, se, -0.1, 0.1) is verdict


def test_a_ratio_is_judged_by_its_logarithm() -> None:
    low, high = interval(0.5, 0.3, log=True)
    assert 0 < low < 0.5 < high
    assert low * high == pytest.approx(0.25)
    assert judge(0.0, 0.0, 0.9, 1.11, log=True) is WRONG
    assert beyond(0.0, 0.0, 0.9, 1.11, log=True) == 0.0


def test_p_values_are_small_only_outside() -> None:
    assert beyond(0.05, 0.01, -0.1, 0.1) == 1.0
    assert beyond(0.1 + 1.959964 * 0.01, 0.01, -0.1, 0.1) == pytest.approx(0.05, rel=1e-4)
    assert beyond(-0.2, 0.01, -0.1, 0.1) < 1e-20
    assert beyond(NAN, 0.01, -0.1, 0.1) == 1.0


def test_holm_steps_down() -> None:
    # 0.05 / 4, / 3, / 2, / 1: the third fails, and so does what comes after it.
    assert holm(np.array([0.04, 0.001, 0.03, 0.016])).tolist() == [False, True, False, True]
    assert holm(np.array([0.001, 0.002])).tolist() == [True, True]
    assert holm(np.array([])).tolist() == []


def test_holm_keeps_chance_from_accusing() -> None:
    """Values on the very threshold are called wrong in at most 5 % of studies, however many there are."""
    rng = np.random.default_rng(0)
    studies, accused = 200, 0
    for _ in range(studies):
        values = [Estimate(0.1 + 0.02 * noise, 0.02) for noise in rng.normal(size=60)]
        accused += WRONG in judge_rows(values, ["shift"] * 60, Thresholds())
    assert accused / studies < 0.05 + 5 * math.sqrt(0.05 * 0.95 / studies)


def test_simultaneous_intervals_hold_all_at_once() -> None:
    rng = np.random.default_rng(1)
    largest = np.abs(rng.normal(size=(4_000, 50))).max(axis=1)
    held = (largest < simultaneous_z(50)).mean()
    assert abs(held - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 4_000)
    assert simultaneous_z(1) == pytest.approx(1.959964)


def test_combine_is_right_only_if_all_are() -> None:
    assert combine([RIGHT, RIGHT]) is RIGHT
    assert combine([RIGHT, CANNOT_TELL]) is CANNOT_TELL
    assert combine([RIGHT, CANNOT_TELL, WRONG]) is WRONG
    assert combine([]) is CANNOT_TELL


def _metrics(heavy: tuple[bool, ...] = (), **values: list[float]) -> Metrics:
    count = len(next(iter(values.values())))
    neutral = {"shift": 0.0, "sd_ratio": 1.0, "coverage_50": 0.5, "coverage_90": 0.9, "wasserstein_1": 0.0}
    neutral |= {"cdf_difference": 0.0, "median_shift": 0.0, "spread_ratio": 1.0}
    estimates = {
        name: (np.array(values.get(name, [neutral[name]] * count)), np.full(count, 0.005))
        for name in (*METRICS, *QUANTILE_METRICS)
    }
    return Metrics(
        estimates, np.ones(count, bool), np.array(heavy or [False] * count), np.zeros(count), np.full(count, 4_000.0)
    )


def _sentence(compared: Metrics) -> str:
    count = compared.heavy.size
    rows = metric_rows("guide", [f"b[{i}]" for i in range(count)], compared, Thresholds(), judged=True)
    return guide_sentence(rows, quantity_verdicts(rows), "NUTS")


NARROW = {"sd_ratio": [0.26, 0.59, 0.4], "coverage_90": [0.3, 0.6, 0.5]}


@pytest.mark.parametrize(
    ("compared", "text"),
    [
        (
            _metrics(**NARROW),
            "no: 3 of 3 too narrow (sd 0.260 to 0.590 x NUTS), worst b[0]; the means are right",
        ),
        (_metrics(sd_ratio=[1.0, 1.5]), "no: 1 of 2 too wide: b[1] (sd 1.500 ± 0.005 x NUTS); the means are right"),
        (
            _metrics(shift=[0.4, -0.3, 0.0], coverage_90=[0.8, 0.9, 0.9]),
            "no: 1 of 3 shifted up: b[0] (by 0.400 ± 0.005 sd); 1 of 3 shifted down: b[1] (by -0.300 ± 0.005 sd); "
            "the sds are right",
        ),
        (
            _metrics(sd_ratio=[0.5, 0.6], shift=[0.0, 0.095]),
            "no: 2 of 2 too narrow (sd 0.500 to 0.600 x NUTS), worst b[0]; "
            "the means are right for 1 of 2, cannot tell for the others",
        ),
        (
            _metrics(coverage_90=[0.8, 0.9]),
            "no: 1 of 2 too narrow (the 90 % interval of b[0] holds 0.800 ± 0.005 of NUTS); the means are right",
        ),
        (
            _metrics(sd_ratio=[1.0, 0.9]),
            "cannot tell: none of 2 is wrong, 1 is right; 1 of 2 needs more draws (over 50 times as many)",
        ),
        (
            _metrics(sd_ratio=[0.9, 0.9], shift=[0.0, 0.0]),
            "cannot tell: 2 of 2 need more draws (over 50 times as many)",
        ),
        (
            _metrics(shift=[NAN], sd_ratio=[NAN], coverage_90=[NAN]),
            "cannot tell: infinite or NaN draws of 1 of 1 quantities",
        ),
        (
            _metrics(shift=[0.0, 0.02]),
            "yes: both quantities are right (shifts below 0.03 sd, sds 0.99 to 1.01 x NUTS, at once with 95 %)",
        ),
        (
            # Moments of heavy tails have no usable error: they say nothing of the room.
            _metrics((True, False), shift=[4.0, 0.0], sd_ratio=[3.0, 1.0]),
            "yes: both quantities are right (shifts below 0.01 sd, sds 0.99 to 1.01 x NUTS, at once with 95 %)",
        ),
        (
            _metrics((True, False), sd_ratio=[3.0, 1.0], spread_ratio=[0.7, NAN], median_shift=[0.0, NAN]),
            "no: 1 of 2 too narrow: b[0] (5 to 95 % spread 0.700 ± 0.005 x NUTS); the means are right",
        ),
    ],
)
def test_sentences_come_from_the_verdicts(compared: Metrics, text: str) -> None:
    assert _sentence(compared) == text


def test_nothing_to_judge_is_said() -> None:
    assert guide_sentence(pd.DataFrame(columns=list(TABLE_COLUMNS)), {}, "NUTS").startswith("not judged: no quantity")


def test_heavy_tails_are_not_judged_by_moments() -> None:
    rows = metric_rows("guide", ["b"], _metrics((True,), sd_ratio=[3.0]), Thresholds(), judged=True)
    verdicts = rows.set_index("metric")["verdict"]
    assert verdicts["sd_ratio"] == verdicts["shift"] == ""
    assert verdicts["spread_ratio"] == verdicts["median_shift"] == "right"
    assert worst(rows)["worst_shift_quantity"] == ""


def test_a_shift_explains_a_mass_that_is_off() -> None:
    rows = metric_rows("guide", ["b"], _metrics(shift=[0.5], coverage_90=[0.8]), Thresholds(), judged=True)
    assert directions(rows) == ["shifted up"]


def test_worst_is_the_farthest_on_each_metrics_own_scale() -> None:
    compared = _metrics(shift=[0.1, -0.4, 0.3], sd_ratio=[0.5, 1.8, 1.0], coverage_90=[0.85, 0.9, 0.97])
    found = worst(metric_rows("guide", ["a", "b", "c"], compared, Thresholds(), judged=True))
    assert (found["worst_shift"], found["worst_shift_quantity"]) == (-0.4, "b")
    assert (found["worst_sd_ratio"], found["worst_sd_ratio_quantity"]) == (0.5, "a")
    assert (found["worst_coverage_90"], found["worst_coverage_90_quantity"]) == (0.97, "c")


def test_between_what_the_worst_lies_is_reckoned_over_all_at_once() -> None:
    rng = np.random.default_rng(0)
    covered, count = 0, 200
    for _ in range(count):
        true, se = np.array([0.0] * 30 + [0.05, -0.08]), 0.02
        shift = (true + se * rng.standard_normal(32)).tolist()
        compared = _metrics(shift=shift)
        for name in ("shift", "sd_ratio", "coverage_90"):
            compared.estimates[name][1][:] = se
        found = worst(metric_rows("guide", [f"b[{i}]" for i in range(32)], compared, Thresholds(), judged=True))
        covered += found["worst_shift_least"] <= 0.08 <= found["worst_shift_most"]
    assert covered / count > 0.95 - 5 * math.sqrt(0.95 * 0.05 / count)
    # The bare maximum errs upwards, which is why it is not to be read alone.
    assert found["worst_shift_least"] < abs(found["worst_shift"]) < found["worst_shift_most"]
    ratio = worst(metric_rows("guide", ["a"], _metrics(sd_ratio=[0.5]), Thresholds(), judged=True))
    assert ratio["worst_sd_ratio_least"] < math.log(2) < ratio["worst_sd_ratio_most"]


@pytest.mark.parametrize(
    ("metric", "value", "se", "times"),
    [
        ("shift", 0.05, 0.05, (1.959964 * 0.05 / 0.05) ** 2),
        ("shift", -0.09, 0.02, (1.959964 * 0.02 / 0.01) ** 2),
        ("sd_ratio", 1.0, 0.2, (1.959964 * 0.2 / math.log(1.11)) ** 2),
        ("shift", 0.12, 0.02, (1.959964 * 0.02 / 0.02) ** 2),
        ("shift", 0.1, 0.02, math.inf),
        ("sd_ratio", 0.0, 0.1, math.inf),
        ("probability", 0.02, 0.01, (1.959964 * 0.01 / 0.01) ** 2),
    ],
)
def test_how_many_more_draws_would_decide(metric: str, value: float, se: float, times: float) -> None:
    assert more_draws(Estimate(value, se), metric, Thresholds()) == pytest.approx(times)


def test_no_number_of_draws_decides_what_is_no_number() -> None:
    assert math.isnan(more_draws(Estimate(NAN, 0.1), "coverage_90", Thresholds()))


def test_with_so_many_more_draws_a_number_is_decided() -> None:
    for value, se in ((0.05, 0.05), (0.12, 0.02), (-0.09, 0.03)):
        times = more_draws(Estimate(value, se), "shift", Thresholds())
        assert judge(value, se, -0.1, 0.1) is CANNOT_TELL
        assert judge(value, se / math.sqrt(1.01 * times), -0.1, 0.1) is not CANNOT_TELL
    # What lies outside must survive Holm's test over all rows, and needs more.
    assert more_draws(Estimate(0.12, 0.02), "shift", Thresholds(), 1_000) > 3


def test_thresholds_are_read_from_text() -> None:
    read = Thresholds.parse(["shift=0.05", "sd_ratio = 0.95, 1.05", "probability=0.01"])
    assert read == Thresholds(shift=0.05, sd_ratio=(0.95, 1.05), probability=0.01)
    assert Thresholds.parse([]) == Thresholds()


@pytest.mark.parametrize("text", ["shift", "shift=", "shift=a", "shift=0.1,0.2", "sd_ratio=0.9", "width=0.1", "=1"])
def test_a_threshold_that_is_none_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=f"Expected a threshold such as shift=0.05.*got '{text}'"):
        Thresholds.parse([text])


def _guides(**rows: tuple[str, int, int, float]) -> pd.DataFrame:
    columns = ["verdict", "right", "wrong", "seconds"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).assign(quantities=5)


def _asked(*rows: tuple[str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["item", "source", "verdict"])


_NONE = _asked()
_MIXED = _guides(a=("wrong", 3, 2, 1.0), b=("right", 5, 0, 3.0), c=("right", 5, 0, 2.0))


@pytest.mark.parametrize(
    ("guides", "focus", "verdict", "guide", "text"),
    [
        (_MIXED, _NONE, RIGHT, "c", "Yes, from c: all 5 quantities are right."),
        (
            _MIXED,
            _asked(("x", "reference", ""), ("x", "a", "right"), ("x", "b", "right"), ("x", "c", "wrong")),
            RIGHT,
            "a",
            "Yes, from a: what you asked for is right (of all its 5 quantities 2 are wrong).",
        ),
        (
            _MIXED,
            _asked(("x", "a", "right"), ("x", "b", "cannot tell"), ("y", "a", "wrong"), ("y", "b", "right")),
            CANNOT_TELL,
            "",
            "Not known yet: b is right in 1 of 2 that you asked for, and the draws are too few for the rest.",
        ),
        (
            _guides(a=("wrong", 3, 2, 1.0), b=("wrong", 4, 1, 3.0)),
            _NONE,
            WRONG,
            "",
            "No: none of 2 guides is right in every quantity; b is wrong in the fewest, 1 of 5.",
        ),
        (
            _guides(a=("cannot tell", 3, 0, 1.0), b=("wrong", 4, 1, 3.0)),
            _NONE,
            CANNOT_TELL,
            "",
            "Not known yet: a comes nearest, with 3 of 5 quantities right and none wrong.",
        ),
        (_guides(a=("", 0, 0, 1.0)), _NONE, None, "", "No verdict: no guide could be judged."),
    ],
)
def test_the_study_has_a_verdict(
    guides: pd.DataFrame, focus: pd.DataFrame, verdict: Verdict | None, guide: str, text: str
) -> None:
    found = overall(guides, focus, "")
    assert (found.verdict, found.guide, found.sentence) == (verdict, guide, text)


def test_without_a_reference_the_study_has_none() -> None:
    found = overall(_MIXED, _NONE, "the reference failed its checks: the chains disagree")
    assert found.verdict is None
    assert found.sentence == "No verdict: the reference failed its checks: the chains disagree."


def test_probabilities_are_rounded_by_their_error() -> None:
    assert probability(0.8612, 0.013) == "0.861 ± 0.013"
    assert probability(1.0, 0.00015) == "1.0000 ± 0.0001"
    assert probability(0.25, 0.0) == "0.25"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"shift": 0.0}, "Expected a shift threshold above 0"),
        ({"sd_ratio": (1.1, 1.2)}, "Expected sd ratio thresholds around 1"),
        ({"coverage_90": (0.91, 0.95)}, "Expected coverage thresholds around 0.9"),
        ({"coverage_90": (0.8, 1.2)}, "Expected coverage thresholds around 0.9"),
        ({"probability": 0.0}, "Expected a probability threshold between 0 and 1"),
    ],
)
def test_impossible_thresholds_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Thresholds(**options)


@pytest.mark.parametrize("nats", [1e-6, 0.001, 0.07, 0.5, 3.0, 400.0])
def test_a_gap_reaches_as_far_as_gaussians_do(nats: float) -> None:
    # KL between Gaussians of one dimension: of a shift of s sds s^2 / 2, of a ratio t of sds (t^2 - 1) / 2 - log t.
    shift, (low, high) = reach(nats)
    assert shift**2 / 2 == pytest.approx(nats)
    assert low < 1 < high
    for ratio in (low, high):
        assert (ratio**2 - 1) / 2 - math.log(ratio) == pytest.approx(nats, rel=1e-6)


def test_no_gap_reaches_nowhere_and_an_unknown_one_everywhere() -> None:
    assert reach(0.0) == reach(-0.1) == (0.0, (1.0, 1.0))
    assert reach(math.inf) == reach(NAN) == (math.inf, (0.0, math.inf))


@pytest.mark.parametrize(
    ("metric", "value", "beyond_it"),
    # 0.08 nats reach 0.4 sd, and sds from 0.73 to 1.30 times: the edges are 0.5 sd, 0.66 and 1.44.
    [("shift", -0.55, True), ("shift", 0.45, False), ("sd_ratio", 0.62, True), ("sd_ratio", 0.7, False)]
    + [("sd_ratio", 1.5, True), ("sd_ratio", 1.4, False), ("spread_ratio", 0.62, True), ("median_shift", 0.55, True)],
)
def test_what_lies_beyond_a_gaps_reach_stays_wrong(metric: str, value: float, beyond_it: bool) -> None:
    assert beyond_reach(value, 0.01, metric, 0.08, Thresholds()) is beyond_it


def test_of_coverage_nothing_is_claimed() -> None:
    with pytest.raises(ValueError, match="Expected a shift or a ratio that has a threshold; got 'coverage_90'"):
        beyond_reach(0.1, 0.01, "coverage_90", 0.08, Thresholds())


@pytest.mark.parametrize(
    ("nats", "text"),
    [(0.0, "0.001"), (-0.2, "0.001"), (0.0042, "0.005"), (0.07, "0.070"), (0.0634, "0.064"), (0.1, "0.10")]
    + [(0.991, "1.00"), (1.23, "1.3"), (12.01, "13"), (1_233.4, "1,234"), (math.inf, "no finite limit")],
)
def test_a_limit_is_rounded_up(nats: float, text: str) -> None:
    assert at_most(nats) == text


def _wrong(*rows: tuple[str, str, float]) -> pd.DataFrame:
    return pd.DataFrame([("g", name, metric, v, 0.01, "wrong", NAN) for name, metric, v in rows], columns=TABLE_COLUMNS)


@pytest.mark.parametrize(
    ("scope", "limit", "rows", "text"),
    [
        (
            Scope.GLOBAL,
            0.08,
            [("a", "sd_ratio", 0.4), ("b", "shift", 0.9)],
            "the optimiser left at most 0.080 nats (global bound): near a Gaussian posterior, all that is wrong is the "
            "family's",
        ),
        (
            Scope.LOCAL,
            0.08,
            [("a", "sd_ratio", 0.4), ("b", "sd_ratio", 0.4), ("b", "shift", 0.2), ("c", "coverage_90", 0.1)],
            "the optimiser left at most 0.080 nats (local bound): near a Gaussian posterior, 1 of the 3 wrong are the "
            "family's, the others may in part be the optimiser's",
        ),
        (
            Scope.ESTIMATE,
            3.0,
            [("a", "sd_ratio", 0.4)],
            "the optimiser is estimated to have left at most 3.0 nats, which may explain what is wrong: the family's "
            "or the optimiser's is not known",
        ),
        (
            Scope.LOCAL,
            math.inf,
            [("a", "sd_ratio", 0.4)],
            "whether the family's or the optimiser's is not known: there is no certificate",
        ),
        (Scope.GLOBAL, 0.08, [], ""),
    ],
)
def test_the_certificate_says_whose_the_error_is(
    scope: Scope, limit: float, rows: list[tuple[str, str, float]], text: str
) -> None:
    certificate = Certificate(Estimate(0.06, 0.01), limit, scope, 1_024, 4)
    assert whose(_wrong(*rows), certificate, Thresholds()) == text


def test_without_a_certificate_nobody_is_blamed() -> None:
    assert "is not known" in whose(_wrong(("a", "sd_ratio", 0.1)), None, Thresholds())
