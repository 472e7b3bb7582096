"""Minibatches: on average the model, refused where they are not, and fits that end where those on all rows do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import potential_energy

from toolkit import Dataset, Model, Status, fit
from toolkit.modelling.space import latent_space
from toolkit.variational.guides import find_guide
from toolkit.variational.minibatches import Minibatch, find_minibatch
from toolkit.variational.objectives import StickTheLandingELBO
from toolkit.variational.starts import find_starts
from toolkit.variational.stochastic_fits import prepare

KEY = jax.random.PRNGKey(0)
ROWS = 1_000


def logistic(x, weight, y=None):
    a = numpyro.sample("a", dist.Normal(0, 2))
    b = numpyro.sample("b", dist.Normal(0, weight).to_event(1))
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=a + x @ b), obs=y)


def data(rows: int = ROWS) -> Dataset:
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, 3))
    y = random.binomial(1, 1 / (1 + np.exp(-(0.3 + x @ [1.0, -0.5, 0.2]))))
    return Dataset("simulated", {"x": x, "y": y, "weight": np.array([1.0, 2.0, 3.0])})


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(logistic, data())


def density_of(model: Model, minibatch: Minibatch, rows: np.ndarray, loc: np.ndarray) -> float:
    space = latent_space(model)
    with jax.enable_x64(True):
        taken = minibatch.taken(rows, model.arrays)
        return -float(potential_energy(minibatch.scaled(model.bound()), (), taken, space.unravel(loc)))


def test_the_plate_and_its_arrays_are_found(model: Model) -> None:
    found = find_minibatch(model, 100)
    assert (found.plate, found.rows, found.size) == ("row", ROWS, 100)
    assert set(found.arrays) == {"x", "y"}
    assert found.words == "minibatches of 100 of 1,000 rows (plate 'row')"


def test_batches_have_the_density_as_their_mean_and_the_likelihood_counts_as_all_rows(model: Model) -> None:
    minibatch, loc = find_minibatch(model, 250), np.array([0.1, 0.4, -0.2, 0.3])
    with jax.enable_x64(True):
        whole = float(model.log_density(latent_space(model).unravel(loc), model.arrays))
    parts = [density_of(model, minibatch, np.arange(i, i + 250), loc) for i in range(0, ROWS, 250)]
    assert np.mean(parts) == pytest.approx(whole, rel=1e-12)
    assert np.std(parts) > 1.0  # each of them is only right on average
    assert density_of(model, minibatch, np.arange(ROWS), loc) == pytest.approx(whole, rel=1e-12)


def test_drawn_batches_have_no_row_twice_and_all_rows_alike(model: Model) -> None:
    minibatch = find_minibatch(model, 300)
    arrays = {"x": np.arange(ROWS), "y": np.arange(ROWS), "weight": np.zeros(3)}
    given = jax.tree.map(jnp.asarray, {"arrays": arrays, "order": minibatch.order()})
    drawn = jax.jit(lambda key: minibatch.seen(key, given)["arrays"])
    counts = np.zeros(ROWS)
    for key in jax.random.split(KEY, 400):
        batch = drawn(key)
        assert (np.asarray(batch["x"]) == np.asarray(batch["y"])).all()
        assert len(np.unique(batch["x"])) == 300
        assert batch["weight"].shape == (3,)
        counts[np.asarray(batch["x"])] += 1
    # Each count is binomial with mean 120 and sd 9.2.
    assert abs(counts - 120).max() < 6 * 9.2


@pytest.mark.slow
def test_the_gradient_of_the_loss_is_right_on_average(model: Model) -> None:
    """Of the guide's own draw, over all windows of the rows, to rounding: the loss that SVI climbs is unbiased."""
    minibatch = Minibatch(60, ROWS, "row", ("x", "y"))
    guide = AutoNormal(model.bound())
    loss = StickTheLandingELBO(2)
    with jax.enable_x64(True):
        svi = SVI(model.bound(), guide, optax.sgd(0.1), loss)
        params = svi.get_params(svi.init(KEY, **model.arrays))
        order, arrays = minibatch.order(), jax.tree.map(jnp.asarray, model.arrays)

        def gradient(program, arrays):
            return jax.grad(lambda given: loss.loss(KEY, given, program, guide, **arrays))(params)

        whole = jax.jit(lambda: gradient(model.bound(), model.arrays))()
        windows = (np.arange(ROWS)[:, None] + np.arange(60)) % ROWS

        def window(rows):
            return gradient(minibatch.scaled(model.bound()), minibatch.taken(rows, arrays))

        each = jax.jit(lambda rows: jax.lax.map(window, rows))(order[windows])
    for name, value in whole.items():
        assert np.asarray(each[name]).mean(0) == pytest.approx(np.asarray(value), rel=1e-9, abs=1e-9)
        assert np.asarray(each[name]).std(0).max() > 0.1  # none of them alone is


