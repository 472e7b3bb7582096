"""What a unit's own data say about it: the best Gaussian branch around a reference, had without fitting.

Given the shared coordinates z_0, the part of log p that a unit's coordinates z_i enter is the unit's alone: its
likelihood and its prior. Which rows of which arrays belong to it need not be known, since log p's derivatives tell.
At a value of z_0 it has a mode u_i(z_0), and there a curvature P_i(z_0). If p(z_i | z_0, x) is the Gaussian with these,
then of all branches N(z_i | m + A e, P^-1), e = S^-1 (z_0 - r), the one with the least KL(q || p) under a reference
q(z_0) = N(r, S S') has

    P = E[P_i(z_0)],    E[ P_i(z_0) (m + A e - u_i(z_0)) (1, e') ] = 0,                                    (1)

a mean precision, and a regression of the modes on e that is weighted by precision. The expectations are sums over 2s
values of z_0, r +- sqrt(s) S's columns, exact for polynomials up to the third degree (McNamee & Stenger 1967). Where
log p is quadratic, (1) is the posterior's own branch whatever the reference.

Since no unit enters another's derivatives, all units' are had at once, by one Hessian-vector product for each
coordinate that a unit has.

Reference: McNamee & Stenger (1967), Construction of fully symmetric numerical integration formulas, Numerische
    Mathematik 10, 327-344; the points are those of the cubature Kalman filter (Arasaratnam & Haykin 2009).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from numpyro import handlers

from toolkit.compilation import QUICK
from toolkit.modelling.space import Space
from toolkit.variational.block_search import log_density_of_program
from toolkit.variational.blocks import Blocks
from toolkit.variational.gaussians import inverse_factor

_STEPS, _HALVINGS = 30, 12
_DECREMENT = 1e-12  # nats of Newton's step, from which on a unit is at its mode
_FLATTEST = 1e-8  # of a unit's largest curvature


@dataclass(frozen=True, eq=False)
class Units:
    """A summary of the units along one run of blocks.

    Attributes:
        centre: m, the branch's mean at the reference's location, (units, size).
        spread: D, the lower Cholesky factor of P^-1, (units, size, size).
        slope: D^-1 A, how far the mean moves with e, in units of D, (units, size, shared).
    """

    centre: np.ndarray
    spread: np.ndarray
    slope: np.ndarray

    @property
    def count(self) -> int:
        """How many units."""
        return len(self.centre)

    @property
    def packed(self) -> np.ndarray:
        """All numbers of each unit, (units, size + size^2 + size * shared)."""
        return np.concatenate([part.reshape(self.count, -1) for part in (self.centre, self.spread, self.slope)], axis=1)

    def features(self, local: np.ndarray) -> np.ndarray:
        """What a function of the units is given, without units of measure, (units, 2 size + below + size * shared).

        In the order in which `amortised_guides.Branch` has what it gives: the mean's distance from the reference's
        point, in units of D; the logs of D's diagonal; what is below it, by the row's diagonal entry; the slope.

        Args:
            local: The reference's point for these units, (size,).
        """
        diagonal = np.diagonal(self.spread, axis1=1, axis2=2)
        rows, columns = np.tril_indices(self.centre.shape[1], -1)
        apart = np.linalg.solve(self.spread, (self.centre - local)[..., None])[..., 0]
        below = (self.spread / diagonal[..., None])[:, rows, columns]
        return np.concatenate([apart, np.log(diagonal), below, self.slope.reshape(self.count, -1)], axis=1)


def members(blocks: Blocks) -> list[np.ndarray]:
    """For each run of blocks the unconstrained coordinates of its units, (units, size)."""
    found, begin = [], blocks.shared
    for run in blocks.runs:
        end = begin + run.count * run.size
        found.append(np.array(blocks.order[begin:end]).reshape(run.count, run.size))
        begin = end
    return found


class UnitSummaries:
    """The units of a NumPyro program, summed up at any reference.

    Args:
        program: The NumPyro program.
        args: Its positional arguments.
        kwargs: Its arguments by name.
        space: Its latent sites.
        blocks: Its shared coordinates and the blocks of its units.

    Attributes:
        evaluations: Gradients asked for so far, or what took as long.
    """

    def __init__(
        self,
        program: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        space: Space,
        blocks: Blocks,
    ) -> None:
        self._given = (program, args, kwargs, space)
        self.blocks, self.members, self.evaluations = blocks, members(blocks), 0
        self._shared = np.array(blocks.order[: blocks.shared], dtype=int)

    def around(self, vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A point's shared coordinates (shared,), and for each run the mean over its units of theirs, (sizes,)."""
        means = [vector[own].mean(0) for own in self.members]
        return vector[self._shared], np.concatenate([np.empty(0), *means])

    def split(self, locals_: np.ndarray) -> list[np.ndarray]:
        """A point for the units of each run, from one vector (sizes,)."""
        return np.split(locals_, np.cumsum([run.size for run in self.blocks.runs])[:-1]) if self.members else []

    def at(self, loc: np.ndarray, scale_tril: np.ndarray, locals_: np.ndarray) -> tuple[Units, ...]:
        """A summary for each run of blocks.

        Args:
            loc: Of the reference over the shared coordinates, (shared,).
            scale_tril: Its Cholesky factor, (shared, shared).
            locals_: Where the search for the units' modes begins, the same for all units of a run, (sizes,).
        """
        if not self.members:
            return ()
        vector = np.empty(self.blocks.size)
        for own, local in zip(self.members, self.split(locals_), strict=True):
            vector[own] = local
        vector[self._shared] = loc
        centre = self._modes(vector)
        shared = self.blocks.shared
        # Without shared coordinates there is one value of them.
        away = np.sqrt(shared) * np.concatenate([np.eye(shared), -np.eye(shared)]) if shared else np.zeros((1, 0))
        modes, curved = list[list[np.ndarray]](), list[list[np.ndarray]]()
        for e in away:
            vector = centre.copy()
            vector[self._shared] = loc + scale_tril @ e
            vector = self._modes(vector)
            _, columns = self._derivatives(vector)
            modes.append([vector[own] for own in self.members])
            curved.append([self._precision(columns, own) for own in self.members])
        return tuple(
            _regressed(away, np.stack([one[run] for one in modes]), np.stack([one[run] for one in curved]))
            for run in range(len(self.members))
        )

    def _modes(self, vector: np.ndarray) -> np.ndarray:
        """The point with every unit at its mode, given its shared coordinates.

        By Newton's method, all units side by side and each with steps of its own length; one step leads there where a
        unit's density is Gaussian given the shared coordinates.
        """
        for _ in range(_STEPS):
            gradient, columns = self._derivatives(vector)
            curved = [self._precision(columns, own) for own in self.members]
            steps = [self._newton(gradient, own, bent) for own, bent in zip(self.members, curved, strict=True)]
            if max(decrement.max() for _, decrement in steps) < _DECREMENT:
                break
            vector = self._stepped(vector, curved, steps)
        return vector

    @functools.cached_property
    def _derivatives(self) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """From a point (size,) to the gradient of log p (size,) and Hessian-vector products (tangents, size).

        Along the first, second, ... coordinate of all units at once.
        """
        log_density, arrays = log_density_of_program(*self._given)
        size, most = self.blocks.size, max((run.size for run in self.blocks.runs), default=0)
        tangents = np.zeros((most, size))
        for own in self.members:
            for position in range(own.shape[1]):
                tangents[position, own[:, position]] = 1.0
        gradient = jax.grad(log_density)

        def both(vector: Any, arrays: Any) -> tuple[Any, Any]:
            along = jax.vmap(lambda tangent: jax.jvp(lambda at: gradient(at, arrays), (vector,), (tangent,))[1])
            return gradient(vector, arrays), along(tangents)

        with jax.enable_x64(True), handlers.block():
            compiled = jax.jit(both).lower(np.zeros(size), arrays).compile(QUICK)

        def derivatives(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            self.evaluations += 1 + 2 * most  # a product with the Hessian takes about two gradients
            with jax.enable_x64(True):
                first, second = compiled(vector, arrays)
            return np.asarray(first), np.asarray(second)

        return derivatives

    def _precision(self, columns: np.ndarray, own: np.ndarray) -> np.ndarray:
        """P_i of each unit, (units, size, size), made positive where the density is bent upwards.

        A unit without a finite curvature is taken to have one.
        """
        size = own.shape[1]
        bent = -columns[:size][:, own].transpose(1, 2, 0)
        bent = (bent + bent.transpose(0, 2, 1)) / 2
        bent = np.where(np.isfinite(bent).all((1, 2))[:, None, None], bent, np.eye(size))
        values, vectors = np.linalg.eigh(bent)
        # A saddle's curvature upwards says how far to go as one downwards does.
        values = np.abs(values)
        values = np.maximum(values, np.maximum(_FLATTEST * values.max(1, keepdims=True), np.finfo(float).tiny))
        return np.einsum("nij,nj,nkj->nik", vectors, values, vectors)

    @staticmethod
    def _newton(gradient: np.ndarray, own: np.ndarray, bent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each unit's step (units, size) and g' P^-1 g (units,), twice what it promises in nats."""
        slope = np.where(np.isfinite(gradient[own]), gradient[own], 0.0)
        step = np.linalg.solve(bent, slope[..., None])[..., 0]
        return step, np.einsum("ni,ni->n", slope, step)

    def _stepped(
        self, vector: np.ndarray, curved: list[np.ndarray], steps: list[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """The point after a step of every unit, halved for those whose gradient has not become smaller by it."""
        lengths = [np.ones(len(own)) for own in self.members]
        for _ in range(_HALVINGS):
            tried = vector.copy()
            for own, (step, _), length in zip(self.members, steps, lengths, strict=True):
                tried[own] += length[:, None] * step
            gradient, _ = self._derivatives(tried)
            settled = True
            for own, bent, (_, before), length in zip(self.members, curved, steps, lengths, strict=True):
                finite = np.isfinite(gradient[own]).all(1)
                _, after = self._newton(gradient, own, bent)
                worse = ~finite | (after > before + _DECREMENT)
                length[worse] /= 2
                settled = settled and not worse.any()
            if settled:
                break
        return tried


def _regressed(away: np.ndarray, modes: np.ndarray, curved: np.ndarray) -> Units:
    """Equations (1), solved for each unit of a run.

    Args:
        away: Values of e, (values, shared).
        modes: u_i there, (values, units, size).
        curved: P_i there, (values, units, size, size).
    """
    values, units, size = modes.shape
    design = np.concatenate([np.ones((values, 1)), away], axis=1)
    columns = design.shape[1]
    normal = np.einsum("vnij,va,vb->naibj", curved, design, design).reshape(units, columns * size, columns * size)
    right = np.einsum("vnij,vnj,va->nai", curved, modes, design).reshape(units, columns * size, 1)
    found = np.linalg.solve(normal, right).reshape(units, columns, size)
    spread = np.stack([inverse_factor(one) for one in curved.mean(0)])
    return Units(found[:, 0], spread, np.linalg.solve(spread, found[:, 1:].transpose(0, 2, 1)))
