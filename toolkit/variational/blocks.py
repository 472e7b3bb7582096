"""Gaussian guides with structure: full within blocks, and between blocks only what shared coordinates explain.

A draw is z = loc + L eps. In an order of the coordinates that puts the shared ones first, L is lower-triangular and
zero outside a pattern: dense among the shared, full within each local block and, where blocks are `coupled`, with a
column of every shared coordinate in every block:

    L = [ S          ]      shared (population means, scales, ...)
        [ A1 D1      ]      block 1 (the intercept and slope of county 1)
        [ A2    D2   ]      block 2
        [ A3       D3]      block 3

**What `coupled` can express.** Given the shared z_0, and so eps_0, block i is loc_i + Ai eps_0 + Di eps_i, and each
block has an eps_i of its own: the blocks are independent given the shared coordinates, with a mean linear in them.
Conversely, if they are, the Schur complement of the shared block in the covariance is block-diagonal, and so is its
Cholesky factor: every such Gaussian has this pattern. Hence the family is that of Tan & Nott (2018), whose Cholesky
factor is the *precision's*, with the locals first (inverted and with the order reversed, theirs is the one above),
and the branch family q(z_0) prod_i q(z_i | z_0) of Agrawal & Domke (2021) with Gaussian branches. Where the
model has this independence, a Gaussian posterior lies in the family. The family `blocks` leaves the A out: its blocks
are independent of the shared coordinates, too.

Which coordinates are shared is found by `toolkit.variational.block_search`.

References:
    Tan & Nott (2018), Gaussian variational approximation with sparse precision matrices, Statistics and Computing 28,
        259-275.
    Agrawal & Domke (2021), Amortized variational inference for simple hierarchical models, NeurIPS 34.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Run:
    """Blocks of one size and origin.

    Attributes:
        count: How many.
        size: Coordinates in each.
        sites: Whose coordinates they are.
        plate: What they lie along; empty where sites were named, or left on their own.
    """

    count: int
    size: int
    sites: tuple[str, ...]
    plate: str = ""

    @property
    def words(self) -> str:
        """Such as "85 blocks of 2 along 'county' (alpha, beta)"."""
        sites = f" ({', '.join(self.sites)})"
        if not self.plate and self.size == 1 and self.count > 1:
            return f"{self.count:,} coordinates each on its own{sites}"
        blocks = f"{self.count:,} block{'' if self.count == 1 else 's'} of {self.size:,}"
        return blocks + (f" along '{self.plate}'" if self.plate else "") + sites


@dataclass(frozen=True)
class Blocks:
    """Where the Cholesky factor of a Gaussian may differ from zero; hashable.

    Attributes:
        order: `order[k]` is the unconstrained coordinate at place k: the shared ones, then block after block.
        shared: How many coordinates, the first of `order`, form the shared block.
        runs: The blocks that follow.
        coupled: Whether every block also has the columns of the shared coordinates.
        note: Why it is so, for the report, where nothing but shared coordinates was found or nothing could be tried.

    Raises:
        ValueError: `order` is no permutation, or shared coordinates and blocks do not add up to it.
    """

    order: tuple[int, ...]
    shared: int
    runs: tuple[Run, ...] = ()
    coupled: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(self.size)):
            raise ValueError(f"Expected order to hold each of 0, ..., {self.size - 1} once; got {self.order}.")
        held = self.shared + sum(run.count * run.size for run in self.runs)
        if held != self.size or self.shared < 0:
            raise ValueError(f"Expected shared coordinates and blocks to add up to {self.size}; got {held}.")

    @property
    def size(self) -> int:
        """How many unconstrained coordinates there are."""
        return len(self.order)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the blocks after the shared one."""
        return tuple(itertools.chain.from_iterable((run.size,) * run.count for run in self.runs))

    @property
    def places(self) -> np.ndarray:
        """The inverse of `order`, (size,): the place of each coordinate."""
        return np.argsort(self.order)

    @functools.cached_property
    def pattern(self) -> np.ndarray:
        """Which entries of the factor may differ from zero, bool (size, size), with rows and columns in `order`."""
        number = np.repeat(np.arange(len(self.sizes) + 1), (self.shared, *self.sizes))
        allowed = number[:, None] == number[None, :]
        if self.coupled:
            allowed[:, : self.shared] = True
        pattern = np.tril(allowed)
        pattern.flags.writeable = False
        return pattern

    @property
    def full(self) -> bool:
        """Whether nothing is left out: the family is that of the full-rank Gaussian."""
        return int(self.pattern.sum()) == self.size * (self.size + 1) // 2

    @property
    def words(self) -> str:
        """A sentence for the report, without a full stop."""
        shared = f"{self.shared:,} shared coordinate{'' if self.shared == 1 else 's'}"
        if not self.runs:
            return f"{shared} in one full block, as in full rank" + (f": {self.note}" if self.note else "")
        parts = [run.words for run in self.runs]
        if self.shared:
            parts.append(f"{shared} {'coupled to all' if self.coupled else 'in a block of their own'}")
        return "; ".join([*parts, self.note] if self.note else parts)
