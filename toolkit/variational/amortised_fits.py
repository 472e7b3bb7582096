"""The amortised family as the Gaussian solvers see it, and a fitted function carried over to other units."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from toolkit.status import Status
from toolkit.variational.amortised_guides import FREE, AutoAmortisedNormal, Layout
from toolkit.variational.certificates import USABLE_LIMIT
from toolkit.variational.gaussians import Frame, Member, Quadratic

_LOG_2PI = float(np.log(2 * np.pi))
_ROOT_2 = float(np.sqrt(2.0))
_AWAY = 1e-6  # nats: a unit from which another step promises more is not at its mode


@dataclass(frozen=True)
class AmortisedMember(Member):
    """A Gaussian with amortised branches.

    Attributes:
        params: The autoguide's parameters, the constants among them.
    """

    params: Mapping[str, Any] | None = None


class Amortised:
    """The Gaussians with amortised branches, for the solvers of Gaussian families (`gaussians.Family`).

    The shared coordinates have a location and a Cholesky factor measured by the frame's margin of them, as in
    `Triangular`; then come the weights, from those at which each branch is what the unit's summary at the frame says.
    Where the posterior is Gaussian that is the optimum, and the ELBO's curvature in all that the function gives is one.

    Args:
        frame: What the parameters are measured with, and where units are summed up.
        guide: The autoguide, set up on its model.
    """

    def __init__(self, frame: Frame, guide: AutoAmortisedNormal) -> None:
        self._guide, blocks = guide, guide.blocks
        self.size = self.base = blocks.size
        self.shared = blocks.shared
        self._order = np.array(blocks.order)
        own = self._order[: self.shared]
        self._loc = frame.loc[own]
        covariance = np.diag(frame.factor**2) if frame.factor.ndim == 1 else frame.factor @ frame.factor.T
        self._root = np.linalg.cholesky(covariance[np.ix_(own, own)])
        self.constants = guide.constants_at(frame.loc, self._root)
        self._below = np.tril_indices(self.shared, -1)
        self._begin = guide.begin
        self._programs = _programs(guide.layout)
        self._held = {**self.constants, "loc": self._loc, "root": self._root, "begin": self._begin}
        self.parameters = 2 * self.shared + len(self._below[0]) + len(self._begin)

    def member(self, x: np.ndarray) -> AmortisedMember:
        """The Gaussian of these parameters."""
        with jax.enable_x64(True):
            found = self._programs.member(x, self._held)
        loc, ordered, *own = (np.asarray(part) for part in found)
        prefix = self._guide.prefix
        params = dict(zip(FREE, own, strict=True)) | self.constants
        return _as_member(self._order, loc, ordered, {f"{prefix}_{name}": value for name, value in params.items()})

    undrawn = member

    def near(self, member: Member) -> np.ndarray:
        """The parameters of a member of this family, with these constants.

        Raises:
            ValueError: It is a member of another.
        """
        prefix = self._guide.prefix
        params = member.params if isinstance(member, AmortisedMember) else None
        if params is None or any((params[f"{prefix}_{n}"] != value).any() for n, value in self.constants.items()):
            raise ValueError("Expected a Gaussian with amortised branches around this reference; got another.")
        loc, scale_tril, weights = (np.asarray(params[f"{prefix}_{n}"]) for n in FREE)
        triangle = scipy.linalg.solve_triangular(self._root, scale_tril, lower=True)
        shift = scipy.linalg.solve_triangular(self._root, loc - self._loc, lower=True)
        log_diagonal = _ROOT_2 * np.log(np.diag(triangle))
        return np.concatenate([shift, log_diagonal, triangle[self._below], weights - self._begin])

    def points(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Draws."""
        assert member.factor is not None
        return member.loc + base @ member.factor.T

    def scores(self, member: Member, base: np.ndarray) -> np.ndarray:
        """Minus the gradient of log q at the draws."""
        scores = np.empty_like(base)
        scores[:, self._order] = scipy.linalg.solve_triangular(self._ordered(member), base.T, lower=True, trans="T").T
        return scores

    def pull(self, x: np.ndarray, member: Member, base: np.ndarray, gradients: np.ndarray) -> np.ndarray:
        """The gradient of a mean over draws."""
        ordered = gradients[:, self._order]
        return self._pulled(x, ordered.mean(0), ordered.T @ base / len(base))

    def mean(self, members: Sequence[np.ndarray]) -> np.ndarray:
        """Parameters in the middle: of climbs from one place, whose networks have not changed places."""
        return np.mean(members, axis=0)

    def entropy(self, member: Member) -> float:
        """In nats."""
        return float(np.log(np.diag(self._ordered(member))).sum()) + 0.5 * self.size * (1 + _LOG_2PI)

    def exact(self, x: np.ndarray, member: Member, quadratic: Quadratic) -> tuple[float, np.ndarray]:
        """Entropy plus the mean of a quadratic."""
        assert member.factor is not None
        value, by_loc = quadratic.at_one(member.loc)
        pulled = quadratic.times(member.factor.T).T
        value += self.entropy(member) - 0.5 * float(np.einsum("ij,ij->", member.factor, pulled))
        by_factor = -pulled[self._order] + np.diag(1 / np.diag(self._ordered(member)))
        return value, self._pulled(x, by_loc[self._order], by_factor)

    def bend(self, x: np.ndarray, quadratic: Quadratic) -> np.ndarray:
        """Minus the Hessian behind the shifts, where what the function gives has curvature one (Gauss-Newton)."""
        weights = x[self.parameters - len(self._begin) :]
        with jax.enable_x64(True):
            bent = np.asarray(self._programs.bent(weights, self._held))
        rest = self.parameters - self.shared - len(weights)
        return scipy.linalg.block_diag(np.eye(rest), bent)

    def _pulled(self, x: np.ndarray, by_loc: np.ndarray, by_factor: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(self._programs.pulled(x, self._held, by_loc, by_factor))

    def _ordered(self, member: Member) -> np.ndarray:
        assert member.factor is not None
        return member.factor[self._order]


class _Programs(NamedTuple):
    """Compiled for a layout: the member of parameters, a gradient pulled back to them, and the weights' curvature."""

    member: Callable[..., Any]
    pulled: Callable[..., Any]
    bent: Callable[..., Any]


@functools.lru_cache(maxsize=32)
def _programs(layout: Layout) -> _Programs:
    """The programs, which serve every frame: what they hold (`held`) is an argument."""
    below = np.tril_indices(layout.shared, -1)
    ends = np.cumsum([layout.shared, layout.shared, len(below[0])])

    def member(x: Any, held: Any) -> tuple[Any, ...]:
        shift, log_diagonal, under, more = jnp.split(x, ends)
        loc, weights = held["loc"] + held["root"] @ shift, held["begin"] + more
        scale_tril = held["root"] @ jnp.diag(jnp.exp(log_diagonal / _ROOT_2)).at[below].set(under)
        return *layout.place(loc, scale_tril, weights, held), loc, scale_tril, weights

    def pulled(x: Any, held: Any, by_loc: Any, by_factor: Any) -> Any:
        _, back = jax.vjp(lambda x: member(x, held)[:2], x)
        return back((by_loc, by_factor))[0]

    def bent(more: Any, held: Any) -> Any:
        found = []
        for run, (branch, weights) in enumerate(zip(layout.branches, layout.split(held["begin"] + more), strict=True)):
            slopes = jax.jacobian(branch)(weights, layout.features(run, held)).reshape(-1, branch.weights)
            found.append(slopes.T @ slopes)
        return jax.scipy.linalg.block_diag(*found) if found else jnp.zeros((0, 0))

    return _Programs(jax.jit(member), jax.jit(pulled), jax.jit(bent))


def amortised_member(guide: AutoAmortisedNormal, params: Mapping[str, Any]) -> AmortisedMember:
    """The Gaussian with the autoguide's parameters."""
    with jax.enable_x64(True):
        free = [jnp.asarray(params[f"{guide.prefix}_{name}"]) for name in FREE]
        loc, factor = (np.asarray(part) for part in jax.jit(guide.layout.place)(*free, guide.constants_of(params)))
    return _as_member(np.array(guide.blocks.order), loc, factor, dict(params))


def _as_member(order: np.ndarray, loc: np.ndarray, ordered: np.ndarray, params: Mapping[str, Any]) -> AmortisedMember:
    """A member from a location and a factor in the order of the blocks."""
    own, factor = np.empty_like(loc), np.empty_like(ordered)
    own[order], factor[order] = loc, ordered
    return AmortisedMember(own, factor=factor, params=params)


def with_units(
    guide: AutoAmortisedNormal, params: Mapping[str, Any], ended: Status, message: str
) -> tuple[Status, str]:
    """How a fit ended, and a detail on it, once units that are not at their modes are counted.

    Of them a certificate says nothing: it compares members of the family around these summaries.
    """
    runs = range(len(guide.layout.branches))
    left = np.concatenate([np.empty(0), *(np.asarray(params[f"{guide.prefix}_units_left_{run}"]) for run in runs)])
    away = left[~(left <= _AWAY)]
    if not (len(away) and ended.has_optimum):
        return ended, message
    promised = f"{away.sum():.2g} nats" if np.isfinite(away.sum()) else "no finite density"
    lost = f"{len(away):,} of {len(left):,} units were not found at their modes"
    told = f"{lost}, from which another step promised {promised}"
    if ended.ok:
        ended = Status.UNPROVEN if away.sum() <= USABLE_LIMIT else Status.AWAY
    return ended, f"{message}; {told}" if message else told
