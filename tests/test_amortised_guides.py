"""Amortised branches: exact where the posterior is Gaussian, nested in coupled, and there for units never seen."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import scipy.optimize
from numpyro.infer import SVI
from numpyro.infer.reparam import LocScaleReparam

from models import hierarchical_regression
from toolkit import Dataset, Fit, Guide, Model, Status, fit
from toolkit.modelling.space import latent_space
from toolkit.storage import Storage
from toolkit.variational.amortised_fits import Amortised, amortised_member, with_units
from toolkit.variational.amortised_guides import AutoAmortisedNormal, Branch
from toolkit.variational.autoguides import gaussian_form
from toolkit.variational.block_search import plate_blocks
from toolkit.variational.building import build_guide
from toolkit.variational.carried_guides import carried
from toolkit.variational.density import LogDensity
from toolkit.variational.draws import matched_draws
from toolkit.variational.gaussians import Frame, Member, Quadratic
from toolkit.variational.guides import GUIDES
from toolkit.variational.keeping import keep_fit, kept_fit
from toolkit.variational.nesting import contains
from toolkit.variational.objectives import StickTheLandingELBO
from toolkit.variational.solvers.fixed_draws import FixedDrawsELBO

KEY = jax.random.PRNGKey(0)
GROUPS = 5


def normal_hierarchy(x: Any, group: Any, groups: int, y: Any = None) -> None:
    """All normal with known scales; a row's group is an index, and no plate of the row."""
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    with numpyro.plate("group", groups):
        alpha = numpyro.sample("alpha", dist.Normal(mu, 1.0))
    slope = numpyro.sample("slope", dist.Normal(0, 2))
    with numpyro.plate("group", groups):
        beta = numpyro.sample("beta", dist.Normal(slope, 0.5))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Normal(alpha[group] + beta[group] * x, 0.7), obs=y)


def counts(group: Any, groups: int, y: Any = None) -> None:
    """Poisson: no unit is Gaussian given the shared coordinates."""
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    sd = numpyro.sample("sd", dist.HalfNormal(1))
    with numpyro.plate("group", groups):
        effect = numpyro.sample("effect", dist.Normal(mu, sd))
    with numpyro.plate("row", len(group)):
        numpyro.sample("y", dist.Poisson(jnp.exp(effect[group])), obs=y)


@functools.cache
def conjugate() -> Model:
    rng = np.random.default_rng(0)
    group = np.arange(30) % GROUPS
    arrays = {"x": rng.normal(1, 1, 30), "group": group, "y": rng.normal(size=30) + group}
    data = Dataset("conjugate", arrays, static={"groups": GROUPS})
    charts = {"noncentred": {"alpha": LocScaleReparam(0), "beta": LocScaleReparam(0)}}
    return Model(normal_hierarchy, data, charts=charts, log_concave=True)


def counted(groups: int, seed: int = 0) -> Model:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups), 3)
    y = rng.poisson(np.exp(rng.normal(1, 0.7, groups))[group])
    charts = {"noncentred": {"effect": LocScaleReparam(0)}}
    data = Dataset(f"counts_{groups}", {"group": group, "y": y}, static={"groups": groups})
    return Model(counts, data, charts=charts, chart="noncentred")


