"""The best ELBO of two Gaussian families on `hierarchy_999`, by quadrature instead of a long run.

    python benchmarks/hierarchy_optimum.py [--groups 497] [--nodes 4096] [--out benchmarks/yardsticks.csv]

Stochastic climbs of a factor of 500,000 numbers take hours; this takes minutes, and has nothing to do with them, nor
with `toolkit.variational`.

At the best full-rank Gaussian the precision is minus the mean Hessian of log p, and has its zeros. Given the means, sds
and sigma (5 scalars) the groups are independent; so the best q is a Gaussian over these 5 times, for each group, one
whose mean is linear in them: 7,475 numbers and not 500,499. The factorised family is the same without the off-diagonal
ones. Log p is quadratic in each group's two scalars, whose mean over q is therefore known for given values of the 5;
over the 5 it is taken on Sobol points, antithetic, in 5 dimensions. What is left is a smooth function, and L-BFGS.

`elbo` is the mean over 8 scrambles that the fit has not seen, `se` its standard error: a family member's ELBO, and so
never above the best. How far below it may be is printed: what a climb from there gains on the first unseen scramble,
which bounds it in expectation. In the end 65,536 plain draws of the Gaussian and the model's own log density confirm
the ELBO.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import targets_large
import yardsticks
from jax.scipy.stats import norm
from scipy.stats import qmc

from toolkit import Model

SHARED = 5  # two means, two log sds, log sigma
GUIDES = ("full_rank", "mean_field")
SCRAMBLES = 8
DRAWS, AT_ONCE = 65_536, 4_096
_LOG_2PI = math.log(2 * math.pi)

Parameters = dict[str, Any]


def nodes(count: int, seed: int) -> np.ndarray:
    """Standard normal points, antithetic, (count, 5)."""
    half = qmc.Sobol(SHARED, rng=np.random.default_rng(seed)).random(count // 2)
    points = np.asarray(norm.ppf(np.clip(half, 1e-12, 1 - 1e-12)))
    return np.concatenate([points, -points])


def statistics(model: Model) -> dict[str, np.ndarray]:
    """Sums over each group's rows: X'X (groups, 2, 2), X'y (groups, 2); and y'y and the number of rows in all."""
    given, groups = model.arrays, model.dataset.static["groups"]
    design = np.stack([np.ones_like(given["x"]), given["x"]], axis=1)
    squares, products = np.zeros((groups, 2, 2)), np.zeros((groups, 2))
    np.add.at(squares, given["group"], design[:, :, None] * design[:, None, :])
    np.add.at(products, given["group"], design * np.asarray(given["y"])[:, None])
    return {
        "squares": squares,
        "products": products,
        "total": np.asarray((np.asarray(given["y"]) ** 2).sum()),
        "rows": np.asarray(float(len(given["y"]))),
    }


def lower(log_diagonal: Any, below: Any) -> Any:
    """Lower-triangular matrices from the logarithms of their diagonals and what is below them."""
    return jnp.tril(below, -1) + jnp.exp(log_diagonal)[..., None] * jnp.eye(log_diagonal.shape[-1])


def elbo(given: Parameters, points: Any, known: dict[str, Any], *, factorised: bool) -> Any:
    """The ELBO in nats, over the groups exactly and over the five on `points` (n, 5)."""
    keep = 0.0 if factorised else 1.0
    shared = lower(given["shared_scale"], keep * given["shared_below"])
    own = lower(given["own_scale"], keep * given["own_below"])  # (groups, 2, 2)
    spread = own @ own.mT
    groups, size = len(own), SHARED + 2 * len(own)

    def one(point: Any) -> Any:
        five = given["shared"] + shared @ point
        mean, log_sd, log_sigma = five[:2], five[2:4], five[4]
        sd, precision = jnp.exp(log_sd), jnp.exp(-2 * log_sigma)
        standard = given["own"] + keep * given["coupled"] @ point  # (groups, 2), the mean given the five
        line = mean + sd * standard
        misfit = known["total"] - 2 * (line * known["products"]).sum()
        misfit += jnp.einsum("gi,gij,gj->", line, known["squares"], line)
        misfit += jnp.einsum("gij,gij,i,j->", spread, known["squares"], sd, sd)
        prior = norm.logpdf(mean, 0.0, 5.0).sum()
        # A half-normal with scale 2, on the logarithm.
        halves = jnp.concatenate([log_sd, log_sigma[None]])
        prior += (math.log(2.0) + norm.logpdf(jnp.exp(halves), 0.0, 2.0) + halves).sum()
        prior += -0.5 * ((standard**2).sum() + jnp.einsum("gii->", spread)) - groups * _LOG_2PI
        return prior - 0.5 * precision * misfit - known["rows"] * (log_sigma + 0.5 * _LOG_2PI)

    entropy = given["shared_scale"].sum() + given["own_scale"].sum() + 0.5 * size * (1 + _LOG_2PI)
    return jax.lax.map(one, points, batch_size=256).mean() + entropy


def begin(groups: int) -> Parameters:
    """Where the climb begins: everything about zero."""
    return {
        "shared": jnp.zeros(SHARED),
        "shared_scale": jnp.full(SHARED, -3.0),
        "shared_below": jnp.zeros((SHARED, SHARED)),
        "own": jnp.zeros((groups, 2)),
        "own_scale": jnp.full((groups, 2), -0.7),
        "own_below": jnp.zeros((groups, 2, 2)),
        "coupled": jnp.zeros((groups, 2, SHARED)),
    }


def best(start: Parameters, points: np.ndarray, known: dict[str, Any], *, factorised: bool) -> tuple[Parameters, float]:
    """The best member on these points, by L-BFGS, and its ELBO on them."""
    flat, back = jax.flatten_util.ravel_pytree(start)
    loss = jax.jit(jax.value_and_grad(lambda x, p: -elbo(back(x), p, known, factorised=factorised)))
    found = scipy.optimize.minimize(
        lambda x: tuple(np.asarray(part) for part in loss(x, points)),
        np.asarray(flat),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5_000, "maxfun": 5_000, "maxcor": 50, "ftol": 1e-15, "gtol": 1e-6},
    )
    return back(jnp.asarray(found.x)), -float(found.fun)


def drawn(model: Model, given: Parameters, *, factorised: bool) -> tuple[float, float]:
    """The ELBO and its standard error from plain draws and the model's own log density: what the algebra must equal."""
    keep = 0.0 if factorised else 1.0
    shared = lower(given["shared_scale"], keep * given["shared_below"])
    own = lower(given["own_scale"], keep * given["own_below"])
    groups = len(own)

    def one(key: Any) -> Any:
        of_shared, of_own = jax.random.split(key)
        point, noise = jax.random.normal(of_shared, (SHARED,)), jax.random.normal(of_own, (groups, 2))
        five = given["shared"] + shared @ point
        standard = given["own"] + keep * given["coupled"] @ point + jnp.einsum("gij,gj->gi", own, noise)
        sites = {"mean": five[:2], "sd": five[2:4], "sigma": five[4], "standard": standard}
        log_q = -given["shared_scale"].sum() - given["own_scale"].sum()
        log_q -= 0.5 * ((point**2).sum() + (noise**2).sum() + (SHARED + 2 * groups) * _LOG_2PI)
        return model.log_density(sites, model.arrays) - log_q

    keys = jax.random.split(jax.random.PRNGKey(1), DRAWS)
    terms = np.asarray(jax.lax.map(one, keys, batch_size=AT_ONCE))
    return float(terms.mean()), float(terms.std(ddof=1) / math.sqrt(len(terms)))