@pytest.mark.parametrize("size", [100, 300, ROWS])  # 300 leaves a remainder
def test_a_sum_over_rows_passes(model: Model, size: int) -> None:
    find_minibatch(model, size).verify(model, "plain", latent_space(model), np.full(4, 0.2))


def centred_model() -> Model:
    """A regression on what is left of x when its mean over all rows is taken out: no sum over rows."""

    def centred(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("row", len(x)):
            numpyro.sample("y", dist.Normal(b * (x - x.mean()), 1.0), obs=y)

    random = np.random.default_rng(1)
    return Model(centred, Dataset("centred", {"x": random.normal(size=90), "y": random.normal(size=90)}))


def test_a_density_that_is_no_sum_over_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="to be a sum over plate 'row'"):
        fit(centred_model(), "mean_field", key=KEY, minibatch=30)


@pytest.mark.parametrize("size", [30, 90])
def test_rows_that_go_by_their_place_are_refused(size: int) -> None:
    def trend(y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("row", len(y)) as place:
            numpyro.sample("y", dist.Normal(b * place / 90, 1.0), obs=y)

    model = Model(trend, Dataset("trend", {"y": np.random.default_rng(1).normal(size=90)}))
    with pytest.raises(ValueError, match="each row on its own entries"):
        fit(model, "mean_field", key=KEY, minibatch=size)


def test_an_effect_that_vanishes_at_the_point_is_seen_in_the_gradient() -> None:
    model = centred_model()
    with pytest.raises(ValueError, match="to be a sum over plate 'row'"):
        find_minibatch(model, 30).verify(model, "plain", latent_space(model), np.zeros(1))


def test_a_minibatch_may_name_its_arrays() -> None:
    """An array of the groups has as many entries as there are rows, and must not be cut."""

    def grouped(x, known, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1).expand([2]).to_event(1))
        numpyro.factor("of_groups", -0.5 * ((b - known[:2]) ** 2).sum())
        with numpyro.plate("row", len(x)):
            numpyro.sample("y", dist.Normal(b[0] + b[1] * x, 1.0), obs=y)

    random = np.random.default_rng(1)
    model = Model(grouped, Dataset("grouped", {name: random.normal(size=60) for name in ("x", "known", "y")}))
    with pytest.raises(ValueError, match="Name others with"):
        fit(model, "mean_field", key=KEY, minibatch=20)
    find_minibatch(model, Minibatch(20, 60, "row", ("x", "y"))).verify(
        model, "plain", latent_space(model), np.full(2, 0.3)
    )
    with pytest.raises(ValueError, match=r"of which arrays .* have one entry each"):
        fit(model, "mean_field", key=KEY, minibatch=Minibatch(20, 50, "row", ("x", "y")))


def test_guides_that_ask_for_the_density_are_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="that does not ask for the density itself"):
        fit(model, "dais", key=KEY, minibatch=100)


