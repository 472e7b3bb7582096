"""A model reads its callable right, tells what does not fit, and has a fingerprint of what it computes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import pytest
from numpyro.infer.reparam import LocScaleReparam

from toolkit import Dataset, Labels, Model, Quantity
from toolkit.modelling.dataset import read_dataset

X, Y = np.arange(5.0), np.ones(5)


def hierarchy(x: np.ndarray, y: np.ndarray | None = None, k: int = 2) -> None:
    a = numpyro.sample("a", dist.Normal(0, 5))
    s = numpyro.sample("s", dist.HalfNormal(1))
    with numpyro.plate("group", k):
        e = numpyro.sample("e", dist.Normal(a, s))
        numpyro.sample("w", dist.Normal(0, 1).expand([3]).to_event(1), infer={"event_dims": ["kind"]})
    numpyro.deterministic("twice", 2 * e)
    with numpyro.plate("row", len(x)):
        mean = numpyro.deterministic("mean", e[0] + x)
        numpyro.sample("y", dist.Normal(mean, 1), obs=y)


def data(**changes: object) -> Dataset:
    return Dataset("d", **{"arrays": {"x": X, "y": Y}, "static": {"k": 3}, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(hierarchy, data(), charts={"noncentred": {"e": LocScaleReparam(0)}})


# -- what is read from the callable -----------------------------------------------------------------------------------


def test_sites_are_read_with_kinds_shapes_and_dims(model: Model) -> None:
    assert model.latents == ("a", "s", "e", "w")
    assert model.observed == ("y",)
    assert {name: site.kind for name, site in model.sites.items()} == {
        "a": "latent",
        "s": "latent",
        "e": "latent",
        "w": "latent",
        "twice": "deterministic",
        "mean": "deterministic",
        "y": "observed",
    }
    assert [model.sites[name].shape for name in ("a", "e", "w", "y")] == [(), (3,), (3, 3), (5,)]
    assert model.dims("w") == ("group", "kind")
    assert model.dims("twice") == ("twice_dim_0",)
    assert model.sites["s"].distribution == "HalfNormal"


def test_quantities_are_all_latents_and_what_is_not_per_observation(model: Model) -> None:
    assert [quantity.site for quantity in model.quantities] == ["a", "s", "e", "w", "twice"]
    assert Quantity("a").title == "a"
    assert Quantity("a", "slope").title == "slope"


def test_local_latents_are_told_from_global_ones() -> None:
    def effects(y: np.ndarray | None = None) -> None:
        mu = numpyro.sample("mu", dist.Normal(0, 1))
        with numpyro.plate("row", 5):
            own = numpyro.sample("own", dist.Normal(mu, 1))
            numpyro.sample("y", dist.Normal(own, 1), obs=y)

    found = Model(effects, Dataset("d", {"y": Y}))
    assert (found.local("mu"), found.local("own")) == (False, True)


def test_a_flat_prior_and_a_factor_are_legitimate() -> None:
    def flat(y: np.ndarray) -> None:
        b = numpyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.factor("likelihood", dist.Normal(b, 1.0).log_prob(y).sum())

    found = Model(flat, Dataset("d", {"y": Y}))
    assert found.flat_priors == ("b",)
    assert found.observed == ()
    b = 0.3
    expected = -0.5 * ((Y - b) ** 2).sum() - 2.5 * np.log(2 * np.pi)
    assert float(found.log_density({"b": jnp.array(b)}, found.arrays)) == pytest.approx(expected, rel=1e-12)


def test_charts_are_one_posterior(model: Model) -> None:
    """Densities differ by the Jacobian of e = a + s * base, which is -3 log s for three effects."""
    point = model.start(jax.random.PRNGKey(1), model.arrays)
    sites = model.constrain(point, model.arrays)
    base = {**point, "e_decentered": (sites["e"] - sites["a"]) / sites["s"]}
    del base["e"]
    other = model.constrain(base, model.arrays, chart="noncentred")
    np.testing.assert_allclose(other["twice"], sites["twice"], rtol=1e-12)
    difference = model.log_density(base, model.arrays, "noncentred") - model.log_density(point, model.arrays)
    assert float(difference) == pytest.approx(3 * float(point["s"]), rel=1e-10)
    assert model.in_chart("noncentred").chart == "noncentred"
    values = model.values({name: sites[name] for name in model.latents}, model.arrays)
    np.testing.assert_allclose(values["mean"], sites["mean"], rtol=1e-12)


def test_starts_are_dispersed_in_every_coordinate(model: Model) -> None:
    keys = jax.random.split(jax.random.PRNGKey(0), 200)
    starts = jax.vmap(lambda key: model.start(key, model.arrays))(keys)
    for name in ("a", "s", "e"):
        values = np.abs(np.asarray(starts[name]))
        assert values.max() <= 2 + 1e-9
        # Uniform in [-2, 2]: |value| has mean 1 and sd 1 / sqrt(3).
        assert abs(values.mean() - 1) < 5 / np.sqrt(3 * values.size)


# -- what does not fit ------------------------------------------------------------------------------------------------


def silent(y: np.ndarray | None = None) -> None:
    numpyro.sample("a", dist.Normal(0, 1))


def known(y: np.ndarray | None = None) -> None:
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def broken(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", 7):
        numpyro.sample("y", dist.Normal(a, 1), obs=undefined(y))  # type: ignore[name-defined]  # noqa: F821


def misfit(y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("n", 7):
        numpyro.sample("y", dist.Normal(a * jnp.ones(5), 1), obs=y)


_ONLY_Y = Dataset("d", {"y": Y})


def counted(k: int, y: np.ndarray | None = None) -> None:
    for number in range(k):
        numpyro.sample(f"z{number}", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(0, 1), obs=y)


def logged(x: np.ndarray, y: np.ndarray | None = None) -> None:
    z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(z + np.log(np.abs(x)), 1), obs=y)


_MISFITS = {
    "observes nothing": (lambda: Model(silent, _ONLY_Y), "Expected model 'silent' to observe something; it has only a"),
    "infers nothing": (lambda: Model(known, _ONLY_Y), "Expected model 'known' to have a latent site; everything in"),
    "its own error": (lambda: Model(broken, _ONLY_Y), "to run on dataset 'd'; it stops with NameError: .*undefined"),
    "a plate that does not fit": (lambda: Model(misfit, _ONLY_Y), "to run on dataset 'd'; it stops with ValueError"),
    "an unknown argument": (
        lambda: Model(hierarchy, data(arrays={"x": X, "y": Y, "z": X})),
        r"Expected dataset 'd' to hold arguments of 'hierarchy' \(x, y, k\); it also holds z",
    ),
    "a missing argument": (
        lambda: Model(hierarchy, data(arrays={"y": Y})),
        "Expected dataset 'd' to hold 'x' for 'hierarchy'",
    ),
    "a quantity that is no site": (
        lambda: Model(hierarchy, data(), quantities=(Quantity("b"),)),
        "Expected a quantity to be a latent or deterministic site, one of .*; got 'b'",
    ),
    "dims of another rank": (
        lambda: Model(hierarchy, data(), quantities=(Quantity("e", dims=("a", "b")),)),
        "Expected 1 dims for quantity 'e'",
    ),
    "coords of another length": (
        lambda: Model(hierarchy, data(coords={"group": np.array(["u", "v"])})),
        "Expected 3 coords for dimension 'group' of site 'e'; dataset 'd' has 2",
    ),
    "coords that repeat": (
        lambda: Model(hierarchy, data(coords={"group": np.array(["u", "v", "u"])})),
        "Expected each coord of dimension 'group' of site 'e' once; dataset 'd' has 'u' 2 times",
    ),
    "an unknown chart": (
        lambda: Model(hierarchy, data(), chart="polar"),
        r"Expected chart to be one of \['plain'\]; got 'polar'",
    ),
    "NaN in data": (
        lambda: Dataset("d", {"y": np.array([1.0, np.nan])}),
        "Expected finite numbers in data array 'y'; got 1 NaN or infinite of 2",
    ),
    "text in data": (lambda: Dataset("d", {"y": np.array(["a"])}), "Expected numbers in data array 'y'; got dtype"),
    "a size among the arrays": (
        lambda: Model(hierarchy, Dataset("d", {"x": X, "y": Y, "k": np.array(3)})),
        r"A value that decides a size or a branch belongs to the dataset's static values, static=\{\.\.\.\}\.",
    ),
    "a count among the arrays": (
        lambda: Model(counted, Dataset("d", {"k": np.array(3), "y": Y})),
        r"belongs to the dataset's static values, static=\{\.\.\.\}\.",
    ),
    "NumPy on an array that is traced": (
        lambda: Model(logged, Dataset("d", {"x": X, "y": Y})),
        "Use jax.numpy for what is computed from data and latents",
    ),
    "a name twice": (
        lambda: Dataset("d", {"y": Y}, static={"y": 2}),
        r"Expected each name once; got \['y'\] among both arrays and static values of 'd'",
    ),
}


@pytest.mark.parametrize("case", _MISFITS)
def test_what_does_not_fit_is_one_sentence(case: str) -> None:
    make, expected = _MISFITS[case]
    with pytest.raises(ValueError, match=expected) as caught:
        make()
    assert "\n" not in str(caught.value)


# -- data from files --------------------------------------------------------------------------------------------------


def by_county(y: np.ndarray, county: np.ndarray, scale: float = 1.0) -> None: ...


def test_a_table_gives_arguments_by_name_and_codes_text(tmp_path: Path) -> None:
    table = pd.DataFrame({"county": ["b", "a", "b"], "y": [1.0, 2.0, 3.5], "unused": ["x", None, "z"]})
    table.to_csv(tmp_path / "radon.csv", index=False)
    found = read_dataset(tmp_path / "radon.csv", by_county)
    assert found.name == "radon"
    assert set(found.arrays) == {"y", "county"}
    np.testing.assert_array_equal(found.arrays["county"], [1, 0, 1])
    np.testing.assert_array_equal(found.coords["county"], ["a", "b"])


def test_matrices_come_from_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "m.npz", y=np.eye(2), county=np.arange(2))
    found = read_dataset(tmp_path / "m.npz", by_county, {"scale": 2.0})
    np.testing.assert_array_equal(found.arrays["y"], np.eye(2))
    assert found.static == {"scale": 2.0}


_FILES = {
    "none.csv": (None, "Expected a data file at '.*none.csv'; found none"),
    "data.txt": ("y\n1\n", "Expected a .csv or .npz data file; got 'data.txt'"),
    "empty.csv": ("", "Expected a readable .csv file; '.*empty.csv' is not"),
    "broken.npz": ("no zip", "Expected a readable .npz file; '.*broken.npz' is not"),
    "lacks.csv": ("y\n1\n", "Expected data for the argument 'county' of 'by_county'; 'lacks.csv' holds 'y'"),
    "gap.csv": ("y,county\n1,a\n2,\n", "Expected a value in every row of the text column 'county'; got 1 empty"),
    "nan.csv": ("y,county\n1,a\n,b\n", "Expected finite numbers in data array 'y'; got 1 NaN or infinite of 2"),
}


@pytest.mark.parametrize("name", _FILES)
def test_a_data_file_that_does_not_do_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, expected = _FILES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        read_dataset(tmp_path / name, by_county)


# -- the fingerprint --------------------------------------------------------------------------------------------------

_PROGRAM = """
import jax.numpy as jnp, numpy as np, numpyro, numpyro.distributions as dist
from toolkit import Dataset, Model
TABLE = np.arange({size}, dtype=float) + {offset}
def helper(a):
    {comment}
    return {body}
