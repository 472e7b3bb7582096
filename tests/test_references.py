"""The reference finds known posteriors, says so when it does not, and goes on where it was stopped."""

import gzip
import json
import signal
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
import xarray
from arviz_stats.base import array_stats
from numpyro.infer.reparam import LocScaleReparam

from toolkit import Dataset, Labels, Model, Status
from toolkit.sampling.diagnostics import Evidence, diagnose, judge
from toolkit.sampling.references import Reference, as_reference, load_reference, reference
from toolkit.storage import Storage

KEY = jax.random.PRNGKey(3)
MEAN, SD, RHO = np.array([1.0, -2.0]), np.array([0.01, 30.0]), 0.9
NOTHING = Dataset("nothing", {})


def gaussian() -> None:
    covariance = np.outer(SD, SD) * np.array([[1.0, RHO], [RHO, 1.0]])
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
    numpyro.factor("target", dist.MultivariateNormal(MEAN, covariance).log_prob(x))
    numpyro.deterministic("twice", 2 * x)


def two_modes(weight: float) -> None:
    x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    heights = jnp.log(jnp.array([1 - weight, weight]))
    numpyro.factor("target", jax.nn.logsumexp(heights + dist.Normal(jnp.array([-10.0, 10.0]), 0.5).log_prob(x)))


def schools(sigma: np.ndarray, y: np.ndarray | None = None) -> None:
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def impossible(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Uniform(10 + 0 * a, 11), obs=y)


def normal_mean(y: np.ndarray | None = None) -> None:
    m = numpyro.sample("m", dist.Normal(0, 1))
    numpyro.deterministic("square", m**2)
    numpyro.sample("y", dist.Normal(m, 1), obs=y)


EIGHT = Dataset(
    "eight_schools",
    {"sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]), "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12])},
)


def within(error: float, se: float) -> bool:
    return abs(error) < 5 * se


@pytest.fixture(scope="module")
def gauss() -> Reference:
    return reference(Model(gaussian, NOTHING), key=KEY, draws=1_500)


@pytest.fixture(scope="module")
def eight_schools() -> Model:
    return Model(schools, EIGHT, charts={"noncentred": {"theta": LocScaleReparam(0)}})


def test_nuts_finds_a_correlated_gaussian_of_very_unequal_scales(gauss: Reference) -> None:
    assert gauss.status is Status.PASSED
    assert gauss.reasons == ()
    assert (gauss.diagnostics[["ess_bulk", "ess_tail"]] >= 400).all(axis=None)  # the gate before any comparison
    x = gauss.draws["x"]
    assert x.shape == (4, 1_500, 2)
    assert x.dtype == np.float64
    for i in range(2):
        assert within(x[..., i].mean() - MEAN[i], array_stats.mcse(x[..., i], method="mean"))
        assert within(x[..., i].std() - SD[i], array_stats.mcse(x[..., i], method="sd"))
    product = np.prod((x - MEAN) / SD, axis=-1)
    assert within(product.mean() - RHO, array_stats.mcse(product, method="mean"))


def test_a_reference_says_all_about_itself(gauss: Reference) -> None:
    assert gauss.usable
    np.testing.assert_array_equal(gauss.draws["twice"], 2 * gauss.draws["x"])
    assert list(gauss.diagnostics.index) == ["x[0]", "x[1]", "twice[0]", "twice[1]"]
    assert gauss.origin == "NUTS, 4 chains x 1,500 draws after 1,000 warm-up"
    assert gauss.seed_text == "key 0 3"
    assert gauss.ebfmi is not None
    assert gauss.ebfmi.shape == (4,)
    assert gauss.energy is not None
    assert gauss.energy.shape == (4, 1_500)
    assert gauss.cost.gradient_evaluations >= 4 * 2_500
    assert gauss.cost.compile_seconds > 0
    assert gauss.cost.run_seconds > 0
    assert gauss.cost.peak_bytes > 0
    assert "in [-2, 2]" in gauss.methods


