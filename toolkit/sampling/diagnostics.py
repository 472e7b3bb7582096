"""Whether draws may be believed: ArviZ's diagnostics for every scalar, and the sentence for each failed check."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from arviz_stats.base import array_stats

from toolkit.sampling.nuts import MAX_TREE_DEPTH
from toolkit.status import Status

RHAT_LIMIT = 1.01
"""Vehtari, Gelman, Simpson, Carpenter & Buerkner 2021, section 4."""

ESS_LIMIT = 400
"""Vehtari et al. 2021, section 4: 100 for each of four chains, below which R-hat itself is too noisy."""

EBFMI_LIMIT = 0.3
"""Betancourt 2016 found trouble below 0.2 to 0.3; the upper end, as Stan's own check has it."""

TAILS = (0.05, 0.95)
"""The quantiles whose ESS is the tail ESS (Vehtari et al. 2021, section 4.3)."""

_MODE_SDS = 1.0
"""Mean log densities further apart than this many within-chain sds cannot be chains of one posterior ..."""

_MODE_SES = 5.0
"""... if the distance is also this many standard errors, so that few draws alone do not look like modes."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the checks look at; what is not known is None and not checked.

    Attributes:
        table: Scalar name to rhat, ess_bulk and ess_tail, from `diagnose`.
        not_finite: Names of the scalars with draws that are NaN or infinite.
        transitions: How many draws there are in all chains.
        divergences: How many of them end a divergent transition.
        tree_depth_hits: How many of them used the largest tree.
        ebfmi: The energy's Bayesian fraction of missing information, `(chain,)`.
        log_density: Log p(x, z) in unconstrained space, `(chain, draw)`, in nats.
    """

    table: pd.DataFrame
    not_finite: tuple[str, ...]
    transitions: int
    divergences: int | None = None
    tree_depth_hits: int = 0
    ebfmi: np.ndarray | None = None
    log_density: np.ndarray | None = None


def diagnose(names: Sequence[str], values: np.ndarray) -> pd.DataFrame:
    """R-hat (rank-normalised, split), bulk ESS and tail ESS of each scalar; NaN for one that never varies.

    Computed by ArviZ, 3 s for 1,000 scalars of 4,000 draws. A single chain is judged by its halves.

    Args:
        names: One name for each scalar; the table's index.
        values: The draws, `(chain, draw, scalar)`.
    """
    if values.shape[0] == 1:
        half = values.shape[1] // 2
        values = np.concatenate([values[:, :half], values[:, half : 2 * half]])
    finite = np.isfinite(values).all(axis=(0, 1))
    judged = np.flatnonzero(finite & (values.max(axis=(0, 1)) > values.min(axis=(0, 1))))
    table = pd.DataFrame(np.nan, index=pd.Index(names, name="scalar"), columns=["rhat", "ess_bulk", "ess_tail"])
    draws = np.ascontiguousarray(np.moveaxis(values[:, :, judged], -1, 0))
    # A chain that stands still has no variance: R-hat is infinite then, which is what the check should see.
    with np.errstate(divide="ignore", invalid="ignore"):
        table.iloc[judged, 0] = array_stats.rhat(draws, chain_axis=1, draw_axis=2)
        table.iloc[judged, 1] = array_stats.ess(draws, chain_axis=1, draw_axis=2, method="bulk")
        table.iloc[judged, 2] = array_stats.ess(draws, chain_axis=1, draw_axis=2, method="tail", prob=TAILS)
    return table


def energy_fraction(energy: np.ndarray) -> np.ndarray:
    """E-BFMI of each chain, `(chain,)`, from the Hamiltonians `(chain, draw)`; ArviZ's."""
    return np.asarray(array_stats.bfmi(energy, chain_axis=0, draw_axis=1))


