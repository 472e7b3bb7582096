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

_STEPS, _HALVINGS = 50, 20
_DECREMENT = 1e-12  # nats of Newton's step, from which on a unit is at its mode
_LEAST_GAIN = 0.1  # of what a step promises: less, and it is too long
_FLATTEST = 1e-8  # of a unit's largest curvature


@dataclass(frozen=True, eq=False)
class Units:
    """A summary of the units along one run of blocks.

    Attributes:
        centre: m, the branch's mean at the reference's location, (units, size).
        spread: D, the lower Cholesky factor of P^-1, (units, size, size).
        slope: D^-1 A, how far the mean moves with e, in units of D, (units, size, shared).
        left: Nats that another step towards its mode promised a unit where the search for it ended, at that value of
            z_0 where it was most, (units,).
    """

    centre: np.ndarray
    spread: np.ndarray
    slope: np.ndarray
    left: np.ndarray

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
            locals_: Where the search for the units' modes begins, (sizes,): the same for all units of a run, so that
                what is said of a unit follows from its own data, even where it has several modes.
        """
        if not self.members:
            return ()
        shared = self.blocks.shared
        # Without shared coordinates there is one value of them.
        away = np.sqrt(shared) * np.concatenate([np.eye(shared), -np.eye(shared)]) if shared else np.zeros((1, 0))
        begin = np.empty(self.blocks.size)
        begin[self._shared] = loc
        for own, local in zip(self.members, self.split(locals_), strict=True):
            begin[own] = local
        centre, _, _ = self._modes(begin)
        found = []
        for e in away:
            vector = centre.copy()
            vector[self._shared] = loc + scale_tril @ e
            found.append(self._modes(vector))
        summed = []
        for run, own in enumerate(self.members):
            modes, curved = (
                np.stack(part) for part in zip(*((at[own], bent[run]) for at, bent, _ in found), strict=True)
            )
            left = np.max([left[run] for _, _, left in found], axis=0)
            summed.append(_regressed(away, modes, curved, left))
        return tuple(summed)

    def _modes(self, vector: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """The point with every unit at its mode, given its shared coordinates; P_i there and nats left, for each run.

        By Newton's method, all units side by side and each with steps of its own length; one step leads there where a
        unit's density is Gaussian given the shared coordinates. A unit that no step takes further stays where it is;
        if it is one number, that is its mode, at a kink of its density.
        """
        derivatives = self._derivatives(vector)
        stuck = [np.zeros(len(own), dtype=bool) for own in self.members]
        for number in range(_STEPS + 1):
            gradient, columns = derivatives
            curved = [self._precision(columns, own) for own in self.members]
            steps = [self._newton(gradient, own, bent) for own, bent in zip(self.members, curved, strict=True)]
            going = [~held for held in stuck]
            far = [goes & ~(promised < _DECREMENT) for goes, (_, promised) in zip(going, steps, strict=True)]
            if number == _STEPS or not any(one.any() for one in far):
                break
            vector, derivatives, refused = self._stepped(vector, derivatives, steps, going)
            stuck = [held | own for held, own in zip(stuck, refused, strict=True)]
        left = [
            np.where(np.isfinite(promised), np.where(held & (own.shape[1] == 1), 0.0, promised), np.inf)
            for own, held, (_, promised) in zip(self.members, stuck, steps, strict=True)
        ]
        return vector, curved, left

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
            return np.array(first), np.array(second)

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
        """Each unit's step (units, size), and what it promises in nats, g' P^-1 g / 2, (units,)."""
        slope = gradient[own]
        step = np.linalg.solve(bent, np.where(np.isfinite(slope), slope, 0.0)[..., None])[..., 0]
        return step, 0.5 * np.einsum("ni,ni->n", slope, step)

    def _stepped(
        self,
        vector: np.ndarray,
        derivatives: tuple[np.ndarray, np.ndarray],
        steps: list[tuple[np.ndarray, np.ndarray]],
        going: list[np.ndarray],
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
        """The point after a step of every unit that goes on, the derivatives there, and which units no step took on.

        A step is halved until it gains a share of what it promises. What a unit's log density gains is had from its
        gradient at both ends, since log p itself is one number for all units. The gradient's size would be no guide:
        on the way up from a tail in which the density is bent upwards, it grows.
        """
        gradient, columns = derivatives
        lengths = [goes.astype(float) for goes in going]
        for _ in range(_HALVINGS):
            tried = vector.copy()
            for own, (step, _), length in zip(self.members, steps, lengths, strict=True):
                tried[own] += length[:, None] * step
            slopes, bends = self._derivatives(tried)
            worse = []
            for own, (step, promised), length in zip(self.members, steps, lengths, strict=True):
                gain = 0.5 * length * np.einsum("ni,ni->n", gradient[own] + slopes[own], step)
                worse.append((length > 0) & ~(gain >= _LEAST_GAIN * length * promised - _DECREMENT))
            if not any(one.any() for one in worse):
                break
            lengths = [np.where(one, length / 2, length) for one, length in zip(worse, lengths, strict=True)]
        # No unit enters another's derivatives: those of a unit that stays are what they were.
        for own, one in zip(self.members, worse, strict=True):
            tried[own[one]], slopes[own[one]] = vector[own[one]], gradient[own[one]]
            bends[:, own[one]] = columns[:, own[one]]
        return tried, (slopes, bends), worse


def _regressed(away: np.ndarray, modes: np.ndarray, curved: np.ndarray, left: np.ndarray) -> Units:
    """Equations (1), solved for each unit of a run.

    Args:
        away: Values of e, (values, shared).
        modes: u_i there, (values, units, size).
        curved: P_i there, (values, units, size, size).
        left: What the search for them has left, (units,).
    """
    values, units, size = modes.shape
    design = np.concatenate([np.ones((values, 1)), away], axis=1)
    columns = design.shape[1]
    normal = np.einsum("vnij,va,vb->naibj", curved, design, design).reshape(units, columns * size, columns * size)
    right = np.einsum("vnij,vnj,va->nai", curved, modes, design).reshape(units, columns * size, 1)
    found = np.linalg.solve(normal, right).reshape(units, columns, size)
    spread = np.stack([inverse_factor(one) for one in curved.mean(0)])
    return Units(found[:, 0], spread, np.linalg.solve(spread, found[:, 1:].transpose(0, 2, 1)), left)