def test_the_log_density_is_the_models_own_at_the_draws(gauss: Reference) -> None:
    density = jax.vmap(lambda x: gauss.model.log_density({"x": x}, {}))(gauss.draws["x"].reshape(-1, 2))
    # Exact up to rounding: the values pass through a quadratic form of size 1e4 in float64.
    np.testing.assert_allclose(np.ravel(gauss.log_density), density, rtol=0, atol=1e-8)


def test_chains_start_apart_and_differ(gauss: Reference) -> None:
    assert len(np.unique(gauss.draws["x"][:, -1, 0])) == 4


def test_few_draws_are_called_few() -> None:
    # Two long chains rather than four short ones, whose R-hat would lie near its own limit.
    few = reference(Model(gaussian, NOTHING), key=jax.random.PRNGKey(1), chains=2, draws=600, target_accept=0.8)
    assert few.status is Status.FEW_DRAWS
    assert not few.status.ok
    assert few.usable
    assert any(reason.startswith("The bulk ESS is ") and "(Vehtari et al. 2021)" in reason for reason in few.reasons)


def half_flat(y: np.ndarray) -> None:
    held = numpyro.sample("held", dist.Normal(0, 1))
    numpyro.sample("free", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.sample("y", dist.Normal(held, 1), obs=y)


def test_where_the_checks_fail_a_flat_prior_is_named() -> None:
    walk = reference(Model(half_flat, Dataset("one", {"y": np.array(0.0)})), key=KEY, chains=2, warmup=50, draws=50)
    assert not walk.status.ok
    assert walk.reasons[-1].startswith("The prior of free is flat: the posterior is improper if the data do not hold")


@pytest.mark.parametrize(("weight", "modes"), [(0.5, False), (0.001, True)])
def test_chains_in_two_modes_are_caught(weight: float, modes: bool) -> None:
    model = Model(two_modes, Dataset("weight", {"weight": np.array(weight)}))
    stuck = reference(model, key=jax.random.PRNGKey(0), warmup=300, draws=300)
    sides = np.sign(stuck.draws["x"][:, -1])
    assert set(sides) == {-1.0, 1.0}  # else this seed tests nothing
    assert stuck.status is Status.RHAT
    assert stuck.reasons[0].startswith("R-hat is ")
    assert any("the chains sit in different modes" in reason for reason in stuck.reasons) is modes


@pytest.mark.slow
def test_the_centred_funnel_diverges_and_the_other_chart_passes(eight_schools: Model) -> None:
    centred = reference(eight_schools, key=jax.random.PRNGKey(1))
    assert centred.divergences > 0
    assert not centred.status.ok
    assert any(f"{centred.divergences:,} of 4,000 transitions diverged" in reason for reason in centred.reasons)
    other = reference(eight_schools, key=jax.random.PRNGKey(1), chart="noncentred", target_accept=0.95)
    assert other.status is Status.PASSED, other.reasons
    assert other.chart == "noncentred"
    assert set(other.draws) == {"mu", "tau", "theta"}
    assert other.draws["theta"].shape == (4, 1_000, 8)


def test_no_valid_start_names_the_site() -> None:
    none = reference(Model(impossible, Dataset("d", {"y": np.arange(3.0)})), key=KEY)
    assert none.status is Status.NO_VALID_START
    assert not none.usable
    (reason,) = none.reasons
    assert reason.startswith("Chain ")
    assert "found no point with a finite density and gradient in 100 tries; at the last site 'y' has a log " in reason


@pytest.mark.slow
def test_stored_work_is_taken_up_bit_for_bit(tmp_path: Path) -> None:
    model = Model(gaussian, NOTHING)
    plain = reference(model, key=KEY, warmup=150, draws=130)
    storage = Storage(tmp_path)
    first = reference(model, key=KEY, warmup=150, draws=130, storage=storage)
    chains = sorted((tmp_path / "chain").iterdir())
    assert len(chains) == 4
    (entry,) = (tmp_path / "reference").iterdir()
    from_storage = reference(model, key=KEY, warmup=150, draws=130, storage=storage)
    entry.unlink()
    chains[1].unlink()
    chains[2].write_bytes(chains[2].read_bytes()[:500])
    resumed = reference(model, key=KEY, warmup=150, draws=130, storage=storage)
    assert len(storage.damaged) == 1
    for other in (first, from_storage, resumed):
        assert set(other.draws) == set(plain.draws)
        assert all(np.array_equal(other.draws[site], plain.draws[site]) for site in plain.draws)
        np.testing.assert_array_equal(other.energy, plain.energy)
        pd.testing.assert_frame_equal(other.diagnostics, plain.diagnostics)
        assert (other.status, other.reasons) == (plain.status, plain.reasons)
        assert other.cost.gradient_evaluations == plain.cost.gradient_evaluations
    assert from_storage.cost == first.cost


@pytest.mark.slow
def test_other_labels_take_the_stored_draws_under_their_own_names(tmp_path: Path) -> None:
    storage, options = Storage(tmp_path), {"key": KEY, "chains": 2, "warmup": 100, "draws": 100}
    for names in (["a", "b"], ["b", "c"]):
        coords = {"x_dim_0": np.array(names), "twice_dim_0": np.array(names)}
        made = reference(Model(gaussian, Dataset("nothing", {}, coords=coords)), storage=storage, **options)
        assert list(made.diagnostics.index) == [f"{site}[{name}]" for site in ("x", "twice") for name in names]
        assert not made.stored
    assert len(list((tmp_path / "chain").iterdir())) == 2


def test_ctrl_c_stops_all_chains_and_the_next_run_goes_on(tmp_path: Path) -> None:
    model, storage, seen = Model(gaussian, NOTHING), Storage(tmp_path), []

    def interrupt(stage: str, done: int, total: int, text: str) -> None:
        seen.append((stage, done, total, text))
        signal.raise_signal(signal.SIGINT)

    # A shell's background job ignores the signal, and Python then leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            reference(model, key=KEY, warmup=100, draws=20_000, storage=storage, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list(tmp_path.glob("chain/*"))) < 4
    ((stage, done, total, text),) = seen
    assert stage == "reference"
    assert 0 < done < total == 4 * 20_100
    assert text.startswith("chain ")


def test_progress_counts_every_transition() -> None:
    events: list[tuple[str, int, int, str]] = []
    reference(Model(gaussian, NOTHING), key=KEY, warmup=30, draws=300, progress=lambda *event: events.append(event))
    done = [event[1] for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1][2] == 4 * 330
    assert {event[3].split(", ")[0] for event in events} == {f"chain {i} of 4" for i in (1, 2, 3, 4)}


def _conjugate(exact: bool) -> Model:
    y = np.array([0.5, 2.0, 1.0])
    mean, sd = y.sum() / 4, 0.5

    def draw(key: jax.Array, draws: int) -> dict[str, jax.Array]:
        return {"m": mean + sd * jax.random.normal(key, (draws,))}

    return Model(normal_mean, Dataset("d", {"y": y}), exact=draw if exact else None)


def test_a_known_posterior_is_the_reference_and_nuts_agrees_with_it() -> None:
    exact = reference(_conjugate(True), key=KEY, draws=2_000)
    assert exact.status is Status.EXACT
    assert exact.origin == "8,000 exact draws"
    np.testing.assert_allclose(exact.draws["square"], exact.draws["m"] ** 2, rtol=1e-15)
    nuts = reference(_conjugate(True), key=jax.random.key(5), draws=2_000, force=True)
    assert nuts.status is Status.PASSED
    for method, statistic in {"mean": np.mean, "sd": np.std}.items():
        ses = [array_stats.mcse(made.draws["m"], method=method) for made in (exact, nuts)]
        assert within(statistic(exact.draws["m"]) - statistic(nuts.draws["m"]), float(np.hypot(*ses)))


def two_rates(y: np.ndarray | None = None) -> None:
    with numpyro.plate("label", 2):
        m = numpyro.sample("m", dist.Normal(0, 10))
    numpyro.factor("target", jax.nn.logsumexp(dist.Normal(m[:, None], 1.0).log_prob(y[None]), axis=0).sum())


def test_switched_labels_are_brought_together_before_the_diagnosis() -> None:
    def draw(key: jax.Array, draws: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        m = np.array([-3.0, 4.0]) + rng.normal(size=(draws, 2))
        return {"m": np.where(np.arange(draws)[:, None] < draws / 2, m, m[:, ::-1])}

    data = Dataset("d", {"y": np.array([-3.0, 4.0])})
    switched = reference(Model(two_rates, data, exact=draw), key=KEY)
    labels = Labels(axes={"m": -1}, by="m", count=2)
    together = reference(Model(two_rates, data, exact=draw, labels=labels), key=KEY)
    assert switched.diagnostics["rhat"].min() > 1.5
    assert together.diagnostics["rhat"].max() < 1.01


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"chains": 1}, "Expected chains to be at least 2; got 1"),
        ({"draws": 7}, "Expected draws to be at least 8; got 7"),
        ({"warmup": 0}, "Expected warmup to be at least 1; got 0"),
        ({"target_accept": 1.0}, "Expected target_accept between 0 and 1; got 1.0"),
        ({"chart": "polar"}, r"Expected chart to be one of \['plain'\]; got 'polar'"),
    ],
)
def test_misuse_is_refused(options: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        reference(Model(gaussian, NOTHING), key=KEY, **options)


# -- draws from a file ------------------------------------------------------------------------------------------------


def _tree(sample_stats: dict | None = None, **variables: tuple[tuple[str, ...], np.ndarray]) -> xarray.DataTree:
    groups = {"posterior": xarray.Dataset(variables)}
    if sample_stats:
        groups["sample_stats"] = xarray.Dataset({n: (("chain", "draw"), v) for n, v in sample_stats.items()})
    return xarray.DataTree.from_dict(groups)


def _m(draws: int = 1_000) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, draws))


