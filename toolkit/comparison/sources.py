"""Draws of the reference and of every guide, brought to the same scalars under the same labelling."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.modelling.scalars import Scalars, scalars
from toolkit.status import Status
from toolkit.variational.certificates import Certificate

# Numbers drawn at once (256 MB): each call compiles anew, so that smaller pieces cost more than they save.
_AT_ONCE = 32_000_000


class Named(Protocol):
    """What tables call an approximation; a `Guide` is one."""

    @property
    def name(self) -> str:
        """For rows, columns and files."""

    @property
    def title(self) -> str:
        """For figures and tables that are read."""


class Approximation(Protocol):
    """What `compare` asks of a fit: a `Fit` has it, and so may CAVI, EP or a closed form."""

    @property
    def guide(self) -> Named:
        """What it is called."""

    @property
    def status(self) -> Status:
        """How it ended; only an ok one is judged."""

    @property
    def message(self) -> str:
        """A detail on the status, or the empty string."""

    @property
    def elbo(self) -> Estimate | None:
        """In nats, if known."""

    @property
    def fresh_log_weights(self) -> np.ndarray | None:
        """Log p(x, z) - log q(z) at independent draws z, (draws,), in nats; None without a density."""

    @property
    def cost(self) -> Cost:
        """What it took."""

    @property
    def usable(self) -> bool:
        """Whether it can draw."""

    def draw(self, key: jax.Array, draws: int, sites: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
        """Independent draws of the sites asked for, (draws, ...) each, in constrained space."""


@runtime_checkable
class Weighed(Protocol):
    """What an approximation has if its density is known; without it the gap below the evidence is all that is told."""

    @property
    def certificate(self) -> Certificate | None:
        """How far the family's best may lie above it; None if that is not known."""

    @property
    def fresh_log_weights(self) -> np.ndarray | None:
        """As `Approximation` has it."""

    def log_weights_at(self, draws: Mapping[str, np.ndarray]) -> np.ndarray:
        """Log p(x, z) - log q(z) at values of the model's latent sites, (draws,), in nats."""


@runtime_checkable
class Reweighable(Approximation, Protocol):
    """What an approximation has whose draws can be weighted."""

    def log_weights(self, key: jax.Array, draws: int) -> np.ndarray:
        """Log p(x, z) - log q(z) at the draws that `draw` gives for the same key, (draws,), in nats."""


def key_for(key: jax.Array, name: str) -> jax.Array:
    """A key that belongs to a name alone, so that adding a guide changes no other guide's numbers."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def sites_to_draw(model: Model) -> tuple[str, ...]:
    """The quantities' sites, and the one that labels are matched by."""
    sites = [quantity.site for quantity in model.quantities]
    return tuple(dict.fromkeys(sites + ([model.labels.by] if model.labels else [])))


def guide_draws(model: Model, fit: Approximation, key: jax.Array, draws: int) -> dict[str, np.ndarray]:
    """Independent draws of a fit, site name to (1, draws, ...), float64, as the fit labels them."""
    sites = sites_to_draw(model)
    size = sum(int(np.prod(model.sites[site].shape, dtype=int)) for site in sites)
    step = max(1, min(draws, _AT_ONCE // max(size, 1)))
    pieces = []
    for i, start in enumerate(range(0, draws, step)):
        piece = fit.draw(jax.random.fold_in(key, i), min(step, draws - start), sites)
        pieces.append({site: np.asarray(piece[site], dtype=np.float64) for site in sites})
    return {site: np.concatenate([piece[site] for piece in pieces])[None] for site in sites}


def labelling(model: Model, draws: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """What other sources are relabelled to: the mean of the site that labels are matched by; None without labels.

    The draws themselves have one labelling already.

    Raises:
        ValueError: The draws lack that site.
    """
    if model.labels is None:
        return None
    by = model.labels.by
    if by not in draws:
        raise ValueError(
            f"Expected the reference to hold draws of '{by}', which labels are matched by; got {', '.join(draws)}: "
            f"make it a quantity of model '{model.name}'."
        )
    return np.asarray(draws[by], dtype=np.float64).mean(axis=(0, 1))


def to_scalars(model: Model, draws: Mapping[str, np.ndarray], anchor: np.ndarray | None) -> Scalars:
    """The draws' scalars, each draw relabelled to the anchor where the model has labels."""
    if model.labels is not None and anchor is not None:
        draws = model.labels.relabel(draws, anchor=anchor)
    return scalars(model, draws)


def thinned(source: Scalars, draws: int = 1_000) -> Scalars:
    """At most so many draws, evenly taken from every chain, in their order."""
    chains, length = source.values.shape[:2]
    keep = np.unique(np.linspace(0, length - 1, max(1, min(length, draws // chains))).astype(int))
    return replace(source, values=source.values[:, keep])