def judge(evidence: Evidence) -> tuple[Status, tuple[str, ...]]:
    """The worst failed check as a status (PASSED if none failed), and a sentence for each failed check.

    The order is: chains that disagree, divergences, slow energy, few effective draws. What stands first puts
    what stands after it in doubt.
    """
    failed = [
        *((Status.RHAT, sentence) for sentence in (_rhat(evidence), _modes(evidence)) if sentence),
        *((Status.DIVERGENCES, sentence) for sentence in (_divergences(evidence),) if sentence),
        *((Status.LOW_ENERGY, sentence) for sentence in (_energy(evidence),) if sentence),
        *((Status.FEW_DRAWS, sentence) for sentence in (_ess(evidence, "bulk"), _ess(evidence, "tail")) if sentence),
    ]
    if not failed:
        return Status.PASSED, ()
    sentences = [sentence for _, sentence in failed]
    if evidence.tree_depth_hits:
        sentences.append(
            f"{evidence.tree_depth_hits:,} of {evidence.transitions:,} transitions used the largest tree "
            f"(depth {MAX_TREE_DEPTH}): the step size is small for the posterior's extent; another chart may help."
        )
    return failed[0][0], tuple(sentences)


def _rhat(evidence: Evidence) -> str:
    if evidence.not_finite:
        others = f" and {len(evidence.not_finite) - 1} more" if len(evidence.not_finite) > 1 else ""
        return f"R-hat cannot be computed for {evidence.not_finite[0]}{others}: some draws are NaN or infinite."
    rhat = evidence.table["rhat"].dropna()
    above = rhat[rhat > RHAT_LIMIT]
    if above.empty:
        return ""
    return (
        f"R-hat is {rounded_rhat(above.max())} for {above.idxmax()} and above {RHAT_LIMIT} (Vehtari et al. 2021) for "
        f"{len(above):,} of {len(rhat):,} scalars: the chains have not mixed; draw more, or look for several modes."
    )


def _modes(evidence: Evidence) -> str:
    """Chains that sit at different heights, as in different modes of a mixture (METHODS, traps)."""
    if evidence.log_density is None or evidence.log_density.shape[0] < 2:
        return ""
    levels = evidence.log_density.mean(axis=1)
    sds = evidence.log_density.std(axis=1, ddof=1)
    sizes = np.array(
        [array_stats.ess(chain[None], chain_axis=0, draw_axis=1, method="mean") for chain in evidence.log_density]
    )
    low, high = int(levels.argmin()), int(levels.argmax())
    gap = levels[high] - levels[low]
    spread = math.sqrt((sds**2).mean())
    se = math.sqrt(sds[low] ** 2 / sizes[low] + sds[high] ** 2 / sizes[high])
    if not gap > max(_MODE_SDS * spread, _MODE_SES * se):
        return ""
    return (
        f"The mean log density of chain {low + 1} lies {gap:.4g} nats below that of chain {high + 1}, "
        f"{gap / spread if spread else math.inf:.3g} times the spread within a chain: the chains sit in different "
        "modes, and their draws together are not the posterior."
    )


def _divergences(evidence: Evidence) -> str:
    if not evidence.divergences:
        return ""
    return (
        f"{evidence.divergences:,} of {evidence.transitions:,} transitions diverged (limit 0; Betancourt 2017, "
        "section 6.2): part of the posterior may be missing; try another chart, such as non-centred, or a higher "
        "target acceptance."
    )


def _energy(evidence: Evidence) -> str:
    if evidence.ebfmi is None or not (evidence.ebfmi < EBFMI_LIMIT).any():
        return ""
    chain = int(evidence.ebfmi.argmin())
    return (
        f"E-BFMI is {evidence.ebfmi[chain]:.2f} in chain {chain + 1} (limit {EBFMI_LIMIT}, Betancourt 2016): heavy "
        "tails or a funnel; try another chart."
    )


def _ess(evidence: Evidence, part: str) -> str:
    ess = evidence.table[f"ess_{part}"].dropna()
    below = ess[ess < ESS_LIMIT]
    if below.empty:
        return ""
    return (
        f"The {part} ESS is {math.floor(below.min())} for {below.idxmin()} and below {ESS_LIMIT} (Vehtari et al. 2021) "
        f"for {len(below):,} of {len(ess):,} scalars: draw more."
    )


def rounded_rhat(rhat: float) -> str:
    """R-hat to three digits, rounded up, so that what is above the limit does not look as if it kept it."""
    return f"{math.ceil(rhat * 1_000 * (1 - 1e-9)) / 1_000:.3f}" if rhat < 10 else f"{rhat:.3g}"