def test_draws_from_a_file_are_matched_completed_and_judged(tmp_path: Path) -> None:
    values = _m()
    _tree(m=(("draw", "chain"), values.T)).to_netcdf(tmp_path / "draws.nc", engine="h5netcdf")
    loaded = load_reference(tmp_path / "draws.nc", _conjugate(False))
    assert loaded.status is Status.LOADED
    assert loaded.origin == "draws from draws.nc"
    np.testing.assert_array_equal(loaded.draws["m"], values)
    np.testing.assert_allclose(loaded.draws["square"], values**2, rtol=1e-15)
    assert loaded.ebfmi is None


def test_a_files_own_statistics_and_disagreement_count(tmp_path: Path) -> None:
    diverging = np.zeros((4, 1_000), dtype=bool)
    diverging[1, 5] = True
    _tree({"diverging": diverging}, m=(("chain", "draw"), _m())).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    assert load_reference(tmp_path / "a.nc", _conjugate(False)).status is Status.DIVERGENCES
    apart = _m() + np.arange(4)[:, None]
    _tree(m=(("chain", "draw"), apart)).to_netcdf(tmp_path / "b.nc", engine="h5netcdf")
    assert load_reference(tmp_path / "b.nc", _conjugate(False)).status is Status.RHAT
    drifting = _m(2_000)[:1] + np.linspace(0, 3, 2_000)
    _tree(m=(("chain", "draw"), drifting)).to_netcdf(tmp_path / "c.nc", engine="h5netcdf")
    assert load_reference(tmp_path / "c.nc", _conjugate(False)).status is Status.RHAT  # one chain, by its halves


