r"""Predictive coding: can units that know only their own prediction errors infer the causes of an image?

**Question.** What lies behind the 64 pixels of one handwritten digit, when each part of the image has causes of its
own and these have common causes? In predictive coding (Rao & Ballard 1999) a cause is a unit that two errors push: its
own, from what the level above predicts of it, and those of what it predicts below. Here everything is linear and
Gaussian, so that what such units settle on can be held against the exact posterior.

**Model**, for levels l from 1 to L, with matrices W and sds s that are given, and pixels y less their mean:

    causes_L ~ Normal(0, s_L)
    causes_l ~ Normal(W_l causes_(l+1), s_l)                               l = L - 1, ..., 1
    y        ~ Normal(W_0 causes_1, s_0)

**Why these numbers.** On the digits, level 1 has four causes for each of four windows of 5 x 5 pixels, which overlap,
and level 2 has four causes of all sixteen. Weights and noise are those that make 1,500 other images likely (EM), with
noise of its own for each pixel. Each cause has sd 1 before an image is seen; ink runs from 0 to 16. Only the causes of
one new image are inferred. Causes whose windows overlap explain the same ink, so that their posterior is correlated.

**What is exact.** The causes' joint precision P is block tridiagonal: with the errors e_l = (causes_l - prediction) /
s_l^2, the gradient of log p(y, causes) is -e_l + W_(l-1)' e_(l-1) and P is minus its derivative. The posterior is
Normal(m, P^-1), where the gradient is zero at m, and the evidence follows. A mean field has m itself, the variances
1 / diag(P), and lies 1/2 (sum of log diag(P) - log det P) below the log evidence.

**A guide of its own.** `predictive_coding` finds that mean field by gradient steps on the free energy, which is minus
the ELBO, each unit's by errors on its own connections. Two things are less local than that: how far a step may go has
the weights of the other units that predict the same in it, and when to stop is read from the free energy of all.

References:
    Rao & Ballard (1999), Predictive coding in the visual cortex, Nature Neuroscience 2(1).
    Friston (2005), A theory of cortical responses, Philosophical Transactions of the Royal Society B 360(1456).
    Bogacz (2017), A tutorial on the free-energy framework for modelling perception and learning, Journal of
    Mathematical Psychology 76.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer.autoguide import AutoNormal

from models._hierarchy import Hierarchy, settle
from models._receptive_fields import COMMON, PER_WINDOW, SIDE, WINDOWS, learned
from toolkit import Dataset, Guide, Model, Quantity

TRAINING = 1_500

_FILE = Path(__file__).parent / "data" / "digits.npz"


def predictive_coding(weights: Any, sds: Any, y: Any = None, *, sizes: tuple[int, ...]) -> None:
    """The NumPyro callable.

    Args:
        weights: W_0, W_1, ... row by row, one after the other: W_l is `(sizes[l], sizes[l + 1])`.
        sds: s_0, s_1, ..., one after the other: s_l is `(sizes[l],)`.
        y: What is seen, `(pixel,)`; drawn if not given.
        sizes: How many pixels, causes at level 1, at level 2, and so on.
    """
    hierarchy = Hierarchy.unpacked(weights, sds, sizes)
    predicted = jnp.zeros(sizes[-1])
    for level in range(len(sizes) - 1, 0, -1):
        with numpyro.plate(f"cause_{level}", sizes[level]):
            causes = numpyro.sample(f"causes_{level}", dist.Normal(predicted, hierarchy.sds[level]))
        predicted = hierarchy.weights[level - 1] @ causes
    with numpyro.plate("pixel", sizes[0]):
        numpyro.sample("y", dist.Normal(predicted, hierarchy.sds[0]), obs=y)


PREDICTIVE_CODING = Guide(
    "predictive_coding",
    AutoNormal,
    contains=("mean_field", "diagonal"),
    label="AutoNormal",
    solve=partial(settle, site="causes_{level}"),
)
"""The mean field that units reach by following their own prediction errors."""


def digits() -> tuple[np.ndarray, np.ndarray]:
    """All images `(image, pixel)`, ink from 0 to 16 row by row, and which digit each shows, `(image,)`."""
    with np.load(_FILE) as file:
        return file["images"].astype(float), file["digits"].astype(int)


def dataset(image: int = 0) -> Dataset:
    """One image that the weights were not learned from, with these weights.

    Args:
        image: Which of the 297 images after the first 1,500. The mean image of those is subtracted here, in the open.

    Raises:
        ValueError: There is no such image.
    """
    return _digit(image)


def _digit(image: int) -> Dataset:
    images, shown = digits()
    if isinstance(image, bool) or not isinstance(image, Integral) or not 0 <= image < len(images) - TRAINING:
        raise ValueError(f"Expected an image from 0 to {len(images) - TRAINING - 1}; got {image!r}.")
    mean = images[:TRAINING].mean(0)
    number = TRAINING + image
    return _pack(
        f"digit_{shown[number]}_image_{image}",
        learned(images[:TRAINING] - mean),
        images[number] - mean,
        coords={
            "pixel": np.array([f"row {i + 1} column {j + 1}" for i in range(SIDE) for j in range(SIDE)]),
            "cause_1": np.array([f"{name} {k + 1}" for name in WINDOWS for k in range(PER_WINDOW)]),
            "cause_2": np.array([f"common {k + 1}" for k in range(COMMON)]),
        },
        source="Alpaydin & Kaynak (1998), Optical Recognition of Handwritten Digits, UCI, as in scikit-learn",
        licence="CC BY 4.0",
    )


def simulate(key: jax.Array, *, sizes: Sequence[int] = (30, 10, 3), noise: float = 0.5) -> Dataset:
    """Data drawn from a hierarchy with random weights, with the causes that made them.

    Args:
        key: Fixes weights, causes and data.
        sizes: How many pixels, causes at level 1, at level 2, and so on; at least two numbers.
        noise: The sd of each level but the top one, whose is 1.

    Raises:
        ValueError: A size is not positive, there are less than two, or the noise is not above 0.
    """
    sizes = tuple(int(size) for size in sizes)
    if len(sizes) < 2 or min(sizes) < 1 or not 0 < noise < np.inf:
        raise ValueError(f"Expected two or more positive sizes and a noise above 0; got {sizes} and {noise}.")
    keys = jax.random.split(key, len(sizes))
    shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
    weights = [
        np.asarray(jax.random.normal(one, shape)) / np.sqrt(shape[1]) for one, shape in zip(keys, shapes, strict=False)
    ]
    sds = [np.full(size, noise) for size in sizes[:-1]] + [np.ones(sizes[-1])]
    empty = _pack(
        f"simulated_{'_'.join(map(str, sizes))}",
        Hierarchy(tuple(weights), tuple(sds)),
        np.zeros(sizes[0]),
        source=f"simulated: {len(sizes) - 1} levels of causes, sizes {', '.join(map(str, sizes))} from the pixels up",
        licence="none needed",
    )
    seeded = numpyro.handlers.seed(predictive_coding, keys[-1])
    given = {name: jnp.asarray(empty.arrays[name]) for name in ("weights", "sds")}
    drawn = numpyro.handlers.trace(seeded).get_trace(**given, sizes=sizes)
    truth = {f"causes_{level}": np.asarray(drawn[f"causes_{level}"]["value"]) for level in range(1, len(sizes))}
    return replace(empty, arrays={**empty.arrays, "y": np.asarray(drawn["y"]["value"])}, truth=truth)


def _pack(name: str, hierarchy: Hierarchy, y: np.ndarray, **described: Any) -> Dataset:
    weights, sds = hierarchy.packed()
    return Dataset(name, {"weights": weights, "sds": sds, "y": y}, static={"sizes": hierarchy.sizes}, **described)


def model(dataset: Dataset | None = None, *, image: int | None = None) -> Model:
    """The model on a dataset, with its exact draws and log evidence and the guide `predictive_coding`.

    Args:
        dataset: Arrays `weights`, `sds` and `y` and the static value `sizes`, as the callable takes them; made of
            `image` if not given.
        image: Which of the 297 digits that were not learned from, without a dataset; 0 if not given.

    Raises:
        ValueError: Both are given, there is no such image, or the arrays do not fit.
    """
    if dataset is not None and image is not None:
        raise ValueError("Expected a dataset, or an image to make one of; got both.")
    data = _digit(0 if image is None else image) if dataset is None else _checked(dataset)
    sizes = data.static["sizes"]
    hierarchy = Hierarchy.unpacked(data.arrays["weights"], data.arrays["sds"], sizes)
    levels = range(len(sizes) - 1, 0, -1)
    posterior = hierarchy.posterior(data.arrays["y"])

    def exact(key: jax.Array, draws: int) -> dict[str, Any]:
        base = jax.random.normal(key, (draws, len(posterior.mean)))
        apart = jax.scipy.linalg.solve_triangular(posterior.lower, base.T, lower=True, trans=1).T
        drawn = jnp.asarray(posterior.mean)[None] + apart
        return {f"causes_{level}": values for level, values in enumerate(hierarchy.split(drawn), start=1)}

    return Model(
        predictive_coding,
        data,
        quantities=tuple(Quantity(f"causes_{level}", f"causes at level {level}") for level in levels),
        exact=exact,
        log_evidence=posterior.log_evidence,
        log_concave=True,
        guides=(PREDICTIVE_CODING,),
        title="Predictive coding",
        question="What causes does a hierarchy find behind one image, by prediction errors alone?",
    )


def _checked(data: Dataset) -> Dataset:
    missing = [name for name in ("weights", "sds", "y") if name not in data.arrays]
    if missing or "sizes" not in data.static:
        lacks = ", ".join([*missing, *([] if "sizes" in data.static else ["sizes"])])
        raise ValueError(
            f"Expected arrays weights, sds and y and the static value sizes in dataset '{data.name}'; it lacks {lacks}."
        )
    sizes = data.static["sizes"]
    whole = isinstance(sizes, tuple) and len(sizes) > 1 and all(isinstance(n, int) and n > 0 for n in sizes)
    if not whole:
        raise ValueError(f"Expected sizes as a tuple of two or more positive whole numbers; got {sizes!r}.")
    wanted = {
        "weights": (sum(a * b for a, b in zip(sizes[:-1], sizes[1:], strict=True)),),
        "sds": (sum(sizes),),
        "y": (sizes[0],),
    }
    for name, shape in wanted.items():
        if data.arrays[name].shape != shape:
            raise ValueError(f"Expected {name} of shape {shape} for sizes {sizes}; got {data.arrays[name].shape}.")
    if not (data.arrays["sds"] > 0).all():
        raise ValueError(f"Expected sds above 0; got {data.arrays['sds'].min():g} among them.")
    return data