def test_a_plate_whose_size_is_not_the_arrays_is_told() -> None:
    def fixed(x, *, rows, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        with numpyro.plate("row", rows):
            numpyro.sample("y", dist.Normal(b * x, 1.0), obs=y)

    random = np.random.default_rng(1)
    arrays = {"x": random.normal(size=90), "y": random.normal(size=90)}
    with pytest.raises(ValueError, match=r"to run on 30 of its 90 rows.*let the size of plate 'row'"):
        fit(Model(fixed, Dataset("fixed", arrays, static={"rows": 90})), "mean_field", key=KEY, minibatch=30)


def test_rows_with_latents_of_their_own_are_refused() -> None:
    def local(y=None):
        with numpyro.plate("row", len(y)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ValueError, match="site z has a value for each row"):
        fit(Model(local, Dataset("local", {"y": np.zeros(50)})), "mean_field", key=KEY, minibatch=10)


def test_observations_without_a_plate_are_refused() -> None:
    def bare(x, y=None):
        b = numpyro.sample("b", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(b * x, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="put the observations in one `numpyro.plate`"):
        fit(Model(bare, Dataset("bare", {"x": np.ones(50), "y": np.ones(50)})), "mean_field", key=KEY, minibatch=10)


@pytest.mark.parametrize("size", [0, ROWS + 1])
def test_impossible_sizes_are_refused(model: Model, size: int) -> None:
    with pytest.raises(ValueError, match=f"minibatches of 1 to 1,000 rows of plate 'row'; got {size}"):
        fit(model, "mean_field", key=KEY, minibatch=size)


def test_other_solvers_take_no_minibatches(model: Model) -> None:
    with pytest.raises(ValueError, match="Expected solver 'svi' for minibatches"):
        fit(model, "mean_field", key=KEY, minibatch=100, solver="fixed_draws")


def test_programs_for_other_batches_are_refused(model: Model) -> None:
    prepared = prepare(model, find_guide("mean_field"), minibatch=find_minibatch(model, 50))
    with pytest.raises(ValueError, match="Expected what `prepare` gave"):
        fit(model, "mean_field", key=KEY, minibatch=100, prepared=prepared)


@pytest.mark.parametrize("guide", ["mean_field", pytest.param("full_rank", marks=pytest.mark.slow)])
def test_a_fit_by_minibatches_ends_where_the_one_by_all_rows_does(model: Model, guide: str) -> None:
    best = fit(model, guide, key=KEY)
    fitted = fit(model, guide, key=KEY, minibatch=100)
    assert fitted.status is Status.ARRIVED
    assert fitted.why.startswith("for minibatches of 100 of 1,000 rows")
    assert best.elbo
    assert fitted.elbo
    assert fitted.fresh_log_weights is not None
    # The ELBO and its weights are those of all rows; a batch's scatter by tens of nats.
    assert fitted.fresh_log_weights.std() < 3
    assert abs(fitted.elbo.value - best.elbo.value) < 0.1 + 4 * fitted.elbo.se
    # A step on a tenth of the rows counts as a tenth of a gradient.
    steps = fitted.traces[0].steps[-1]
    spent = fitted.cost.gradient_evaluations - 8 * steps * 0.1
    assert 0 < spent < 2_000  # the starts


def test_steps_on_minibatches_keep_to_the_budget_of_which_they_take_their_share(model: Model) -> None:
    """A block of 250 steps has 2,000 gradients, a tenth of which counts: two blocks can be paid for."""
    starts = find_starts(model, key=KEY, count=1)
    begun = starts.gradient_evaluations
    fitted = fit(model, "mean_field", key=KEY, minibatch=100, starts=starts, max_gradients=begun + 500)
    assert fitted.status is Status.BUDGET
    assert fitted.traces[0].steps.tolist() == [250, 500]
    assert fitted.cost.gradient_evaluations == begun + 400


@pytest.mark.slow
def test_a_guide_that_starts_decide_takes_minibatches(model: Model) -> None:
    fitted = fit(model, "laplace", key=KEY, minibatch=100)
    best = fit(model, "full_rank", key=KEY)
    assert fitted.elbo
    assert best.elbo
    assert abs(fitted.elbo.value - best.elbo.value) < 0.1 + 4 * fitted.elbo.se