_BAD_FILES = {
    "no group": (
        lambda: xarray.DataTree.from_dict({"prior": xarray.Dataset({"m": 1.0})}),
        "Expected a group 'posterior' in 'bad.nc'; it has 'prior'",
    ),
    "no latent": (
        lambda: _tree(mu=(("chain", "draw"), _m())),
        "Expected draws of every latent of model 'normal_mean' in 'bad.nc'; it lacks 'm' and holds 'mu'",
    ),
    "no chain": (lambda: _tree(m=(("draw",), _m()[0])), "Expected dims chain and draw on 'm' in 'bad.nc'; got draw"),
    "shape": (
        lambda: _tree(m=(("chain", "draw", "k"), np.zeros((4, 9, 2)))),
        r"Expected draws of 'm' shaped \(chain, draw\) in 'bad.nc'; got \(4, 9, 2\)",
    ),
    "nan": (
        lambda: _tree(m=(("chain", "draw"), np.full((4, 9), np.nan))),
        "Expected finite numbers as draws of 'm' in 'bad.nc'",
    ),
    "short": (
        lambda: _tree(m=(("chain", "draw"), _m(3))),
        "Expected at least 8 draws a chain of 'm' in 'bad.nc'; got 3",
    ),
}


@pytest.mark.parametrize("case", _BAD_FILES)
def test_a_file_that_does_not_fit_is_one_sentence(case: str, tmp_path: Path) -> None:
    make, expected = _BAD_FILES[case]
    make().to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match=expected):
        load_reference(tmp_path / "bad.nc", _conjugate(False))


