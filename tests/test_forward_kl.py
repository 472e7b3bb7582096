"""Both directions of KL: Gaussians fitted to the posterior's draws, beside those fitted by the ELBO."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.optimize
import scipy.stats

from models import gaussian_target as targets
from toolkit import Dataset, Estimate, Model, Status, compare, fit, reference
from toolkit.comparison.divergences import kl_divergence
from toolkit.reporting.arrival import whose_sentences
from toolkit.variational.forward_kl import STRUCTURES, forward_kl_guide
from toolkit.variational.linear_response import linear_response, responds

DRAWS = 40_000


def exact(model: Model, seed: int, draws: int = DRAWS) -> dict[str, np.ndarray]:
    assert model.exact is not None
    return {name: np.asarray(value) for name, value in model.exact(jax.random.key(seed), draws).items()}


def normal(loc: np.ndarray, covariance: np.ndarray) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(jnp.asarray(loc), covariance_matrix=jnp.asarray(covariance))


def test_the_loaded_die_is_further_from_the_fair_one_than_the_fair_from_the_loaded() -> None:
    loaded = dist.Categorical(jnp.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]))
    fair = dist.Categorical(jnp.full(6, 1 / 6))
    assert kl_divergence(loaded, fair).value == pytest.approx(0.2939, abs=5e-5)
    assert kl_divergence(fair, loaded).value == pytest.approx(0.2426, abs=5e-5)
    p, q = np.array([0.5, 0.1, 0.1, 0.1, 0.1, 0.1]), np.full(6, 1 / 6)
    assert kl_divergence(loaded, fair).value == pytest.approx(scipy.stats.entropy(p, q), rel=1e-12)


def test_a_divergence_without_a_closed_form_is_had_from_draws() -> None:
    """A logistic against a normal, by quadrature; and a face that cannot fall is infinitely far."""
    p, q = scipy.stats.logistic(), scipy.stats.norm(0, 2)
    expected = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -40, 40)[0]
    found = kl_divergence(dist.Logistic(0.0, 1.0), dist.Normal(0.0, 2.0), key=jax.random.key(0))
    assert abs(found.value - expected) < 5 * found.se
    never = kl_divergence(dist.Categorical(jnp.array([0.5, 0.5])), dist.Categorical(jnp.array([1.0, 0.0])))
    assert never.value == math.inf


INFINITE: dict[str, Callable[[], tuple[dist.Distribution, dist.Distribution]]] = {
    "an interval that no draw leaves": lambda: (dist.Normal(0.0, 1.0), dist.Uniform(-30.0, 30.0)),
    "an interval that some draws leave": lambda: (dist.Normal(0.0, 1.0), dist.Uniform(-1.0, 1.0)),
    "half a line": lambda: (dist.Normal(50.0, 1.0), dist.Gamma(2.0, 1.0)),
    "the integers": lambda: (dist.Gamma(2.0, 1.0), dist.Poisson(2.0)),
    "a vector": lambda: (
        dist.Normal(0.0, 1.0).expand([2]).to_event(1),
        dist.Uniform(-9.0, 9.0).expand([2]).to_event(1),
    ),
    "a density that vanishes": lambda: (dist.Poisson(2.0), dist.ZeroInflatedPoisson(gate=1.0, rate=1.0)),
}


@pytest.mark.parametrize("case", INFINITE)
def test_it_is_infinite_where_p_can_be_what_q_cannot(case: str) -> None:
    found = kl_divergence(*INFINITE[case](), key=jax.random.key(0), draws=1_000)
    assert (found.value, found.se) == (math.inf, 0.0)


def test_from_within_it_is_not() -> None:
    found = kl_divergence(dist.Uniform(0.0, 1.0), dist.Normal(0.0, 1.0), key=jax.random.key(0))
    assert abs(found.value - (0.5 * math.log(2 * math.pi) + 1 / 6)) < 5 * found.se


def test_from_a_cauchy_to_any_gaussian_it_is_infinite_and_back_it_is_not() -> None:
    cauchy, gaussian = dist.Cauchy(0.0, 1.0), dist.Normal(0.0, 3.0)
    few, many = (kl_divergence(cauchy, gaussian, key=jax.random.key(0), draws=n) for n in (1_000, 100_000))
    assert many.value > 10 * few.value
    assert many.se > 0.2 * many.value
    back = kl_divergence(gaussian, cauchy, key=jax.random.key(0))
    assert 0 < back.value < 1


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_has_the_moments_of_its_draws_in_unconstrained_space(structure: str) -> None:
    def positive(y: object) -> None:
        scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        mu = numpyro.sample("mu", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("y", dist.Normal(mu.sum(), scale), obs=y)

    model = Model(positive, Dataset("one", {"y": np.array(0.5)}))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(500, 3)) @ np.array([[1.0, 0.3, 0.0], [0.0, 1.0, -2.0], [0.0, 0.0, 0.5]]) + 1.0
    guide = forward_kl_guide({"mu": vectors[:, 1:], "scale": np.exp(vectors[:, 0])}, structure=structure)
    fitted = fit(model, guide, key=jax.random.key(0))
    assert (fitted.status, fitted.guide.name) == (Status.ARRIVED, f"forward_{structure}")
    drawn = fitted.draw(jax.random.key(1), DRAWS)
    made = np.column_stack([np.log(drawn["scale"]), drawn["mu"]])
    covariance = np.cov(vectors.T, bias=True)
    if structure == "mean_field":
        covariance = np.diag(np.diag(covariance))
    sds = np.sqrt(np.diag(covariance))
    assert (np.abs(made.mean(0) - vectors.mean(0)) < 5 * sds / DRAWS**0.5).all()
    np.testing.assert_allclose(
        np.cov(made.T, bias=True) / np.outer(sds, sds), covariance / np.outer(sds, sds), atol=5 * (2 / DRAWS) ** 0.5
    )


def wide_slope(correlation: float) -> float:
    return 0.5 * correlation**2 / (1 - correlation**2)


@pytest.mark.parametrize("correlation", [0.5, 0.9])
def test_what_a_factorised_gaussian_does_to_a_correlated_one_depends_on_the_direction(correlation: float) -> None:
    """By KL(q || p) its sds are sqrt(1 - rho^2) of the truth, by KL(p || q) they are right; at the same cost."""
    model = targets.model(dimensions=2, correlation=correlation)
    covers = fit(model, forward_kl_guide(exact(model, 1), structure="mean_field"), key=jax.random.key(0))
    narrow = fit(model, "mean_field", key=jax.random.PRNGKey(0))
    assert narrow.gap_limit is not None
    cost = -0.5 * math.log1p(-(correlation**2))
    judged = compare(model, reference(model, key=jax.random.PRNGKey(2), draws=10_000), [covers, narrow],
                     key=jax.random.PRNGKey(3))  # fmt: skip
    table = judged.gaps.table.set_index("guide")
    ratios = judged.table.query("metric == 'sd_ratio'").groupby("guide")[["value", "se"]].mean()
    for name, ratio in (("forward_mean_field", 1.0), ("mean_field", math.sqrt(1 - correlation**2))):
        se = ratios.loc[name, "se"] + (ratio / (2 * DRAWS) ** 0.5 if name == "forward_mean_field" else 0.0)
        assert abs(ratios.loc[name, "value"] - ratio) < 5 * se
    # The moments' own error is second order: a parameter's half a nat per draw.
    pq, qp = table.loc["forward_mean_field"], table.loc["mean_field"]
    assert abs(pq["kl_pq"] - cost) < 5 * pq["kl_pq_se"] + 4 / DRAWS
    assert abs(qp["kl_qp"] - cost) < 5 * qp["kl_qp_se"] + narrow.gap_limit
    # The other way round each is worse: the covering one lies where the posterior is not.
    wide = cost * -1 + correlation**2 / (1 - correlation**2)
    # Its slope in the log variances is rho^2 / (1 - rho^2) / 2; these err by sqrt(2 / n), with correlation rho^2.
    of_moments = wide_slope(correlation) * math.sqrt(4 * (1 + correlation**2) / DRAWS)
    assert abs(pq["kl_qp"] - wide) < 5 * math.hypot(pq["kl_qp_se"], of_moments) + 5 / DRAWS


@pytest.mark.parametrize("weight", [0.5, pytest.param(0.2, marks=pytest.mark.slow)])
def test_of_two_modes_one_direction_takes_one_and_the_other_covers_both(weight: float) -> None:
    model = targets.model(target="two_modes", dimensions=2, correlation=0.0, separation=10.0, weight=weight)
    draws, seen = exact(model, 1), exact(model, 2)["z"]
    takes = fit(model, "full_rank", key=jax.random.PRNGKey(0))
    covers = fit(model, forward_kl_guide(draws), key=jax.random.PRNGKey(0))
    assert takes.elbo is not None
    upper = takes.draw(jax.random.key(3), 1_000)["z"][:, 0] > 0
    assert upper.mean() in (0.0, 1.0)
    share = weight if upper.all() else 1 - weight
    assert takes.gap_limit is not None
    lacking = -7.5 - takes.elbo.value + math.log(share)
    assert -5 * takes.elbo.se < lacking < takes.gap_limit + 5 * takes.elbo.se
    # The mixture's covariance is I + w (1 - w) separation^2 along the first axis, its entropy the Gaussian's and H(w).
    spread = weight * (1 - weight) * 100
    entropy = -(weight * math.log(weight) + (1 - weight) * math.log(1 - weight))
    there = Estimate.of_mean(covers.log_weights_at({"z": seen}) + 7.5)
    assert abs(there.value - (0.5 * math.log1p(spread) - entropy)) < 5 * there.se + 5 / DRAWS
    # An sd errs by sd sqrt((kurtosis - 1) / 4 n): that of the guide's draws, and of the mixture's, whose is below 3.3.
    sd = math.sqrt(1 + spread)
    assert abs(covers.draw(jax.random.key(3), DRAWS)["z"][:, 0].std() - sd) < 5 * sd * math.sqrt(4.3 / (4 * DRAWS))
    # One that sits on one mode is far away by KL(p || q): the other mode lies ten sds off.
    away = takes.log_weights_at({"z": seen}).mean() + 7.5
    assert away > 10 * there.value


def test_a_gaussian_fitted_to_a_cauchy_by_the_elbo_is_the_one_of_quadrature() -> None:
    model = targets.model(target="cauchy", dimensions=1, correlation=0.0)

    def cost(log_scale: float) -> float:
        q = scipy.stats.norm(0, math.exp(log_scale))
        terms = lambda x: q.pdf(x) * (q.logpdf(x) - scipy.stats.cauchy.logpdf(x))  # noqa: E731
        return 2 * scipy.integrate.quad(terms, 0, 12 * math.exp(log_scale))[0]

    best = scipy.optimize.minimize_scalar(cost, bounds=(-2, 2), method="bounded", options={"xatol": 1e-8})
    fitted = fit(model, "mean_field", key=jax.random.PRNGKey(0))
    assert fitted.elbo is not None
    assert fitted.gap_limit is not None
    lacking = -7.5 - fitted.elbo.value - best.fun
    assert -5 * fitted.elbo.se < lacking < fitted.gap_limit + 5 * fitted.elbo.se
    assert float(fitted.params["z_auto_scale"][0]) == pytest.approx(math.exp(best.x), rel=0.05)


@pytest.mark.slow
def test_the_report_calls_the_other_direction_divergent_whatever_gaussian_it_is() -> None:
    model = targets.model(target="cauchy", dimensions=1, correlation=0.0)
    draws = exact(model, 1)
    fits = [
        fit(model, guide, key=jax.random.PRNGKey(0)) for guide in ("mean_field", forward_kl_guide(draws, name="wide"))
    ]
    judged = compare(model, reference(model, key=jax.random.PRNGKey(2)), fits, key=jax.random.PRNGKey(3))
    table = judged.gaps.table.set_index("guide")
    # Linear response bends the ELBO around its optimum, and the wide one is at none.
    assert [responds(fitted) for fitted in fits] == [True, False]
    for name in table.index:
        assert table.loc[name, "kl_pq_problem"].startswith("divergent: it grows with the draws")
    # It does: squares of a Cauchy's draws grow with their number.
    weights = fits[0].log_weights_at(exact(model, 4, 2**16))
    few, many = (np.median([piece.mean() for piece in np.split(weights[: 32 * n], 32)]) for n in (2**5, 2**11))
    assert many > 10 * few


@pytest.mark.parametrize("scale", [1.0, 30.0, 400.0])
def test_a_gaussian_as_wide_as_one_likes_is_no_less_divergent(scale: float) -> None:
    """The tail of log p - log q does not show it: a wide guide has it highest in the middle."""
    model = targets.model(target="cauchy", dimensions=1, correlation=0.0)
    wide = fit(model, forward_kl_guide({"z": scale * np.array([[-1.0], [1.0]])}, structure="mean_field"),
               key=jax.random.PRNGKey(0))  # fmt: skip
    judged = compare(
        model, reference(model, key=jax.random.PRNGKey(2), draws=10_000), [wide], key=jax.random.PRNGKey(3)
    )
    row = judged.gaps.table.iloc[0]
    assert row["kl_pq_problem"].startswith("divergent")
    assert 1.5 < row["kl_pq_khat"] < 2.5  # a Cauchy's squares have 2


def test_a_finite_divergence_with_its_peak_in_the_middle_is_not_called_divergent() -> None:
    def logistic(shift: object) -> None:
        numpyro.sample("z", dist.Logistic(0.0, 1.0))
        numpyro.factor("evidence", shift)

    def exactly(key: jax.Array, draws: int) -> dict[str, Any]:
        return {"z": dist.Logistic(0.0, 1.0).sample(key, (draws,))}

    model = Model(logistic, Dataset("none", {"shift": np.array(0.0)}), exact=exactly, log_evidence=0.0)
    normal_of_sd_2 = forward_kl_guide({"z": np.array([-2.0, 2.0])}, structure="mean_field")
    fits = [fit(model, normal_of_sd_2, key=jax.random.PRNGKey(0))]
    judged = compare(model, reference(model, key=jax.random.PRNGKey(2), draws=10_000), fits, key=jax.random.PRNGKey(3))
    row = judged.gaps.table.iloc[0]
    p, q = scipy.stats.logistic(), scipy.stats.norm(0, 2)
    expected = scipy.integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -40, 40)[0]
    assert not row["kl_pq_problem"]
    assert abs(row["kl_pq"] - expected) < 5 * row["kl_pq_se"]


def test_the_error_of_its_draws_is_told_and_has_its_share_of_the_blame() -> None:
    """Of 50 draws, the mean is known to a seventh of an sd: what is wrong may be that, and not the family's."""
    model = targets.model(dimensions=2, correlation=0.0)
    few = fit(model, forward_kl_guide(exact(model, 1, 50)), key=jax.random.key(0))
    assert "of 50 draws: if they are independent, means are known to 0.14 sd" in few.why
    assert "to a share of 0.1, which no error in the tables has in it" in few.why
    judged = compare(model, reference(model, key=jax.random.PRNGKey(2), draws=10_000), [few], key=jax.random.PRNGKey(3))
    assert judged.guides.loc["forward_full_rank", "verdict"] == "wrong"
    (said,) = whose_sentences([few], judged.table, judged.thresholds)
    assert "what is wrong is its approximation's or its draws', whose own error is told with how" in said