def fn(y=None):
    a = numpyro.sample("a", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(helper(a) + jnp.asarray(TABLE)[:3].sum() + jnp.asarray(TABLE).mean(), 1), obs=y)
model = Model(fn, Dataset("d", {{"y": np.array([{y}, 1.0])}}))
"""
_BASE = {"size": 3, "offset": 0.0, "comment": "# one", "body": "2 * a", "y": 0.5}


def _fingerprint(folder: Path, **changes: object) -> str:
    path = folder / f"program{len(list(folder.iterdir()))}.py"
    path.write_text(_PROGRAM.format(**{**_BASE, **changes}))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model.fingerprint()


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"comment": "# another comment"}, True),
        ({"comment": "unused = 1"}, True),
        ({"body": "3 * a"}, False),
        ({"body": "jnp.sin(a)"}, False),
        ({"y": 0.25}, False),
        ({"offset": 1.0}, False),
    ],
)
def test_the_fingerprint_follows_what_is_computed(tmp_path: Path, changes: dict[str, object], same: bool) -> None:
    assert (_fingerprint(tmp_path) == _fingerprint(tmp_path, **changes)) is same


def test_a_large_table_inside_the_program_counts_by_its_values(tmp_path: Path) -> None:
    assert _fingerprint(tmp_path, size=20_000) == _fingerprint(tmp_path, size=20_000)
    assert _fingerprint(tmp_path, size=20_000) != _fingerprint(tmp_path, size=20_000, offset=1.0)


def test_settings_are_part_of_the_fingerprint(model: Model) -> None:
    others = [
        model.in_chart("noncentred"),
        Model(hierarchy, data(), quantities=(Quantity("a"),)),
        Model(hierarchy, data(static={"k": 4})),
        Model(hierarchy, data(), labels=Labels({"e": -1}, by="e", count=3)),
    ]
    assert len({model.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_the_fingerprint_is_the_same_in_another_process(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(_PROGRAM.format(**_BASE) + "print(model.fingerprint())\n")
    run = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    assert run.stdout.strip() == _fingerprint(tmp_path)


def test_flat_priors_are_found_under_shells() -> None:
    flat, real = dist.ImproperUniform, dist.constraints.real

    def program(y: np.ndarray) -> None:
        numpyro.sample("a", dist.Normal(0, 1))
        numpyro.sample("b", flat(real, (3,), ()).to_event(1))
        with numpyro.plate("row", 2):
            numpyro.sample("c", flat(real, (), ()))
        numpyro.sample("d", dist.TransformedDistribution(flat(real, (), ()), dist.transforms.ExpTransform()))
        numpyro.sample("e", dist.LogNormal(0, 1))
        numpyro.sample("y", dist.Normal(0, 1), obs=y)

    model = Model(program, Dataset("one", {"y": np.array(0.0)}))
    assert model.flat_priors == ("b", "c", "d")