def test_a_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a file of draws at '.*none.nc'; found none"):
        load_reference(tmp_path / "none.nc", _conjugate(False))
    (tmp_path / "text.nc").write_text("not netCDF")
    with pytest.raises(ValueError, match="Expected a netCDF file in ArviZ's form .* 'text.nc' cannot be read as one"):
        load_reference(tmp_path / "text.nc", _conjugate(False))


# -- diagnostics ------------------------------------------------------------------------------------------------------


def test_scalars_that_never_vary_or_never_move_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 500, 4))
    values[..., 1] = 7.0
    values[..., 2] = np.arange(4)[:, None]
    values[0, 0, 3] = np.inf
    table = diagnose(["fine", "constant", "stuck", "infinite"], values)
    assert table.loc["fine", "rhat"] < 1.01
    assert table.loc["constant"].isna().all()
    assert table.loc["stuck", "rhat"] > 10
    assert table.loc["infinite"].isna().all()


def _evidence(rhat: float = 1.0, bulk: float = 1e3, tail: float = 1e3, **known: object) -> Evidence:
    table = pd.DataFrame({"rhat": [rhat], "ess_bulk": [bulk], "ess_tail": [tail]}, index=["a"])
    return Evidence(table, **{"not_finite": (), "transitions": 4_000, **known})  # type: ignore[arg-type]


_JUDGEMENTS = {
    "fine": (_evidence(), Status.PASSED, ()),
    "at the limits": (_evidence(1.01, 400, 400, divergences=0, ebfmi=np.full(4, 0.3)), Status.PASSED, ()),
    "rhat": (_evidence(1.02), Status.RHAT, ("R-hat is 1.020 for a and above 1.01 (Vehtari et al. 2021) for 1 of 1",)),
    "rhat just above": (_evidence(1.0101), Status.RHAT, ("R-hat is 1.011 for a and above 1.01",)),
    "few by a little": (_evidence(bulk=399.8), Status.FEW_DRAWS, ("The bulk ESS is 399 for a and below 400",)),
    "not finite": (_evidence(not_finite=("b", "c")), Status.RHAT, ("R-hat cannot be computed for b and 1 more",)),
    "divergences": (_evidence(divergences=7), Status.DIVERGENCES, ("7 of 4,000 transitions diverged (limit 0;",)),
    "energy": (
        _evidence(ebfmi=np.array([0.9, 0.12])),
        Status.LOW_ENERGY,
        ("E-BFMI is 0.12 in chain 2 (limit 0.3, Betancourt 2016)",),
    ),
    "few": (
        _evidence(bulk=399, tail=12),
        Status.FEW_DRAWS,
        ("The bulk ESS is 399 for a and below 400", "The tail ESS is 12 for a and below 400"),
    ),
    "all, worst first": (
        _evidence(1.5, 5, 5, divergences=1, ebfmi=np.array([0.1]), tree_depth_hits=9),
        Status.RHAT,
        ("R-hat is 1.500", "1 of 4,000", "E-BFMI is 0.10", "The bulk", "The tail", "9 of 4,000 transitions used the"),
    ),
    "deep trees alone": (_evidence(tree_depth_hits=9), Status.PASSED, ()),
}


@pytest.mark.parametrize("case", _JUDGEMENTS)
def test_every_failed_check_has_its_sentence_and_the_worst_decides(case: str) -> None:
    evidence, status, beginnings = _JUDGEMENTS[case]
    judged, reasons = judge(evidence)
    assert judged is status
    assert len(reasons) == len(beginnings)
    assert all(reason.startswith(begin) for reason, begin in zip(reasons, beginnings, strict=True))


