"""The split of the log evidence in words and tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from toolkit.comparison.gaps import POINT
from toolkit.comparison.sentences import at_most
from toolkit.estimate import Estimate
from toolkit.reporting.contents import Block, Cell, Column, Section, Table
from toolkit.reporting.palette import Look

_LEAST_SE = 5e-4  # nats: no reader needs more decimals


def nats(value: float, se: float = math.nan) -> str:
    """Nats with their error, no finer than thousandths."""
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if not math.isfinite(value):
        return "–"
    if not math.isfinite(se) or se < _LEAST_SE:
        return f"{value:z.3f}".replace("-", "−", 1)
    return f"{Estimate(value, se)}".replace("-", "−", 1)


def room_in_words(row: pd.Series) -> str:
    """How far below the log evidence, and whose it is, such as `20.06 ± 0.05 nats, the optimiser's at most 0.080`."""
    limit, labels = row["optimisation_limit"], row["labels"]
    if math.isfinite(row["kl_qp"]):
        text = f"{nats(row['kl_qp'], row['kl_qp_se'])} nats"
    elif math.isfinite(row["kl_qp_high"]):
        text = f"{max(row['kl_qp_low'], 0.0):.1f} to {row['kl_qp_high']:.1f} nats"
    else:
        text = f"at least {max(row['kl_qp_low'], 0.0):.1f} nats"
    if math.isfinite(limit):
        estimated = " (estimate)" if row["optimisation_scope"] == "estimate" else ""
        text += f", the optimiser's at most {at_most(limit)}{estimated}"
    return text + (f", labels' {labels:.2f}" if labels > 0 else "")


def evidence_in_words(evidence: Any) -> str:
    """The log evidence and how it was had, or why there is none and between what it lies."""
    copies = (
        f" It is that of one labelling; all labellings together have {evidence.log_copies:.3f} nats more."
        if evidence.log_copies
        else ""
    )
    if evidence.estimate is not None:
        how = "known exactly" if evidence.how == "exact" else f"by {evidence.how}"
        return f"Log evidence {nats(*evidence.estimate)} nats, {how}.{copies}"
    ends = [
        f"at {side} {nats(*end)} nats ({what})"
        for end, side, what in (
            (evidence.low, "least", "the highest ELBO"),
            (evidence.high, "most", "the lowest mean of log p(x, z) - log q(z) under the reference"),
        )
        if end is not None
    ]
    between = f" In expectation it is {' and '.join(ends)}." if ends else ""
    return f"The log evidence is not known: {evidence.problem}.{between}{copies}"


_SPLIT = (
    Column("guide", "The family.", numeric=False),
    Column(
        "KL(q || p)",
        "E_q[log q(z) - log p(z | x)], in nats: log evidence minus ELBO, the sum of the next three columns. Where the "
        "evidence is not known, what it lies between in expectation.",
    ),
    Column("optimiser", "At most this much is the optimiser's: the certificate's upper 95 % limit, in nats."),
    Column(
        "family", "What the best of the family still lacks, in nats: KL(q || p) less at most the optimiser's, at least."
    ),
    Column("labels", "What lies in equal labellings that the guide leaves out, in nats; it is nobody's fault."),
    Column(
        "KL(p || q)",
        "E_p[log p(z | x) - log q(z)], in nats, of one labelling: large where the guide is too narrow, and infinite "
        "where its tails are too light, which no finite number of draws shows: then it is told in words.",
    ),
    Column(
        "TV, at most",
        "No probability under the guide differs by more from the posterior's (total variation; from the smaller KL's "
        "upper 95 % limit, by Pinsker or by Bretagnolle and Huber). It bounds no mean and no sd, and at 1 nothing.",
    ),
    Column(
        "seen",
        "The largest difference of distribution functions over all quantities, a probability. Noise alone gives about "
        "0.87 sqrt(1 / ESS + 1 / n) for one quantity, and more for the largest of many; beyond noise it lies below the "
        "limit beside it.",
    ),
)
_PARTS = (
    Column("guide", "The family.", numeric=False),
    Column("ELBO", "Expected log likelihood minus KL(q || prior), and energy plus entropy; in nats."),
    Column("expected log likelihood", "E_q[log p(x | z)], in nats: how well the guide's draws fit the data."),
    Column("KL(q || prior)", "E_q[log q(z) - log p(z)], in nats: what the guide says beyond the prior."),
    Column("energy", "E_q[log p(x, z)], in nats, in the unconstrained space of the model as it is written."),
    Column("entropy", "- E_q[log q(z)] in the same space, in nats: higher is wider; minus infinity for a point."),
)


def own_evidence_sentences(fits: Iterable[Any], evidence: Any) -> list[str]:
    """What algorithms that approximate the log evidence say of it, beside what is known.

    Args:
        fits: The fits.
        evidence: The comparison's `LogEvidence`, of one labelling.
    """
    said = []
    for fit in fits:
        own = getattr(fit, "log_evidence", None)
        if own is None or not math.isfinite(own):
            continue
        text = f"{fit.guide.name}'s own approximation of the log evidence is {nats(own)} nats"
        if evidence.estimate is not None:
            apart, se = own - (evidence.estimate.value + evidence.log_copies), evidence.estimate.se
            side = "above" if apart >= 0 else "below"
            text += f", {nats(abs(apart), se)} nats {side} that; by how much it may miss, it does not say"
        said.append(f"{text}. It is no bound.")
    return said


def room_section(gaps: Any, looks: Mapping[str, Look], fits: Sequence[Any] = ()) -> Section:
    """Where the log evidence went: the split, both divergences, what they bound, both decompositions.

    Args:
        gaps: The comparison's `Gaps`.
        looks: How the guides are shown.
        fits: The fits, of which some may have an approximation of the log evidence of their own.
    """
    table = gaps.table.set_index("guide")
    rows = [name for name in looks if name in table.index and math.isfinite(table.loc[name, "elbo"])]
    points = [name for name in looks if name in table.index and table.loc[name, "problem"] == POINT]
    blocks: list[Block] = [evidence_in_words(gaps.evidence), *own_evidence_sentences(fits, gaps.evidence)]
    if rows:
        blocks.append(
            Table(
                "The split, in nats",
                _SPLIT,
                tuple(_split_row(name, table.loc[name], looks[name]) for name in rows),
            )
        )
        blocks += [
            f"{name}: KL(p || q) is {table.loc[name, 'kl_pq_problem']}." for name in rows if _told(table.loc[name])
        ]
        blocks += [f"{name}: {table.loc[name, 'problem']}." for name in rows if table.loc[name, "problem"]]
    blocks += [f"{name}: {POINT}." for name in points]
    if table.loc[rows + points, "energy"].notna().any():
        parts = tuple(_parts_row(name, table.loc[name], looks[name]) for name in looks if name in rows + points)
        blocks.append(Table("What the ELBO is made of, in nats", _PARTS, parts))
    if not rows:
        blocks.append("Left out: no fit has an ELBO that means anything.")
    return Section("room", "How much room is there, and whose is it?", tuple(blocks))


def _told(row: pd.Series) -> bool:
    return bool(row["kl_pq_problem"])


def _split_row(name: str, row: pd.Series, look: Look) -> tuple[Cell, ...]:
    limit = row["optimisation_limit"]
    family = "–"
    if math.isfinite(row["family_high"]):
        family = f"{row['family_low']:.3f} to {row['family_high']:.3f}"
    elif math.isfinite(row["family_low"]):
        family = f"at least {row['family_low']:.3f}"
    return (
        Cell(name, place=look.place),
        _below(row),
        Cell(at_most(limit) if math.isfinite(limit) else "–", note=row["optimisation_scope"]),
        Cell(family),
        Cell(f"{row['labels']:.3f}" if row["labels"] > 0 else "–"),
        Cell("in words", note="below") if _told(row) else _estimated(row, "kl_pq"),
        Cell(f"{row['tv_bound']:.2f}" if math.isfinite(row["tv_bound"]) else "–"),
        Cell(*_difference(row), note=row["cdf_difference_quantity"]),
    )


def _below(row: pd.Series) -> Cell:
    if math.isfinite(row["kl_qp"]):
        return _estimated(row, "kl_qp")
    if math.isfinite(row["kl_qp_high"]):
        return Cell(f"{max(row['kl_qp_low'], 0.0):.1f} to {row['kl_qp_high']:.1f}")
    return Cell(f"at least {max(row['kl_qp_low'], 0.0):.1f}" if math.isfinite(row["kl_qp_low"]) else "–")


def _estimated(row: pd.Series, name: str) -> Cell:
    text, _, error = nats(row[name], row[f"{name}_se"]).partition(" ± ")
    return Cell(text, error)


def _difference(row: pd.Series) -> tuple[str, str]:
    if not math.isfinite(row["cdf_difference"]):
        return "–", ""
    return f"{row['cdf_difference']:.3f}", f"{row['cdf_difference_se']:.3f}"


def _parts_row(name: str, row: pd.Series, look: Look) -> tuple[Cell, ...]:
    likelihood = row.rename({"kl_to_prior_se": "expected_log_likelihood_se"})
    entropy = row.rename({"energy_se": "entropy_se"})
    return (
        Cell(name, place=look.place),
        Cell("−∞") if row["problem"] == POINT else _estimated(row, "elbo"),
        _estimated(likelihood, "expected_log_likelihood"),
        _estimated(row, "kl_to_prior"),
        _estimated(row, "energy"),
        _estimated(entropy, "entropy"),
    )
