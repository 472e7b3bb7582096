"""Every scalar of every quantity has one name, in one order."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Model, Quantity
from toolkit.modelling.scalars import scalars


def linear(x: np.ndarray, y: np.ndarray | None = None) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    with numpyro.plate("group", 2):
        b = numpyro.sample("b", dist.Normal(a, 1))
    numpyro.deterministic("table", b[:, None] * np.ones((1, 3)))
    numpyro.sample("y", dist.Normal(a + b[0] * x, 1), obs=y)


QUANTITIES = (
    Quantity("table", "slope table", "mV", ("group", "day")),
    Quantity("a"),
    Quantity("b", "slope"),
)


@pytest.fixture(scope="module")
def model() -> Model:
    data = Dataset("d", {"x": np.arange(4.0), "y": np.zeros(4)}, coords={"group": np.array(["north", "south"])})
    return Model(linear, data, quantities=QUANTITIES)


@pytest.fixture(scope="module")
def draws() -> dict[str, np.ndarray]:
    b = np.arange(2 * 5 * 2, dtype=float).reshape(2, 5, 2)
    return {"a": np.full((2, 5), 7.0), "b": b, "table": b[..., None] + np.array([0, 0.1, 0.2]), "other": b}


def test_names_follow_the_quantities_and_their_coords(model: Model, draws: dict[str, np.ndarray]) -> None:
    found = scalars(model, draws)
    table = [f"table[{group}, {day}]" for group in ("north", "south") for day in (0, 1, 2)]
    assert list(found.names) == [*table, "a", "b[north]", "b[south]"]
    assert found.sites == ("table",) * 6 + ("a", "b", "b")
    assert found.titles[0] == "slope table[north, 0]"
    assert found.titles[-1] == "slope[south]"
    assert found.units == ("mV",) * 6 + ("",) * 3


def test_each_name_stands_over_its_own_values(model: Model, draws: dict[str, np.ndarray]) -> None:
    found = scalars(model, draws)
    assert found.values.shape == (2, 5, 9)
    assert found.values.dtype == np.float64
    column = dict(zip(found.names, np.moveaxis(found.values, -1, 0), strict=True))
    np.testing.assert_array_equal(column["b[south]"], draws["b"][..., 1])
    np.testing.assert_array_equal(column["table[south, 2]"], draws["table"][..., 1, 2])
    np.testing.assert_array_equal(column["a"], draws["a"])


def test_the_draws_of_one_scalar_lie_together(model: Model, draws: dict[str, np.ndarray]) -> None:
    assert np.moveaxis(scalars(model, draws).values, -1, 0).flags.c_contiguous


def test_other_quantities_may_be_asked_for(model: Model, draws: dict[str, np.ndarray]) -> None:
    assert scalars(model, draws, [Quantity("b")]).names == ("b[north]", "b[south]")
    assert scalars(model, draws, []).values.shape == (2, 5, 0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"b": None}, "Expected draws of quantity 'b'; got draws of a, table"),
        ({"b": np.zeros((2, 5, 3))}, r"Expected draws of 'b' shaped \(chain, draw, 2\); got \(2, 5, 3\)"),
        ({"a": np.zeros(5)}, r"Expected draws of 'a' shaped \(chain, draw\); got \(5,\)"),
    ],
)
def test_draws_that_do_not_fit_are_refused(
    model: Model, draws: dict[str, np.ndarray], change: dict[str, np.ndarray | None], expected: str
) -> None:
    given = {name: values for name, values in {**draws, **change}.items() if values is not None and name != "other"}
    with pytest.raises(ValueError, match=expected):
        scalars(model, given)
