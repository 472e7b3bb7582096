"""A model's compiled log density: the right numbers, and no compilation that could be saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer.reparam import LocScaleReparam, Reparam

from toolkit import Dataset, Model, fit
from toolkit.modelling.space import latent_space
from toolkit.variational import density as densities
from toolkit.variational.density import LogDensity, central_differences, difference_steps

KEY = jax.random.PRNGKey(0)
_COMPILATION = "/jax/core/compile/backend_compile_duration"


def groups_of_rows(x: Any, group: Any, y: Any, count: int, heavy: bool = False) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 2))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("group", count):
        alpha = numpyro.sample("alpha", dist.Normal(mu, scale))
    loc = alpha[group] * x
    with numpyro.plate("row", len(x)):
        numpyro.sample("y", dist.StudentT(3.0, loc, 1.0) if heavy else dist.Normal(loc, 1.0), obs=y)


def rows_of(seed: int, rows: int = 12, **static: Any) -> Model:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(1, 1, rows), "group": np.arange(rows) % 3, "y": rng.normal(seed, 1, rows)}
    charts = {"noncentred": {"alpha": LocScaleReparam(0)}, "halfway": {"alpha": LocScaleReparam(0.5)}}
    return Model(groups_of_rows, Dataset(f"rows {seed}", arrays, static={"count": 3, **static}), charts=charts)


def several_normals(y: Any, count: int, heavy: bool = False) -> None:
    z = numpyro.sample("z", dist.Normal(0, 2).expand([count]).to_event(1))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.StudentT(3.0, z.sum(), 1.0) if heavy else dist.Normal(z.sum(), 1.0), obs=y)


def normals_of(seed: int, rows: int = 4, **static: Any) -> Model:
    """A model whose programs are ready soon, where what counts is whether they are made at all."""
    y = np.random.default_rng(seed).normal(seed, 1, rows)
    return Model(several_normals, Dataset(f"normals {seed}", {"y": y}, static={"count": 3, **static}))


def points_of(size: int, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size))


def expected_at(model: Model, points: np.ndarray, chart: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    space = latent_space(model, chart)

    def log_density(vector: Any) -> Any:
        return model.log_density(space.unravel(vector), model.arrays, chart)

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(log_density)))(jnp.asarray(points))
    return np.asarray(values), np.asarray(gradients)


def assert_same(model: Model, density: LogDensity, count: int = 5, chart: str | None = None) -> None:
    points = points_of(density.size, count)
    values, gradients = density.over(points)
    expected, slopes = expected_at(model, points, chart)
    np.testing.assert_allclose(values, expected, rtol=1e-11)
    np.testing.assert_allclose(gradients, slopes, rtol=1e-9, atol=1e-10)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test counts compilations from none, and other tests keep theirs."""
    monkeypatch.setattr(densities, "_programs", type(densities._programs)())


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the programs that XLA compiles, or reads from its cache, meanwhile."""
    seen: list[str] = []

    def note(event: str, _: float, **facts: Any) -> None:
        if event == _COMPILATION:
            seen.append(str(facts.get("fun_name", "?")))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.slow
def test_few_and_many_points_are_jaxs_own_value_and_gradient() -> None:
    model = rows_of(1)
    density = LogDensity(model)
    batch = next(iter(densities._programs.values())).batch
    assert density.compile_seconds > 0
    assert density.peak_bytes > 0
    few = densities._FEW
    for count in (0, 1, few - 1, few, few + 1, batch, batch + 1, batch + few, 2 * batch, 2 * batch + 3):
        assert_same(model, density, count)


def test_few_points_are_not_padded_to_a_whole_batch() -> None:
    density = LogDensity(rows_of(1))
    programs = next(iter(densities._programs.values()))
    called: list[int] = []

    def counted(program: Any) -> Any:
        return lambda points, arrays: called.append(len(points)) or program(points, arrays)

    assert programs.width == densities._FEW
    density._programs = dataclasses.replace(programs, few=counted(programs.few), many=counted(programs.many))
    density.over(points_of(density.size, 3))
    density.over(points_of(density.size, programs.batch + 10))
    assert called == [densities._FEW, programs.batch, densities._FEW, densities._FEW]


def test_tall_data_are_asked_for_one_point_at_a_time() -> None:
    """There a batch of eight takes eight times as long as a point, whether all eight are wanted or not."""
    density = LogDensity(rows_of(1, rows=200_000))
    assert next(iter(densities._programs.values())).width == 1
    assert_same(rows_of(1, rows=200_000), density, 3)


def test_a_points_numbers_do_not_depend_on_those_beside_it() -> None:
    density = LogDensity(rows_of(1))
    points = points_of(density.size, 10)
    values, gradients = density.over(points)
    bad = np.vstack([points, np.full((1, density.size), 1e200)])
    again, slopes = density.over(bad)
    np.testing.assert_array_equal(again[:10], values)
    np.testing.assert_array_equal(slopes[:10], gradients)
    assert not np.isfinite(again[10])


def test_central_differences_of_a_quadratic_are_exact_but_for_rounding() -> None:
    density = LogDensity(normals_of(1))
    loc = np.array([0.5, -30.0, 0.0])
    np.testing.assert_allclose(difference_steps(loc), [1e-4, 3e-3, 1e-4])
    # Three coordinates with a prior variance of 4, whose sum each of four rows sees with a variance of 1.
    hessian = -np.eye(3) / 4 - 4.0
    _, gradients = density.over(loc[None])
    for steps in (None, np.array([1e-4, 1e-3, 1e-2])):
        found, gradient = central_differences(density, loc, steps)
        # Gradients of about a hundred have rounding errors of a few hundred eps, divided by two steps of 1e-4.
        np.testing.assert_allclose(found, hessian, rtol=0, atol=1e4 * np.finfo(float).eps / 2e-4)
        np.testing.assert_allclose(gradient, gradients[0], rtol=1e-12)


def test_evaluations_count_the_points_that_were_asked_for() -> None:
    density = LogDensity(rows_of(1))
    assert density.evaluations == 0
    density.over(np.zeros((1, density.size)))
    density.over(np.zeros((7, density.size)))
    assert density.evaluations == 8


def test_float64_where_the_user_has_not_set_it() -> None:
    model = rows_of(1)
    expected = expected_at(model, points_of(5, 3))
    with jax.enable_x64(False):
        density = LogDensity(model)
        values, gradients = density.over(points_of(5, 3))
    assert values.dtype == gradients.dtype == np.float64
    np.testing.assert_allclose(values, expected[0], rtol=1e-11)
    np.testing.assert_allclose(gradients, expected[1], rtol=1e-9)


def test_other_data_of_the_same_shape_use_the_programs_that_are_there() -> None:
    first, second = rows_of(1), rows_of(2)
    one = LogDensity(first)
    with compilations() as seen:
        other = LogDensity(second)
        other.over(points_of(other.size, 5))
    assert seen == []
    assert one.compile_seconds > 0
    assert other.compile_seconds == 0
    assert other.peak_bytes == one.peak_bytes
    assert len(densities._programs) == 1
    assert_same(second, other)
    assert_same(first, one)
    point = points_of(one.size, 1)
    assert one.over(point)[0] != other.over(point)[0]  # the data count


@pytest.mark.parametrize(
    "change", [{"rows": 15}, {"heavy": True}, {"count": 4}], ids=["another_shape", "another_flag", "another_size"]
)
def test_another_shape_or_static_value_compiles_again(change: dict[str, Any]) -> None:
    plain, other = normals_of(1), normals_of(1, **change)
    first = LogDensity(plain)
    second = LogDensity(other)
    assert second.compile_seconds > 0
    assert len(densities._programs) == 2
    assert_same(other, second)
    assert_same(plain, first)
    assert LogDensity(normals_of(3, **change)).compile_seconds == 0
    assert LogDensity(normals_of(3)).compile_seconds == 0


def test_another_dtype_compiles_again() -> None:
    plain = normals_of(1)
    narrow = Model(several_normals, Dataset("narrow", {"y": np.arange(4, dtype=np.int32)}, static={"count": 3}))
    LogDensity(plain)
    second = LogDensity(narrow)
    assert second.compile_seconds > 0
    assert_same(narrow, second)


def test_another_callable_of_the_same_name_and_shapes_compiles_again() -> None:
    def make(scale: float) -> Model:
        def same_name(y: Any) -> None:
            z = numpyro.sample("z", dist.Normal(0, scale))
            numpyro.sample("y", dist.Normal(z, 1), obs=y)

        return Model(same_name, Dataset("one", {"y": np.array(0.5)}))

    models = make(1.0), make(3.0)
    made = [LogDensity(model) for model in models]
    assert made[1].compile_seconds > 0
    for model, density in zip(models, made, strict=True):
        assert_same(model, density)


def test_static_values_that_only_compare_equal_are_told_apart() -> None:
    def powered(y: Any, power: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.sample("y", dist.Normal(z, 1.0 if isinstance(power, int) else 2.0), obs=y)

    data = {"y": np.array(0.5)}
    models = [Model(powered, Dataset("one", data, static={"power": power})) for power in (1, 1.0, True)]
    assert [LogDensity(model).compile_seconds > 0 for model in models] == [True, True, True]
    for model in models:
        assert_same(model, LogDensity(model))


def test_charts_have_programs_of_their_own() -> None:
    model = rows_of(1)
    made = {chart: LogDensity(model, chart) for chart in ("plain", "noncentred", "halfway")}
    assert all(density.compile_seconds > 0 for density in made.values())
    for chart, density in made.items():
        assert density.space == latent_space(model, chart)
        assert_same(model, density, chart=chart)
    assert LogDensity(rows_of(2), "noncentred").compile_seconds == 0  # though its reparameteriser is another object


def two_groups(y: Any) -> None:
    loc = numpyro.sample("loc", dist.Normal(0, 2).expand([2]).to_event(1))
    with numpyro.plate("row", len(y)):
        group = numpyro.sample("group", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(loc[group], 1.0), obs=y)


def test_a_model_whose_discrete_sites_are_summed_out_compiles_once() -> None:
    first, second = (Model(two_groups, Dataset("two", {"y": np.array([0.5, y])})) for y in (1.0, -2.0))
    assert first.fn is not second.fn
    assert LogDensity(first).compile_seconds > 0
    density = LogDensity(second)
    assert density.compile_seconds == 0
    assert_same(second, density)


def test_programs_long_unused_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densities, "_KEPT", 2)
    sizes = (10, 11, 12)
    LogDensity(normals_of(1, rows=10))
    LogDensity(normals_of(1, rows=11))
    assert LogDensity(normals_of(1, rows=10)).compile_seconds == 0  # used last now
    LogDensity(normals_of(1, rows=12))
    assert len(densities._programs) == 2
    assert [LogDensity(normals_of(2, rows=rows)).compile_seconds > 0 for rows in sizes[::2]] == [False, False]
    assert LogDensity(normals_of(2, rows=11)).compile_seconds > 0


def test_a_model_with_many_scalars_takes_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rows_of(1)
    monkeypatch.setattr(densities, "_BATCH_SCALARS", 20 * 17)  # mu, scale, alpha and y make 17
    density = LogDensity(model)
    assert next(iter(densities._programs.values())).batch == 16
    assert_same(model, density, 37)


@pytest.mark.parametrize("name", ["mean_field", "full_rank"])
def test_a_second_fit_on_other_data_compiles_no_density(name: str) -> None:
    with compilations() as seen:
        first = fit(rows_of(1), name, key=KEY, starts=2)
    assert first.cost.compile_seconds > 0
    assert sum("log_density" in program for program in seen) == 2  # for one point and for many
    with compilations() as seen:
        second = fit(rows_of(2), name, key=jax.random.PRNGKey(5), starts=2, tolerance=0.5)
    assert second.cost.compile_seconds == 0
    assert len(densities._programs) == 1
    # What is left: one small program to draw starting points, one to constrain the guide's first location.
    assert not any("log_density" in program for program in seen)
    assert len(seen) <= 2
    assert second.status.ok
    assert second.elbo.value != first.elbo.value


def test_a_fit_of_another_family_compiles_no_density() -> None:
    model = rows_of(1)
    first = fit(model, "mean_field", key=KEY, starts=2)
    others = [fit(model, name, key=KEY, starts=2) for name in ("diagonal", "low_rank", "full_rank")]
    assert first.cost.compile_seconds > 0
    assert [other.cost.compile_seconds for other in others] == [0, 0, 0]
    assert len(densities._programs) == 1


def test_another_reparameteriser_of_the_same_name_compiles_again() -> None:
    def make(sd: float) -> Model:
        class Wider(Reparam):
            def __call__(self, name: str, fn: Any, obs: Any) -> tuple[Any, Any]:
                return dist.Normal(0.0, sd).expand(fn.shape()).to_event(fn.event_dim), obs

        rows = normals_of(1)
        return Model(several_normals, rows.dataset, charts={"wider": {"z": Wider()}})

    models = make(1.0), make(100.0)
    made = [LogDensity(model, "wider") for model in models]
    assert made[1].compile_seconds > 0
    point = points_of(made[0].size, 1)
    assert made[0].over(point)[0] != made[1].over(point)[0]