def _vector(labels: bool = False) -> Model:
    """A posterior of a vector and a matrix, whose draws other programs name element by element."""

    def program(y: np.ndarray | None = None) -> None:
        numpyro.sample("theta", dist.Normal(0, 1).expand([3]).to_event(1))
        numpyro.sample("phi", dist.Normal(0, 1).expand([2, 2]).to_event(2))
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    return Model(program, Dataset("vector", {"y": np.array(0.0)}))


def _elements() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    names = [f"theta[{i}]" for i in (1, 2, 3)] + [f"phi[{i},{j}]" for i in (1, 2) for j in (1, 2)]
    return {name: rng.normal(size=(4, 500)) for name in names}


def _as_json(elements: Mapping[str, np.ndarray]) -> str:
    return json.dumps([{name: values[chain].tolist() for name, values in elements.items()} for chain in range(4)])


def _zipped(path: Path, text: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("draws.json", text)


_FORMS: dict[str, Callable[[Path, dict[str, np.ndarray]], None]] = {
    "draws.json": lambda path, drawn: path.write_text(_as_json(drawn)) and None,
    "draws.json.gz": lambda path, drawn: path.write_bytes(gzip.compress(_as_json(drawn).encode())) and None,
    "eight_schools.json.zip": lambda path, drawn: _zipped(path, _as_json(drawn)),
    "draws.npz": lambda path, drawn: np.savez(
        path, draws=np.stack(list(drawn.values()), axis=-1), parameters=np.array(list(drawn))
    ),
    "draws_by_site.npz": lambda path, drawn: np.savez(
        path,
        theta=np.stack([drawn[f"theta[{i}]"] for i in (1, 2, 3)], axis=-1),
        phi=np.stack([np.stack([drawn[f"phi[{i},{j}]"] for j in (1, 2)], -1) for i in (1, 2)], axis=-2),
    ),
}


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", _FORMS)
def test_draws_of_other_programs_are_put_together_by_site(name: str, folder: bool, tmp_path: Path) -> None:
    drawn = _elements()
    _FORMS[name](tmp_path / name, drawn)
    loaded = load_reference(tmp_path if folder else tmp_path / name, _vector())
    assert loaded.status is Status.LOADED
    assert loaded.origin == f"draws from {tmp_path.name if folder else name}"
    np.testing.assert_array_equal(loaded.draws["theta"][..., 1], drawn["theta[2]"])
    np.testing.assert_array_equal(loaded.draws["phi"][..., 1, 0], drawn["phi[2,1]"])


def test_draws_at_hand_are_a_reference() -> None:
    made = as_reference({"m": _m()}, _conjugate(False), origin="Stan, 4 chains x 1,000 draws")
    assert made.status is Status.LOADED
    assert made.origin == "Stan, 4 chains x 1,000 draws"
    np.testing.assert_allclose(made.draws["square"], _m() ** 2)
    with pytest.raises(ValueError, match="'m' in 'draws from elsewhere' as \\(chain, draw, ...\\); got shape"):
        as_reference({"m": _m()[0]}, _conjugate(False))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("draws.json", b"[{}", "Expected chains of draws by name in 'draws.json'"),
        ("draws.json", b'{"m": [1.0]}', "Expected chains of draws by name in 'draws.json'"),
        ("draws.json.zip", b"no zip", "Expected chains of draws by name in 'draws.json.zip'"),
        ("draws.npz", b"no archive", "Expected a readable NPZ file of draws"),
    ],
)
def test_a_file_of_another_program_that_cannot_be_read_is_one_sentence(
    name: str, content: bytes, text: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        load_reference(tmp_path / name, _conjugate(False))


def test_a_missing_element_and_a_folder_without_a_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected one file of draws in folder .*; found none"):
        load_reference(tmp_path, _vector())
    drawn = _elements()
    del drawn["phi[1,2]"]
    (tmp_path / "draws.json").write_text(_as_json(drawn))
    with pytest.raises(ValueError, match="Expected every element of 'phi' in 'draws.json', counted from 1; got 3 of 4"):
        load_reference(tmp_path, _vector())