@functools.cache
def exact(chart: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and precision of the conjugate posterior, and the log evidence: its log density is a quadratic."""
    model = conjugate()
    space = latent_space(model, chart)

    def log_density(vector: Any) -> Any:
        return model.log_density(space.unravel(vector), model.arrays, chart)

    with jax.enable_x64(True):
        zero = jnp.zeros(space.size)
        precision = -np.asarray(jax.jit(jax.hessian(log_density))(zero))
        mean = np.linalg.solve(precision, np.asarray(jax.jit(jax.grad(log_density))(zero)))
        top = float(jax.jit(log_density)(mean))
    evidence = top + 0.5 * space.size * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    return mean, precision, evidence


def set_up(model: Model, **options: Any) -> AutoAmortisedNormal:
    space = latent_space(model, model.chart)
    guide = Guide("own", lambda fn: AutoAmortisedNormal(fn, **options))
    built = build_guide(model, guide, space.unravel(np.zeros(space.size)))
    assert isinstance(built, AutoAmortisedNormal)
    return built


# -- where the posterior is Gaussian ----------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [0, 6])
def test_a_precisions_mean_is_off_by_what_the_sum_over_points_leaves(others: int) -> None:
    """The figure in docs/hierarchies.md: the more shared coordinates there are, the further out the points lie."""

    def unknown_width(y: Any) -> None:
        log_sd = numpyro.sample("log_sd", dist.Normal(0, 1))
        more = numpyro.sample("more", dist.Normal(0, 1).expand([1 + others]).to_event(1))
        with numpyro.plate("group", len(y)):
            effect = numpyro.sample("effect", dist.Normal(0, jnp.exp(log_sd)))
            numpyro.sample("y", dist.Normal(effect + more.sum(), 1.0), obs=y)

    guide, shared, wide = set_up(Model(unknown_width, Dataset("two", {"y": np.array([0.3, 2.0])}))), 2 + others, 0.2
    (units,) = guide.summaries.at(np.zeros(shared), wide * np.eye(shared), np.zeros(1))
    summed = units.spread[:, 0, 0] ** -2 - 1
    np.testing.assert_allclose(summed, 1 + (np.cosh(2 * shared**0.5 * wide) - 1) / shared, rtol=1e-9)
    error = summed[0] - np.exp(2 * wide**2)
    assert error == pytest.approx((2 * shared / 3 - 2) * wide**4, abs=shared**2 * wide**6)


@pytest.mark.parametrize("chart", ["plain", "noncentred"])
def test_the_summary_alone_is_the_branch_of_a_gaussian_posterior_whatever_the_reference(chart: str) -> None:
    model = conjugate().in_chart(chart)
    mean, precision, _ = exact(chart)
    guide = set_up(model)
    rng = np.random.default_rng(1)
    shared = guide.blocks.shared
    own = np.array(guide.blocks.order[:shared])
    covariance = np.linalg.inv(precision)[np.ix_(own, own)]
    reference = np.tril(rng.normal(size=(shared, shared)), -1) + np.diag(rng.uniform(0.5, 2, shared))
    with jax.enable_x64(True):
        constants = guide.constants_at(rng.normal(size=len(mean)), reference)
        free = {"loc": mean[own], "scale_tril": np.linalg.cholesky(covariance), "weights": guide.begin}
        params = {f"auto_{name}": value for name, value in (constants | free).items()}
        member = amortised_member(guide, params)
    np.testing.assert_allclose(member.loc, mean, atol=1e-9)
    np.testing.assert_allclose(member.covariance() @ precision, np.eye(len(mean)), atol=1e-9)


def test_a_gaussian_hierarchy_has_no_gap_and_blocks_lack_what_algebra_says() -> None:
    _, precision, evidence = exact("plain")
    amortised, blocks = (fit(conjugate(), name, key=KEY) for name in ("amortised", "blocks"))
    assert amortised.status is blocks.status is Status.ARRIVED
    assert abs(amortised.elbo.value - evidence) < 3 * amortised.elbo.se + amortised.gap_limit
    # KL from the best block-diagonal Gaussian, whose precision has the posterior's blocks.
    structure = blocks.autoguide.blocks
    ordered = precision[np.ix_(structure.order, structure.order)]
    ends = np.cumsum([structure.shared, *structure.sizes])
    parts = [ordered[a:b, a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    lacking = 0.5 * (sum(np.linalg.slogdet(part)[1] for part in parts) - np.linalg.slogdet(precision)[1])
    assert lacking > 0.3
    assert abs(evidence - blocks.elbo.value - lacking) < 5 * blocks.elbo.se + blocks.gap_limit


# -- the summary ------------------------------------------------------------------------------------------------------


def test_units_are_summed_up_at_their_modes_and_by_the_best_gaussian_branch() -> None:
    model = counted(6).in_chart("plain")
    guide = set_up(model)
    loc, scale_tril = np.array([0.8, np.log(0.6)]), np.array([[0.2, 0.0], [0.1, 0.3]])
    (units,) = guide.summaries.at(loc, scale_tril, np.array([5.0]))  # far from every mode
    away = np.sqrt(2) * np.concatenate([np.eye(2), -np.eye(2)])
    group, y = model.arrays["group"], model.arrays["y"]
    for unit in range(6):
        rows, modes, bends = y[group == unit], [], []
        for e in away:
            mu, log_sd = loc + scale_tril @ e

            def slope(z: float, rows: Any = rows, mu: float = mu, log_sd: float = log_sd) -> float:
                return float((rows - np.exp(z)).sum() - (z - mu) * np.exp(-2 * log_sd))

            modes.append(scipy.optimize.brentq(slope, -20, 20, xtol=1e-13))
            bends.append(len(rows) * np.exp(modes[-1]) + np.exp(-2 * log_sd))
        # By weighted least squares.
        root = np.sqrt(bends)
        design = np.column_stack([np.ones(4), away])
        centre, *slopes = np.linalg.lstsq(design * root[:, None], np.array(modes) * root, rcond=None)[0]
        spread = np.mean(bends) ** -0.5
        np.testing.assert_allclose(units.centre[unit], [centre], rtol=1e-8)
        np.testing.assert_allclose(units.spread[unit], [[spread]], rtol=1e-8)
        np.testing.assert_allclose(units.slope[unit, 0], np.array(slopes) / spread, rtol=1e-6)


def test_the_order_of_units_and_rows_does_not_matter() -> None:
    model = counted(6)
    turned = np.random.default_rng(3).permutation(18)
    number = np.random.default_rng(4).permutation(6)
    arrays = {"group": number[model.arrays["group"][turned]], "y": model.arrays["y"][turned]}
    other = Model(counts, dataclasses.replace(model.dataset, arrays=arrays), charts=model.charts, chart="noncentred")
    reference = (np.array([0.8, -0.5]), 0.3 * np.eye(2), np.array([0.0]))
    (one,), (two,) = (set_up(which).summaries.at(*reference) for which in (model, other))
    np.testing.assert_allclose(two.packed[number], one.packed, atol=1e-9)


def three() -> Model:
    """Three units far apart, each with one row of heavy tails."""

    def heavy(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("unit", 3):
            z = numpyro.sample("z", dist.Normal(mu, 10.0))
            numpyro.sample("y", dist.Cauchy(z, 0.1), obs=y)

    return Model(heavy, Dataset("three", {"y": np.array([0.0, 4.0, -7.0])}))


def test_units_are_found_at_their_modes_from_tails_that_are_bent_upwards() -> None:
    model = three()
    y = model.arrays["y"]
    (units,) = set_up(model).summaries.at(np.zeros(1), 1e-6 * np.eye(1), np.array([3.0]))
    np.testing.assert_allclose(units.centre[:, 0], y, atol=1e-3)  # the prior pulls by about 0.1^2 / 2 * 7 / 10^2
    # At the mode the Cauchy's curvature is 2 / 0.1^2, and the prior's 1 / 10^2.
    np.testing.assert_allclose(units.spread[:, 0, 0], (200 + 0.01) ** -0.5, rtol=1e-4)
    np.testing.assert_allclose(gradient_at(model, np.concatenate([[0.0], units.centre[:, 0]]))[1:], 0, atol=1e-6)
    assert (units.left < 1e-12).all()


def gradient_at(model: Model, vector: np.ndarray) -> np.ndarray:
    space = latent_space(model, model.chart)
    with jax.enable_x64(True):
        density = jax.grad(lambda at: model.log_density(space.unravel(at), model.arrays, model.chart))
        return np.asarray(density(jnp.asarray(vector)))


def test_a_unit_at_a_kink_of_its_density_is_at_its_mode() -> None:
    def lasso(y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("unit", 3):
            z = numpyro.sample("z", dist.Laplace(mu, 0.5))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    model = Model(lasso, Dataset("three", {"y": np.array([0.5, 1.0, 5.0])}))
    (units,) = set_up(model).summaries.at(np.zeros(1), 1e-6 * np.eye(1), np.array([3.0]))
    np.testing.assert_allclose(units.centre[:, 0], [0, 0, 3], atol=1e-4)  # shrunk by 2
    assert (units.left < 1e-12).all()


def test_without_shared_coordinates_each_unit_has_its_own_gaussian() -> None:
    def rates(y: Any) -> None:
        with numpyro.plate("unit", 5):
            rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
            numpyro.sample("y", dist.Poisson(rate), obs=y)

    y = np.array([1, 3, 0, 2, 8])
    fitted = fit(Model(rates, Dataset("five", {"y": y})), "amortised", key=KEY, starts=2)
    assert fitted.status is Status.ARRIVED
    evidence = float(dist.GammaPoisson(2.0, 1.0).log_prob(y).sum())
    # Log rates are skewed: a Gaussian lacks about 1 / (12 (y + 2)) nats for each.
    assert 0 < evidence - fitted.elbo.value + 5 * fitted.elbo.se < 2 * (1 / (12 * (y + 2))).sum()


# -- the family, as solvers see it ------------------------------------------------------------------------------------


@functools.cache
def family() -> tuple[LogDensity, Amortised, np.ndarray]:
    model = counted(6)
    density = LogDensity(model)
    guide = set_up(model)
    with jax.enable_x64(True):
        frame = Frame.of(np.full(density.size, 0.2), 4 * np.eye(density.size) + 0.5)
        made = Amortised(frame, guide)
    return density, made, 0.2 * np.random.default_rng(5).standard_normal(made.parameters)


def test_gradients_are_those_of_differences() -> None:
    density, made, x = family()
    precision = np.eye(made.size) + 0.1
    quadratic = Quadratic(np.zeros(made.size), np.ones(made.size), precision)
    objective = FixedDrawsELBO(density, made, quadratic, matched_draws(64, made.base, key=KEY))
    along = np.random.default_rng(6).standard_normal(made.parameters)
    for value in (objective, lambda at: made.exact(at, made.member(at), quadratic)):
        step = 1e-5
        slope = (value(x + step * along)[0] - value(x - step * along)[0]) / (2 * step)
        assert slope == pytest.approx(value(x)[1] @ along, rel=1e-6)


def test_parameters_lead_to_a_member_and_back() -> None:
    _, made, x = family()
    member = made.member(x)
    np.testing.assert_allclose(made.near(member), x, atol=1e-10)
    np.testing.assert_allclose(made.points(member, np.zeros((1, made.base)))[0], member.loc)
    base = np.random.default_rng(7).standard_normal((3, made.base))
    apart = made.points(member, base) - member.loc
    np.testing.assert_allclose(made.scores(member, base), np.linalg.solve(member.covariance(), apart.T).T, atol=1e-9)
    with pytest.raises(ValueError, match="Expected a Gaussian with amortised branches around this reference"):
        made.near(Member(member.loc, factor=member.factor))


def test_the_known_curvature_is_that_of_a_gaussian_posterior() -> None:
    model = conjugate()
    mean, precision, _ = exact("plain")
    with jax.enable_x64(True):
        made = Amortised(Frame.of(mean, precision), set_up(model, hidden=0))
    zero = np.zeros(made.parameters)
    quadratic = Quadratic(mean, np.zeros(len(mean)), precision)
    bent = made.bend(zero, quadratic)
    shifts = made.parameters - len(bent)
    assert shifts == made.shared
    step = 1e-4
    for k in range(0, len(bent), 7):
        along = step * np.eye(made.parameters)[shifts + k]
        slopes = [made.exact(at, made.member(at), quadratic)[1] for at in (along, -along)]
        np.testing.assert_allclose((slopes[1] - slopes[0])[shifts:] / (2 * step), bent[k], atol=1e-5)


def test_branches_are_coupled_whatever_given_blocks_say() -> None:
    model = counted(6)
    apart = plate_blocks(model, coupled=False)
    assert set_up(model, structure=apart).blocks.words == plate_blocks(model).words


def test_parameters_do_not_grow_with_units() -> None:
    small, large = (set_up(counted(groups)) for groups in (6, 40))
    assert len(small.begin) == len(large.begin) == Branch(1, 2, 2).weights
    free = 2 + 3 + Branch(1, 2, 2).weights
    assert f"{free} parameters for any number of units" in small.words
    assert fit_of("amortised").why.endswith(fit_of("amortised").autoguide.words)


# -- fits -------------------------------------------------------------------------------------------------------------


@functools.cache
def fit_of(name: str, groups: int = 12) -> Fit:
    return fit(counted_once(groups), name, key=KEY)


@functools.cache
def counted_once(groups: int) -> Model:
    return counted(groups, seed=2)


def test_counts_lie_between_blocks_and_coupled() -> None:
    blocks, amortised, coupled = (fit_of(name) for name in ("blocks", "amortised", "coupled"))
    assert amortised.status is Status.ARRIVED
    assert amortised.certificate is not None
    noise = 5 * np.hypot(amortised.elbo.se, coupled.elbo.se)
    assert amortised.elbo.value < coupled.elbo.value + noise + coupled.gap_limit
    assert amortised.elbo.value > blocks.elbo.value + 0.3
    assert coupled.elbo.value - amortised.elbo.value < 0.1 + noise


def robust(group: Any, groups: int, y: Any = None) -> None:
    """Student's t: a unit's density is bent upwards wherever it is far from its rows."""
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    sd = numpyro.sample("sd", dist.HalfNormal(5))
    with numpyro.plate("group", groups):
        effect = numpyro.sample("effect", dist.Normal(mu, sd))
    with numpyro.plate("row", len(group)):
        numpyro.sample("y", dist.StudentT(4.0, effect[group], 0.3), obs=y)


@functools.cache
def heavy_tailed() -> Model:
    rng, groups = np.random.default_rng(0), 12
    group = np.repeat(np.arange(groups), 5)
    y = rng.normal(0, 4, groups)[group] + 0.3 * rng.standard_t(4, 60)
    return Model(robust, Dataset("robust", {"group": group, "y": y}, static={"groups": groups}))


def test_units_far_apart_with_heavy_tails_cost_no_more_than_others() -> None:
    amortised, coupled = (fit(heavy_tailed(), name, key=KEY, starts=2) for name in ("amortised", "coupled"))
    assert amortised.status is coupled.status is Status.ARRIVED
    noise = 5 * np.hypot(amortised.elbo.se, coupled.elbo.se)
    assert coupled.elbo.value - amortised.elbo.value < 0.1 + noise


def test_units_that_are_not_at_their_modes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    known = fit_of("amortised")
    monkeypatch.setattr("toolkit.variational.unit_summaries._STEPS", 0)
    for made in (fit(counted(6), "amortised", key=KEY, starts=1), fit(known.model, carried(known), key=KEY)):
        assert made.status is Status.AWAY
        assert re.search("of (6|12) units were not found at their modes, from which another step prom", made.message)
    little = known.params | {"auto_units_left_0": np.full(12, 0.1)}
    assert with_units(known.autoguide, little, Status.ARRIVED, "") == (
        Status.UNPROVEN,
        "12 of 12 units were not found at their modes, from which another step promised 1.2 nats",
    )
    assert with_units(known.autoguide, little, Status.FLAT, "level") == (Status.FLAT, "level")


@pytest.mark.slow
def test_numpyros_svi_fits_it_too() -> None:
    amortised = fit(three(), "amortised", key=KEY, solver="svi", starts=1, max_gradients=2_000)
    assert amortised.solver == "svi"
    assert amortised.status.has_optimum
    assert np.isfinite(amortised.elbo.value)


@pytest.mark.slow
def test_the_fits_own_density_is_that_of_its_draws() -> None:
    amortised = fit_of("amortised")
    weights = amortised.log_weights(jax.random.PRNGKey(3), 2_000)
    assert abs(weights.mean() - amortised.elbo.value) < 5 * (weights.std() / 2_000**0.5 + amortised.elbo.se)
    form = gaussian_form(amortised.autoguide, latent_space(amortised.model))
    member = form.member(amortised.params)
    posterior = amortised.autoguide.get_posterior(amortised.params)
    np.testing.assert_allclose(posterior.covariance_matrix, member.covariance(), rtol=1e-5, atol=1e-6)
    median = amortised.autoguide.median(amortised.params)
    np.testing.assert_allclose(
        np.exp(member.loc[latent_space(amortised.model).names.index("sd")]), median["sd"], rtol=1e-5
    )


def test_larger_families_are_not_left_below_it() -> None:
    amortised = fit_of("amortised")
    larger = fit(amortised.model, "coupled", key=KEY, smaller=[amortised])
    assert larger.elbo.value > amortised.elbo.value - 5 * np.hypot(larger.elbo.se, amortised.elbo.se)
    for name in ("coupled", "full_rank"):
        assert contains(GUIDES[name], GUIDES["amortised"], amortised.model)
    assert not contains(GUIDES["amortised"], GUIDES["blocks"], amortised.model)


def test_a_kept_fit_is_the_same(tmp_path: Any) -> None:
    amortised = fit_of("amortised")
    storage = Storage(tmp_path)
    keep_fit(storage, "one", amortised)
    back = kept_fit(storage, "one", amortised.model, amortised.guide)
    assert back is not None
    for name, values in amortised.draw(KEY, 5).items():
        np.testing.assert_array_equal(back.draw(KEY, 5)[name], values)


def test_without_units_it_is_the_full_rank() -> None:
    def pair(y: Any) -> None:
        a = numpyro.sample("a", dist.Normal(0, 1))
        b = numpyro.sample("b", dist.Normal(a, 1))
        numpyro.sample("y", dist.Normal(a + b, 0.5), obs=y)

    fitted = fit(Model(pair, Dataset("one", {"y": np.array(1.5)})), "amortised", key=KEY)
    evidence = float(dist.Normal(0, (4 + 1 + 0.25) ** 0.5).log_prob(1.5))
    assert fitted.elbo.value == pytest.approx(evidence, abs=1e-4)


@pytest.mark.slow
def test_svi_moves_the_free_parameters_alone() -> None:
    model = counted_once(12)
    guide = AutoAmortisedNormal(model.bound(), init_scale=0.3)
    svi = SVI(model.bound(), guide, optax.adam(0.02), StickTheLandingELBO(8))
    with jax.enable_x64(True):
        state = svi.init(KEY, **model.arrays)
        before = svi.get_params(state)
        done = svi.run(KEY, 1_000, progress_bar=False, init_state=state, **model.arrays)
    for name, value in before.items():
        held = "reference" in name or "units" in name or "features" in name
        assert held == bool(np.array_equal(done.params[name], value)), name
    best = fit_of("amortised").elbo.value
    assert abs(-float(np.mean(done.losses[-200:])) - best) < 0.5


# -- units that were not there ----------------------------------------------------------------------------------------


@functools.cache
def grouped(groups: int) -> Model:
    whole = hierarchical_regression.simulate(jax.random.PRNGKey(2), groups=30, rows_per_group=5)
    rows = whole.arrays["group"][:, 0] < groups
    per_row = ("common", "varying", "group", "offset", "response")
    arrays = {name: value[rows] if name in per_row else value for name, value in whole.arrays.items()}
    (grouping,) = whole.static["groupings"]
    static = {**whole.static, "groupings": (dataclasses.replace(grouping, groups=groups),)}
    return hierarchical_regression.model(Dataset(f"of_{groups}", arrays, static=static))


@functools.cache
def panel() -> tuple[Fit, Fit, Fit]:
    """A fit to 29 groups, the same carried to 30, and one to 30."""
    known = fit(grouped(29), "amortised", key=KEY)
    return known, fit(grouped(30), carried(known), key=KEY), fit(grouped(30), "amortised", key=KEY)


@pytest.mark.slow
def test_a_new_group_has_the_branch_that_a_new_fit_would_give_it() -> None:
    known, with_new, anew = panel()
    assert with_new.status is Status.ARRIVED
    # Twelve values of the shared coordinates and a step or two at each, of five gradients' worth.
    assert 0 < with_new.cost.gradient_evaluations < 500 < known.cost.gradient_evaluations / 10
    lacks = anew.elbo.value - with_new.elbo.value
    # A group more of 30 moves q(shared) by a few hundredths of a nat; everything else is amortised.
    assert -5 * np.hypot(anew.elbo.se, with_new.elbo.se) < lacks < 0.3
    one, other = (member_of(fitted) for fitted in (with_new, anew))
    last = np.array(anew.autoguide.blocks.order[-2:])
    sds = np.sqrt(other.variances[last])
    np.testing.assert_allclose((one.loc[last] - other.loc[last]) / sds, 0, atol=0.1)
    np.testing.assert_allclose(np.sqrt(one.variances[last]) / sds, 1, atol=0.05)


def member_of(fitted: Fit) -> Member:
    form = gaussian_form(fitted.autoguide, latent_space(fitted.model))
    assert form is not None
    return form.member(fitted.params)


def test_carried_to_its_own_data_a_fit_is_itself() -> None:
    known = fit_of("amortised")
    again = fit(known.model, carried(known), key=KEY)
    np.testing.assert_allclose(member_of(again).covariance(), member_of(known).covariance(), atol=1e-9)
    assert again.why.startswith(
        "nothing is fitted: shared coordinates and function are those of the fit to 'counts_12'"
    )
    assert f"there at most {known.gap_limit:.2g} nats from its best" in again.why


def test_a_fit_is_carried_to_one_unit() -> None:
    single = counted(1, seed=5)
    alone = fit(single, carried(fit_of("amortised")), key=KEY)
    assert alone.autoguide.blocks.words == (
        "1 block of 1 along 'group' (effect_decentered); 2 shared coordinates coupled to all"
    )
    assert np.isfinite(alone.elbo.value)


@pytest.mark.parametrize("ended", [Status.UNPROVEN, Status.BUDGET, Status.BELOW_SMALLER_FAMILY])
def test_how_the_fit_ended_is_inherited(ended: Status) -> None:
    known = dataclasses.replace(fit_of("amortised"), status=ended, message="up to 3 nats")
    again = fit(known.model, carried(known), key=KEY, elbo_draws=100)
    assert again.status is ended
    assert again.message == "inherited from the fit to 'counts_12': up to 3 nats"


def swapped(group: Any, groups: int, y: Any = None) -> None:
    """`counts` with its shared sites in the other order."""
    sd = numpyro.sample("sd", dist.HalfNormal(1))
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    with numpyro.plate("group", groups):
        effect = numpyro.sample("effect", dist.Normal(mu, sd))
    numpyro.sample("y", dist.Poisson(jnp.exp(effect[group])).to_event(1), obs=y)


def bounded(group: Any, groups: int, y: Any = None) -> None:
    """`counts` with a shared site of another support."""
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    sd = numpyro.sample("sd", dist.Uniform(0, 3))
    with numpyro.plate("group", groups):
        effect = numpyro.sample("effect", dist.Normal(mu, sd))
    numpyro.sample("y", dist.Poisson(jnp.exp(effect[group])).to_event(1), obs=y)


def vectors(group: Any, groups: int, y: Any = None) -> None:
    """`counts` with two numbers for each unit."""
    mu = numpyro.sample("mu", dist.Normal(1, 1))
    sd = numpyro.sample("sd", dist.HalfNormal(1))
    with numpyro.plate("group", groups):
        effect = numpyro.sample("effect", dist.Normal(mu, sd).expand([2]).to_event(1))
    numpyro.sample("y", dist.Poisson(jnp.exp(effect.sum(-1)[group])).to_event(1), obs=y)


def test_what_cannot_be_carried_is_told() -> None:
    known = fit_of("amortised")
    wanted = "Expected a fit of 'amortised' that has parameters and an optimum; got one of"
    with pytest.raises(ValueError, match=f"{wanted} 'blocks'"):
        carried(fit_of("blocks"))
    with pytest.raises(ValueError, match=f"{wanted} 'amortised', location or scale grow without end"):
        carried(dataclasses.replace(known, status=Status.IMPROPER))
    with pytest.raises(
        ValueError, match="Expected a model with the structure of the fit, 12 blocks of 1 along 'group'"
    ):
        fit(grouped(29), dataclasses.replace(carried(known), chart=None), key=KEY)
    with pytest.raises(
        ValueError,
        match="Expected other data of the model that was fitted, with 12 blocks of 1 .*; got a model without",
    ):
        fit(three(), dataclasses.replace(carried(known), chart=None), key=KEY)
    arrays = counted(6)
    like = set_up(Model(counts, arrays.dataset))
    structure = "Expected a model with the structure of the fit, 6 blocks of 1 along 'group' .effect.; 2 shared"
    for program, told in {
        swapped: "whose coordinate 1 is mu in Real.*got .*, and sd in Positive",
        bounded: "whose coordinate 2 is sd in Positive.*got .*, and sd in Interval.lower_bound=0, upper_bound=3",
        vectors: "whose coordinate 3 is effect.0. of each unit along 'group', in _?Real; got .*, and effect.0, 0. of",
    }.items():
        with pytest.raises(ValueError, match=f"{structure}.*{told}.*: carry a fit to data of its own model and chart"):
            set_up(Model(program, arrays.dataset), like=like)


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="Expected hidden to be 0 or more; got -1"):
        AutoAmortisedNormal(counts, hidden=-1)
    with pytest.raises(
        ValueError, match="Expected structure to be a Blocks, since branches are coupled to all .*'blocks'"
    ):
        AutoAmortisedNormal(counts, structure="blocks")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="groups"):
        AutoAmortisedNormal(counts, groups=[("mu", "sd")])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="Expected like, or else structure or along; got both"):
        AutoAmortisedNormal(counts, like=set_up(counted(6)), along=["group"])
    with pytest.raises(ValueError, match="Expected at most 1,500 dimensions for amortised branches, .*; got 1,502"):
        set_up(counted(1_500), along=["group"])
    form = gaussian_form(fit_of("amortised").autoguide, latent_space(fit_of("amortised").model))
    with pytest.raises(ValueError, match="Expected a Gaussian with amortised branches; got another"):
        form.params(Member(np.zeros(14), factor=np.eye(14)))
