"""The focus grammar: what it reads, what it computes, and what it says to what it cannot read."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from toolkit import Dataset, Model, Quantity
from toolkit.comparison.focus import parse_focus
from toolkit.modelling.scalars import Scalars, scalars


def _model(y: np.ndarray) -> None:
    with numpyro.plate("term", 3):
        beta = numpyro.sample("beta", dist.Normal(0.0, 1.0))
    with numpyro.plate("county", 4, dim=-2), numpyro.plate("effect", 2, dim=-1):
        numpyro.sample("effects", dist.Normal(0.0, 1.0))
    with numpyro.plate("row", 2, dim=-2), numpyro.plate("column", 3, dim=-1):
        numpyro.sample("theta", dist.Normal(0.0, 1.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.deterministic("sigma/2", sigma / 2)
    numpyro.deterministic("beta_sum", beta.sum())
    numpyro.sample("y", dist.Normal(0.0, sigma), obs=y)


COORDS = {
    "term": ["worst area", "C(floor)[T.1]", "a, b"],
    "county": [f"county {i}" for i in range(4)],
    "effect": ["Intercept", "floor"],
}


@pytest.fixture(scope="module")
def model() -> Model:
    sites = ("beta", "effects", "theta", "sigma", "sigma/2", "beta_sum")
    return Model(_model, Dataset("zero", {"y": jnp.array(0.0)}, coords=COORDS), quantities=tuple(map(Quantity, sites)))


@pytest.fixture(scope="module")
def drawn(model: Model) -> tuple[dict[str, np.ndarray], Scalars]:
    rng = np.random.default_rng(0)
    draws = {q.site: rng.gamma(2.0, size=(2, 5, *model.sites[q.site].shape)) for q in model.quantities}
    return draws, scalars(model, draws)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sigma", lambda d: d["sigma"]),
        ("  sigma ", lambda d: d["sigma"]),
        ("beta[worst area]", lambda d: d["beta"][..., 0]),
        ("beta[ worst  area ]", lambda d: d["beta"][..., 0]),
        ("beta[C(floor)[T.1]]", lambda d: d["beta"][..., 1]),
        ("beta[a, b]", lambda d: d["beta"][..., 2]),
        ("beta[2]", lambda d: d["beta"][..., 2]),
        ("effects[county 3, floor]", lambda d: d["effects"][..., 3, 1]),
        ("effects[county 3,floor]", lambda d: d["effects"][..., 3, 1]),
        ("theta[0, 2]", lambda d: d["theta"][..., 0, 2]),
        ("theta[1,0]", lambda d: d["theta"][..., 1, 0]),
        ("sigma/2", lambda d: d["sigma/2"]),
        ("sigma / 2", lambda d: d["sigma"] / 2),
        ("beta_sum", lambda d: d["beta_sum"]),
        ("beta[worst area] - beta[2]", lambda d: d["beta"][..., 0] - d["beta"][..., 2]),
        ("sigma - 1 - 2", lambda d: d["sigma"] - 1 - 2),
        ("12 / sigma / 2", lambda d: 12 / d["sigma"] / 2),
        ("1 + 2 * sigma", lambda d: 1 + 2 * d["sigma"]),
        ("(1 + 2) * sigma", lambda d: 3 * d["sigma"]),
        ("-sigma + 1e-1", lambda d: -d["sigma"] + 0.1),
        ("2 * -(sigma - .5)", lambda d: -2 * (d["sigma"] - 0.5)),
        ("sigma > 1", lambda d: d["sigma"] > 1),
        ("sigma >= 1.5", lambda d: d["sigma"] >= 1.5),
        ("theta[0, 0] < theta[0, 1]", lambda d: d["theta"][..., 0, 0] < d["theta"][..., 0, 1]),
        ("2*sigma<=beta_sum + 1", lambda d: 2 * d["sigma"] <= d["beta_sum"] + 1),
    ],
)
def test_a_text_is_what_it_says(
    model: Model, drawn: tuple[dict[str, np.ndarray], Scalars], text: str, expected: object
) -> None:
    draws, source = drawn
    focus = parse_focus(text, model)
    values, wanted = focus.evaluate(source), expected(draws)
    np.testing.assert_array_equal(values, wanted)
    assert values.shape == (2, 5)
    assert focus.event == (wanted.dtype == bool)
    assert set(focus.names) <= set(source.names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q", "Expected a quantity, one of beta, effects, theta, sigma, sigma/2, beta_sum; got 'q'."),
        ("sigmo", "got 'sigmo': did you mean 'sigma' or 'sigma/2'?"),
        ("beta[worst aera]", "did you mean 'worst area'?"),
        ("beta[7]", "Expected a label of 'beta' along 'term', one of worst area, C(floor)[T.1], a, b; got '7'."),
        ("effects[county 9, floor]", "Expected a label of 'effects' along 'county', one of county 0, county 1"),
        (
            "effects[floor]",
            "Expected 2 labels for 'effects' (county, effect); got 'effects[floor]': one of effects[cou",
        ),
        ("theta[0, 3]", "Expected a label of 'theta' along 'column', one of 0, 1, 2; got '3'"),
        ("beta", "Expected labels for 'beta', one of beta[worst area], beta[C(floor)[T.1]], beta[a, b], at position 5"),
        ("sigma[0]", "Expected no labels for 'sigma', which is one number; got 'sigma[0]'."),
        ("beta[worst area", "Expected a closing ']' at position 5 of 'beta[worst area'; got '[worst area'."),
        ("(sigma", "Expected a closing ')' at position 7 of '(sigma'; got the end."),
        ("sigma +", "Expected a number, a quantity or '(' at position 8 of 'sigma +'; got the end."),
        (
            "sigma sigma",
            "Expected an operator (+ - * / < > <= >=) or the end at position 7 of 'sigma sigma'; got 'sigma'",
        ),
        ("0 < sigma < 1", "Expected one comparison at most at position 11 of '0 < sigma < 1'; got '< 1'."),
        ("sigma == 1", "at position 7 of 'sigma == 1'; got '== 1'."),
        ("", "Expected a number, a quantity or '(' at position 1 of ''; got the end."),
        ("1 + 2", "Expected a focus that names a quantity, one of beta, effects"),
        ("__import__('os')", "Expected a quantity, one of beta"),
        ("sigma.real", "Expected an operator"),
    ],
)
def test_what_cannot_be_read_is_told(model: Model, text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_focus(text, model)
    assert message in str(caught.value)


def test_an_observed_or_unlisted_site_is_no_quantity(model: Model) -> None:
    with pytest.raises(ValueError, match="Expected a quantity, one of beta"):
        parse_focus("y > 0", model)


def test_division_by_zero_is_a_value(model: Model, drawn: tuple[dict[str, np.ndarray], Scalars]) -> None:
    assert np.isinf(parse_focus("1 / (sigma - sigma)", model).evaluate(drawn[1])).all()