def _scaled() -> Model:
    return Model(lambda y: numpyro.sample("y", dist.Normal(0.0, numpyro.sample("scale", dist.LogNormal())), obs=y),
                 Dataset("one", {"y": np.array(0.5)}), name="scaled")  # fmt: skip


ONE = {"z": np.zeros((5, 2))}
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "structure": (lambda: forward_kl_guide(ONE, structure="full"), "one of full_rank, mean_field; got 'full'"),
    "no mapping": (lambda: forward_kl_guide([1.0]), "draws by site, as {'mu': values}; got list"),  # type: ignore[arg-type]
    "none": (lambda: forward_kl_guide({}), "equally many draws of each site, as (draws, ...); got none"),
    "unequal": (lambda: forward_kl_guide({"a": [1.0], "b": [1.0, 2.0]}), "got a 1, b 2"),
    "infinite": (lambda: forward_kl_guide({"a": [1.0, math.inf]}), "finite draws; got others of a"),
    "batch": (
        lambda: kl_divergence(dist.Normal(jnp.zeros(2), 1.0), dist.Normal(0.0, 1.0)),
        "single distributions of one event shape; got batches (2,) and ()",
    ),
    "categories": (
        lambda: kl_divergence(dist.Categorical(jnp.full(2, 0.5)), dist.Categorical(jnp.full(3, 1 / 3))),
        "Expected two categorical distributions of equally many categories; got [2, 3].",
    ),
    "edge of p": (
        lambda: kl_divergence(dist.Gamma(0.01, 1.0), dist.LogNormal(0.0, 1.0), key=jax.random.key(0)),
        "Expected finite densities of Gamma at its own draws; some are rounded to the edge of its support",
    ),
    "no key": (
        lambda: kl_divergence(dist.Logistic(0.0, 1.0), dist.Normal(0.0, 1.0)),
        "Expected a key for draws, since KL(Logistic || Normal) has no closed form",
    ),
    "few": (
        lambda: fit(
            targets.model(dimensions=3),
            forward_kl_guide({"z": np.random.default_rng(0).normal(size=(3, 3))}),
            key=jax.random.key(0),
        ),
        "more than 3 draws, not all alike in any coordinate, for the covariance of 3 coordinates; got 3 draws",
    ),
    "response": (
        lambda: linear_response(
            fit(
                targets.model(dimensions=2),
                forward_kl_guide({"z": np.random.default_rng(0).normal(size=(9, 2))}, structure="mean_field"),
                key=jax.random.key(0),
            ),
            key=jax.random.PRNGKey(0),
        ),
        "Expected a fit at an optimum of the ELBO, which responds; 'forward_mean_field' was fitted by another aim.",
    ),
    "chains": (
        lambda: fit(targets.model(dimensions=2), forward_kl_guide({"z": np.zeros((4, 50, 2))}), key=jax.random.key(0)),
        "Expected draws of 'z' as (draws, 2); got (4, 50, 2): flatten the chains first",
    ),
    "singular": (
        lambda: fit(
            targets.model(dimensions=2),
            forward_kl_guide({"z": np.repeat(np.random.default_rng(0).normal(size=(90, 1)), 2, axis=1)}),
            key=jax.random.key(0),
        ),
        "Expected draws whose 2 coordinates vary on their own; coordinate 1 follows from those before it",
    ),
    "edge": (
        lambda: fit(_scaled(), forward_kl_guide({"scale": [0.0, 1.0, 2.0]}), key=jax.random.key(0)),
        "of 3 draws, 1 lie on an edge or outside",
    ),
    "missing": (
        lambda: fit(targets.model(dimensions=2), forward_kl_guide({"x": np.zeros(4)}), key=jax.random.key(0)),
        "they lack z and hold x",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call, text = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
