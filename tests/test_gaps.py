"""The split of the log evidence against closed forms, and what is told where there is no number."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import scipy.stats
from targets import divergence, two_clusters, two_means, two_means_evidence

import models
from toolkit import Dataset, Estimate, Fit, Model, Reference, Status, fit, reference
from toolkit.comparison.gaps import GAP_COLUMNS, Gaps, gaps, total_variation_bound
from toolkit.modelling.space import latent_space
from toolkit.reporting.figures.room import room
from toolkit.reporting.nats import evidence_in_words, nats, room_in_words, room_section
from toolkit.reporting.palette import looks
from toolkit.sampling.evidence import LogEvidence
from toolkit.variational.autoguides import gaussian_form

KEY = jax.random.PRNGKey(0)
TARGETS, REGRESSION = models.load("gaussian_target"), models.load("conjugate_regression")


def split(model: Model, drawn: Reference | None, *fits: Any) -> Gaps:
    return gaps(model, drawn, fits, {}, key=KEY)


def row(model: Model, guide: str, **options: Any) -> tuple[pd.Series, Fit, Gaps]:
    drawn, fitted = reference(model, key=KEY), fit(model, guide, key=KEY, **options)
    found = split(model, drawn, fitted)
    return found.table.set_index("guide").loc[guide], fitted, found


def within(value: float, se: float, expected: float, slack: float = 0.0) -> bool:
    return abs(value - expected) <= 5 * se + slack


# -- both divergences -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 0.99, 0.999])
def test_of_two_gaussians_the_mean_field_s_kl_is_the_known_one(correlation: float) -> None:
    found, fitted, _ = row(TARGETS.model(dimensions=2, correlation=correlation), "mean_field")
    expected = -0.5 * math.log1p(-(correlation**2))
    assert fitted.gap_limit is not None
    assert -3 * found["kl_qp_se"] - 1e-9 < found["kl_qp"] - expected < 3 * found["kl_qp_se"] + fitted.gap_limit
    assert found["family_low"] - 1e-9 <= expected <= found["family_high"] + 3 * found["kl_qp_se"]
    assert found["labels"] == 0.0


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_both_divergences_are_those_of_the_two_gaussians(guide: str) -> None:
    model = REGRESSION.model(noise="known")
    found, fitted, _ = row(model, guide)
    posterior = REGRESSION.Posterior(model.arrays["x"], model.arrays["y"], "known", 0.1)
    form = gaussian_form(fitted.autoguide, latent_space(model))
    assert form is not None
    member, precision = form.member(fitted.params), posterior.precision / 0.1**2
    assert within(found["kl_qp"], found["kl_qp_se"], divergence(member, posterior.mean, precision), 1e-6)
    covariance, own = np.linalg.inv(precision), np.linalg.inv(member.covariance())
    apart = member.loc - posterior.mean
    expected = 0.5 * (np.trace(own @ covariance) - 7 + apart @ own @ apart)
    expected += 0.5 * (np.linalg.slogdet(member.covariance())[1] - np.linalg.slogdet(covariance)[1])
    assert within(found["kl_pq"], found["kl_pq_se"], expected, 1e-6)
    assert not found["kl_pq_problem"]


def test_of_mild_tails_the_divergence_is_the_known_one() -> None:
    model = TARGETS.model(target="student_t", df=30.0, dimensions=2)
    found, fitted, _ = row(model, "full_rank")
    form = gaussian_form(fitted.autoguide, latent_space(model))
    assert form is not None
    member, factor = form.member(fitted.params), model.arrays["scale_tril"]
    covariance, own = factor @ factor.T * 30 / 28, np.linalg.inv(member.covariance())
    expected = 0.5 * (np.trace(own @ covariance) + member.loc @ own @ member.loc)
    expected += 0.5 * np.linalg.slogdet(2 * math.pi * member.covariance())[1]
    expected -= scipy.stats.multivariate_t(np.zeros(2), factor @ factor.T, df=30).entropy()
    assert within(found["kl_pq"], found["kl_pq_se"], expected)


def test_a_divergence_that_grows_with_the_draws_is_no_number() -> None:
    """Under Cauchy tails the mean of log p - log q is infinite, and that of the draws grows with them."""
    found, _, whole = row(TARGETS.model(target="cauchy", dimensions=2), "full_rank")
    assert math.isnan(found["kl_pq"])
    assert found["kl_pq_problem"].startswith("divergent: it grows with the draws")
    text = " ".join(str(block) for block in room_section(whole, looks(["full_rank"])).blocks)
    assert "full_rank: KL(p || q) is divergent: it grows with the draws, since the guide's tails are too" in text
    assert math.isfinite(found["kl_qp"])


def test_where_the_mean_is_finite_and_its_error_is_not_there_is_no_number() -> None:
    found, _, _ = row(TARGETS.model(target="student_t", df=2.5, dimensions=2), "full_rank")
    assert math.isnan(found["kl_pq"])
    assert "rests on the rarest" in found["kl_pq_problem"] or "divergent" in found["kl_pq_problem"]


@pytest.mark.parametrize("apart", [8.0, 1.2])
def test_where_labels_may_switch_their_share_is_nobody_s_fault(apart: float) -> None:
    """Far apart, a guide sits on one of two labellings; near each other, it covers a part of both."""
    y = two_clusters(apart)
    model = two_means(y)
    drawn, fitted = reference(model, key=KEY), fit(model, "full_rank", key=KEY)
    assert drawn.status is Status.PASSED, drawn.reasons
    assert fitted.elbo is not None
    found = split(model, drawn, fitted)
    own, whole = found.table.iloc[0], two_means_evidence(y)
    assert within(own["kl_qp"], own["kl_qp_se"], whole - fitted.elbo.value, 0.02)
    if apart > 5:
        assert own["labels"] == pytest.approx(math.log(2))
        assert own["kl_qp"] == pytest.approx(math.log(2), abs=0.1)  # the rest of the gap is next to nothing
        assert own["family_high"] < 0.1
    else:
        assert 0.0 <= own["labels"] < math.log(2)
    picture = room(found, looks(["full_rank"]))
    assert picture is not None
    assert ("labels' 0.69" in picture.alt) is (apart > 5)


def test_the_bridge_and_the_exact_evidence_give_the_same_split() -> None:
    model = REGRESSION.model()
    drawn, fitted = reference(model, key=KEY), fit(model, "full_rank", key=KEY)
    blind = replace(model, exact=None, log_evidence=None)
    bridged = split(blind, replace(drawn, model=blind, status=Status.PASSED), replace(fitted, model=blind))
    exact = split(model, drawn, fitted)
    for name in ("kl_qp", "kl_pq"):
        first, second = bridged.table.iloc[0], exact.table.iloc[0]
        assert within(first[name], math.hypot(first[f"{name}_se"], second[f"{name}_se"]), second[name])
    assert bridged.table.iloc[0]["kl_pq_se"] < 0.2


@pytest.mark.slow
def test_the_family_s_interval_holds_its_gap_also_where_the_evidence_is_bridged() -> None:
    model = TARGETS.model(dimensions=10, correlation=0.5)
    fitted = fit(model, "mean_field", key=KEY)
    precision = np.linalg.inv(model.arrays["scale_tril"] @ model.arrays["scale_tril"].T)
    exact = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    blind, held = replace(model, exact=None, log_evidence=None), 0
    for seed in range(20):
        drawn = reference(model, key=jax.random.PRNGKey(seed), draws=500)
        own = split(blind, replace(drawn, model=blind, status=Status.PASSED), replace(fitted, model=blind)).table.iloc[
            0
        ]
        held += own["family_low"] <= exact <= own["family_high"]
    assert held >= 16  # 19 of 20 on average, and 16 in all but one of 400 runs


def test_a_model_with_parameters_of_its_own_is_told_and_does_not_stop_anything() -> None:
    from toolkit import compare

    def own(y: Any = None) -> None:
        scale = numpyro.param("scale", 1.0, constraint=dist.constraints.positive)
        m = numpyro.sample("m", dist.Normal(0.0, scale))
        numpyro.sample("y", dist.Normal(m, 1.0), obs=y)

    model = Model(own, Dataset("two", {"y": np.array([1.5, 2.5])}))
    fitted = fit(model, "mean_field", key=KEY, solver="svi")
    drawn = reference(model, key=KEY, chains=2, warmup=200, draws=500)
    found = compare(model, drawn, [fitted], key=KEY)
    assert not found.reference_ok
    assert "the model has parameters of its own (scale)" in found.guides.loc["mean_field", "sentence"]


def test_labels_are_counted_without_a_reference_too() -> None:
    model = two_means(two_clusters(8.0))
    own = split(model, None, fit(model, "full_rank", key=KEY)).table.iloc[0]
    assert own["labels"] == pytest.approx(math.log(2))
    assert own["family_low"] < 0.01


# -- bounds and decompositions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("correlation", [0.3, 0.9, 0.999])
def test_no_difference_that_was_seen_is_beyond_the_bound(correlation: float) -> None:
    from toolkit import compare

    model = TARGETS.model(dimensions=3, correlation=correlation)
    drawn = reference(model, key=KEY)
    found = compare(model, drawn, [fit(model, "mean_field", key=KEY)], key=KEY).gaps.table.iloc[0]
    assert found["cdf_difference"] - 3 * found["cdf_difference_se"] < found["tv_bound"] <= 1.0
    assert found["cdf_difference_quantity"].startswith("z[")


def test_the_bound_on_total_variation_is_the_lesser_of_two() -> None:
    nothing = Estimate(math.nan, math.nan)
    assert total_variation_bound(Estimate(0.02, 0.0)) == pytest.approx(0.1)  # Pinsker
    assert total_variation_bound(Estimate(5.0, 0.0)) == pytest.approx(math.sqrt(1 - math.exp(-5)))
    assert total_variation_bound(Estimate(5.0, 0.0), Estimate(0.02, 0.0), nothing) == pytest.approx(0.1)
    assert total_variation_bound(Estimate(0.0, 0.01)) == pytest.approx(math.sqrt(0.0196 / 2), rel=1e-3)
    assert math.isnan(total_variation_bound(nothing))


def test_the_elbo_is_made_of_what_theory_says() -> None:
    model = REGRESSION.model(noise="known")
    found, fitted, _ = row(model, "full_rank")
    form = gaussian_form(fitted.autoguide, latent_space(model))
    assert form is not None
    member, scales = form.member(fitted.params), 0.1 * np.array([10.0] + [30.0] * 6)
    prior = np.diag(scales**-2.0)
    assert within(found["kl_to_prior"], found["kl_to_prior_se"], divergence(member, np.zeros(7), prior))
    entropy = 0.5 * np.linalg.slogdet(2 * math.pi * math.e * member.covariance())[1]
    assert within(found["entropy"], math.hypot(found["energy_se"], found["elbo_se"]), entropy)
    assert found["expected_log_likelihood"] - found["kl_to_prior"] == pytest.approx(found["elbo"])
    assert found["energy"] + found["entropy"] == pytest.approx(found["elbo"])


# -- what is not known ------------------------------------------------------------------------------------------------


def test_without_a_trusted_reference_only_the_elbos_limit_the_evidence() -> None:
    model = TARGETS.model(dimensions=2)
    blind = replace(model, exact=None, log_evidence=None)
    narrow, wide = (fit(blind, name, key=KEY) for name in ("mean_field", "full_rank"))
    for drawn in (None, replace(reference(model, key=KEY), model=blind, status=Status.RHAT)):
        found = split(blind, drawn, narrow, wide)
        table = found.table.set_index("guide")
        assert found.evidence.estimate is None
        assert table["kl_qp"].isna().all()
        assert table.loc["mean_field", "kl_qp_low"] == pytest.approx(wide.elbo.value - narrow.elbo.value)  # type: ignore[union-attr]
        assert math.isnan(table.loc["mean_field", "kl_qp_high"])
        assert table.loc["mean_field", "family_low"] > 0.7
        picture = room(found, looks(["mean_field", "full_rank"]))
        assert picture is not None
        assert "mean_field: at least 0.8 nats" in picture.alt


def test_a_fit_that_failed_is_an_empty_row() -> None:
    model = TARGETS.model(dimensions=2)
    failed = Fit(fit(model, "mean_field", key=KEY).guide, model, Status.FAILED, "an error")
    found = split(model, reference(model, key=KEY), failed)
    assert found.table["problem"].tolist() == ["the fit has no optimum"]
    assert room(found, looks(["mean_field"])) is None
    assert "no fit has an ELBO" in str(room_section(found, looks(["mean_field"])).blocks[-1])


def test_an_approximation_without_a_density_has_its_gap_and_no_more() -> None:
    model = TARGETS.model(dimensions=2)
    fitted = fit(model, "mean_field", key=KEY)

    class Drawing:
        guide, status, message, elbo = fitted.guide, fitted.status, "", fitted.elbo
        fresh_log_weights, cost, usable = None, fitted.cost, True

        def draw(self, key: Any, draws: int, sites: Any = None) -> Any:
            return fitted.draw(key, draws, sites)

    found = split(model, reference(model, key=KEY), Drawing())
    own = found.table.iloc[0]
    assert own["kl_qp"] == pytest.approx(-0.5 * math.log1p(-0.81), abs=0.05)
    assert math.isnan(own["kl_pq"])
    assert own["problem"] == "its density is not known"
    assert math.isnan(own["optimisation_limit"])
    assert "outline" in room(found, looks(["mean_field"])).reading  # type: ignore[union-attr]


def test_a_fit_by_svi_is_not_split() -> None:
    found, _, whole = row(TARGETS.model(dimensions=2), "mean_field", solver="svi")
    assert math.isnan(found["family_low"])
    assert math.isfinite(found["kl_qp"])
    assert "nats" in room_in_words(found)
    assert "optimiser" not in room_in_words(found)
    assert len(room_section(whole, looks(["mean_field"])).blocks) == 3


def test_a_chart_without_an_inverse_is_a_reason_and_no_crash() -> None:
    from numpyro.infer.reparam import Reparam

    class Squared(Reparam):
        def __call__(self, name: str, fn: Any, obs: Any) -> tuple[None, Any]:
            import numpyro
            import numpyro.distributions as dist

            return None, numpyro.sample(f"{name}_root", dist.HalfNormal(1.0)) ** 2

    def positive(y: Any = None) -> None:
        import numpyro
        import numpyro.distributions as dist

        scale = numpyro.sample("scale", dist.Gamma(2.0, 2.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    data = Dataset("one", {"y": np.array(0.3)})
    model = Model(positive, data, charts={"squared": {"scale": Squared()}}, chart="squared")
    drawn = reference(model.in_chart("plain"), key=KEY)
    found = split(model, replace(drawn, model=model), fit(model, "mean_field", key=KEY))
    assert "Squared is neither" in found.table.iloc[0]["problem"]


# -- in words ---------------------------------------------------------------------------------------------------------


def test_columns_are_those_that_are_documented() -> None:
    model = TARGETS.model(dimensions=2)
    found = split(model, None, fit(model, "mean_field", key=KEY))
    assert tuple(found.table.columns) == GAP_COLUMNS


@pytest.mark.parametrize(
    ("evidence", "text"),
    [
        (LogEvidence(Estimate(-7.5, 0.0), "exact"), "Log evidence −7.500 nats, known exactly."),
        (
            LogEvidence(Estimate(-57.311, 0.013), "bridge sampling between the reference and full_rank"),
            "Log evidence −57.311 ± 0.013 nats, by bridge sampling between the reference and full_rank.",
        ),
        (
            LogEvidence(None, problem="no bridge can be trusted", low=Estimate(-9.0, 0.1), log_copies=math.log(6)),
            "not known: no bridge can be trusted. In expectation it is at least −9.00 ± 0.10 nats (the highest ELBO). "
            "It is that of one labelling; all labellings together have 1.792 nats more.",
        ),
    ],
)
def test_the_evidence_in_words(evidence: LogEvidence, text: str) -> None:
    assert re.search(re.escape(text), evidence_in_words(evidence))


def test_nats_are_no_finer_than_a_reader_needs() -> None:
    assert nats(0.00000004, 1e-9) == "0.000"
    assert nats(-3.14159, 1e-6) == "−3.142"
    assert nats(20.064, 0.048) == "20.06 ± 0.05"
    assert nats(math.nan) == "–"