def measure(model: Model, guide: str, count: int) -> dict[str, Any]:
    """One row of the yardsticks' table."""
    begun = time.perf_counter()
    factorised = guide == "mean_field"
    known = {name: jnp.asarray(value) for name, value in statistics(model).items()}
    groups = model.dataset.static["groups"]
    given = begin(groups)
    for number in (64, count):  # first on few points
        given, inside = best(given, nodes(number, seed=0), known, factorised=factorised)
    unseen = [nodes(count, seed) for seed in range(1, SCRAMBLES + 1)]
    value = jax.jit(partial(elbo, factorised=factorised))
    values = np.array([float(value(given, points, known)) for points in unseen])
    gain = best(given, unseen[0], known, factorised=factorised)[1] - values[0]
    se = float(values.std(ddof=1) / math.sqrt(SCRAMBLES))
    print(f"{guide}: {inside:.5f} on the points fitted to, {values.mean():.5f} +- {se:.1g} on others", flush=True)
    print(f"    a climb on points not seen gains {gain:.2g} nats", flush=True)
    plain = drawn(model, given, factorised=factorised)
    print(f"    plain draws and the model's own density: {plain[0]:.3f} +- {plain[1]:.2g}", flush=True)
    if abs(plain[0] - values.mean()) > 4 * plain[1]:
        raise RuntimeError(f"Expected {values.mean():.3f} from plain draws; got {plain[0]:.3f} +- {plain[1]:.2g}.")
    return {
        "posterior": "hierarchy_999",
        "guide": guide,
        "d": SHARED + 2 * groups,
        "rank": "" if factorised else SHARED + 2 * groups,
        "elbo": round(float(values.mean()), 4),
        "se": f"{se:.2g}",
        "last_gain": f"{gain:.2g}",
        "seconds": round(time.perf_counter() - begun),
        "note": "by quadrature over the five shared scalars; last_gain: of a climb on points not seen",
        "command": f"python benchmarks/hierarchy_optimum.py --nodes {count}",
    }


def main() -> None:
    """Replace the table's rows of this posterior, or print them for another number of groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=targets_large.GROUPS)
    parser.add_argument("--nodes", type=int, default=4_096)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("yardsticks.csv"))
    given = parser.parse_args()
    with jax.enable_x64(True):
        model = targets_large.hierarchy(given.groups)
        rows = [measure(model, guide, given.nodes) for guide in GUIDES]
    if given.groups != targets_large.GROUPS:
        return
    with given.out.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["posterior"] != "hierarchy_999"]
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, yardsticks.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *rows])


if __name__ == "__main__":
    main()
