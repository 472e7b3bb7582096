"""The verb `render`: a study becomes a report, which writes itself into a folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from toolkit.comparison.sentences import ended
from toolkit.comparison.verdicts import Thresholds
from toolkit.reporting import first_screen, sections
from toolkit.reporting.arrival import by_svi, optima_of, spread
from toolkit.reporting.contents import Contents, Section
from toolkit.reporting.differences import differences
from toolkit.reporting.figures.canvas import drawn, file_png, file_svg
from toolkit.reporting.figures.room import room
from toolkit.reporting.figures.scatter import overview
from toolkit.reporting.html import to_html
from toolkit.reporting.markdown import to_markdown
from toolkit.reporting.nats import room_section
from toolkit.reporting.palette import looks as looks_of
from toolkit.reporting.predictive import predictions_section
from toolkit.reporting.program import what_is_the_model
from toolkit.reporting.tables import focus_table, guides_table

_TABLES = {
    "comparison": "every metric of every quantity and guide, with its error and verdict",
    "guides": "one row for each guide",
    "quantities": "mean, sd and quantiles of every quantity, reference and guides",
    "pairs": "the pairs whose correlation is most wrong",
    "focus": "your quantities",
    "agreement": "smallest and largest mean and sd over the guides",
    "corrections": "one row for each correction of a guide, judged like a guide",
    "gaps": "how the log evidence splits for each guide, KL in both directions, what the ELBO is made of",
    "predictions": "what predicting with each guide costs, and leave-one-out by each source's draws",
    "predictive_checks": "statistics of replicated data beside those of the observed",
    "calibration": "Brier scores, or shares of observations in their predictive intervals",
    "observations": "predictive probability or rank of single observations",
    "left_out": "log density of each observation when it is left out, with the tail index of its weights",
    "diagnostics": "R-hat and ESS of every quantity of the reference",
    "fits": "status, ELBO, gap to the family's best, optima, solver and cost of each fit",
}


@dataclass(frozen=True, eq=False)
class Report:
    """A study as text, figures and tables.

    Attributes:
        html: One self-contained page.
        markdown: The same contents; it links to `figures/<name>.svg`.
        figures: Name to matplotlib figure.
        drawings: Name to the figure's SVG document, of which the page's figures and the SVG files are made.
        tables: Name to data frame, one CSV file each.
        summary: What a program wants to know: verdicts, numbers and how they were made; JSON types only.
        comparison: Where the draws come from when the report is written.
    """

    html: str
    markdown: str
    figures: Mapping[str, Any]
    drawings: Mapping[str, str]
    tables: Mapping[str, pd.DataFrame]
    summary: Mapping[str, Any]
    comparison: Any

    def write(self, folder: str | Path) -> Path:
        """The path of report.html, written into `folder` with report.md, summary.json, draws.nc, tables and figures.

        Raises:
            ValueError: The folder cannot be written.
        """
        folder = Path(folder)
        try:
            for part in (folder, folder / "tables", folder / "figures"):
                part.mkdir(parents=True, exist_ok=True)
            for name, table in self.tables.items():
                # One end of line on every system, so that the same study gives the same bytes.
                table.to_csv(folder / "tables" / f"{name}.csv", index=table.index.name is not None, lineterminator="\n")
            for name, figure in self.figures.items():
                (folder / "figures" / f"{name}.svg").write_bytes(file_svg(self.drawings[name]))
                (folder / "figures" / f"{name}.png").write_bytes(file_png(figure))
            self.comparison.to_datatree().to_netcdf(folder / "draws.nc", engine="h5netcdf")
            (folder / "summary.json").write_text(json.dumps(self.summary, indent=2, allow_nan=False) + "\n", "utf-8")
            (folder / "report.md").write_text(self.markdown, "utf-8")
            (folder / "report.html").write_text(self.html, "utf-8")
        except OSError as error:
            raise ValueError(
                f"Expected a folder that can be written; '{folder}' cannot ({error.strerror or error}): "
                "choose another with --out."
            ) from error
        return folder / "report.html"


def render(study: Any) -> Report:
    """The report of a study. Nothing is inferred: it reads what the study holds.

    Args:
        study: A `Study`.
    """
    contents = _contents(study)
    tables = _tables(study)
    figures = {picture.name: picture.figure for picture in contents.pictures}
    drawings = {name: drawn(figure) for name, figure in figures.items()}
    html, markdown = to_html(contents, drawings), to_markdown(contents)
    return Report(html, markdown, figures, drawings, tables, _summary(study), study.comparison)


def _contents(study: Any) -> Contents:
    comparison = study.comparison
    looks = looks_of([fit.guide.name for fit in study.fits])
    limits = comparison.thresholds
    against = first_screen.against(study.reference)
    frame = differences(comparison.table, limits)
    present = set(frame.index.get_level_values("guide"))
    compared = {name: look for name, look in looks.items() if name in present}
    warning, reasons = first_screen.warning(study)
    return Contents(
        title=study.model.title,
        facts=first_screen.facts(study),
        question=study.model.question,
        warning=warning,
        reasons=reasons,
        overall="" if warning else comparison.overall.sentence,
        answers=first_screen.answers(study, looks),
        health=first_screen.health(study.reference),
        focus=focus_table(comparison.focus, looks, against, comparison.reference_ok),
        guides=guides_table(comparison.guides, study.fits, looks, against, comparison.reference_ok),
        room=room(comparison.gaps, looks),
        overview=overview(frame, compared, limits, against, comparison.reference_ok) if compared else None,
        next_steps=tuple(comparison.advice),
        commands=first_screen.next_commands(study),
        sections=_sections(study, frame, looks, compared, limits, against),
    )


def _sections(
    study: Any, frame: pd.DataFrame, looks: Any, compared: Any, limits: Thresholds, against: str
) -> tuple[Section, ...]:
    first = (sections.your_quantities(study.comparison, looks), sections.agreement(study.comparison))
    return (
        *(section for section in first if section),
        room_section(study.comparison.gaps, looks, study.fits),
        sections.which_quantities(study, frame, looks, limits, against),
        sections.how_wrong(frame, compared, limits, against),
        sections.which_relations(study.comparison, looks, against),
        predictions_section(
            study.comparison.predictions, looks, against, limits, trusted=study.comparison.reference_ok
        ),
        *(section for section in (sections.what_repairs(study.comparison),) if section),
        sections.did_it_arrive(study.fits, study.comparison.table, looks, limits),
        sections.reference_trusted(study),
        what_is_the_model(study.model),
        sections.made_how(study, _files(study)),
    )


def _files(study: Any) -> dict[str, str]:
    named = {f"tables/{name}.csv": _TABLES.get(name, "correlation matrix") for name in _tables(study)}
    return {
        **named,
        "figures/*.svg, figures/*.png": "every figure of this report",
        "draws.nc": "draws of the reference and of each guide, as an ArviZ DataTree",
        "summary.json": "verdicts, numbers and how they were made, for programs",
        "report.md": "this report as Markdown",
    }


def _tables(study: Any) -> dict[str, pd.DataFrame]:
    comparison = study.comparison
    tables = {
        "comparison": comparison.table,
        "guides": comparison.guides.rename_axis("guide"),
        "quantities": comparison.quantities,
        "pairs": comparison.pairs,
        "focus": comparison.focus,
        "agreement": comparison.agreement,
        "gaps": comparison.gaps.table,
        "corrections": comparison.corrections.rename_axis("correction"),
        "predictions": comparison.predictions.scores,
        "predictive_checks": comparison.predictions.checks,
        "calibration": comparison.predictions.calibration,
        "observations": comparison.predictions.observations,
        "left_out": comparison.predictions.left_out,
        "diagnostics": study.reference.diagnostics.rename_axis("quantity"),
        "fits": _fits_frame(study.fits),
    }
    for source, matrix in comparison.correlations.items():
        tables[f"correlations_{source}"] = matrix.rename_axis("quantity")
    return tables


def _fits_frame(fits: Any) -> pd.DataFrame:
    """One row for each fit; what depends on when a fit without an optimum was stopped is NaN."""
    rows = [
        {
            "guide": fit.guide.name,
            "status": fit.status.name,
            "sentence": ended(fit),
            "message": fit.message,
            "elbo": fit.elbo.value if fit.elbo and fit.status.has_optimum else math.nan,
            "elbo_se": fit.elbo.se if fit.elbo and fit.status.has_optimum else math.nan,
            **_nearness(fit),
            "why": fit.why,
            "own_log_evidence": _own_log_evidence(fit),
            "compile_seconds": fit.cost.compile_seconds,
            "run_seconds": fit.cost.run_seconds,
            "gradient_evaluations": fit.cost.gradient_evaluations,
            "peak_bytes": fit.cost.peak_bytes,
            "invalid_steps": fit.invalid_steps,
        }
        for fit in fits
    ]
    return pd.DataFrame(rows).set_index("guide")


def _own_log_evidence(fit: Any) -> float:
    """The algorithm's own approximation in nats; NaN where it has none."""
    own = getattr(fit, "log_evidence", None)
    return math.nan if own is None else float(own)


def _nearness(fit: Any) -> dict[str, Any]:
    """How near a fit is to its family's best, in nats, for programs; what is not known is NaN or empty."""
    certificate, optima = fit.certificate if fit.status.has_optimum else None, optima_of(fit)
    return {
        "gap_mean": certificate.gap.value if certificate else math.nan,
        "gap_mean_se": certificate.gap.se if certificate else math.nan,
        "gap_limit": certificate.limit if certificate else math.nan,
        "gap_scope": certificate.scope.value if certificate else "",
        "optima": len(optima),
        "optima_are": "ends of starts" if by_svi(fit) else "distinct optima",
        "optima_spread": spread(optima).value,
        "solver": fit.solver,
    }


def _summary(study: Any) -> dict[str, Any]:
    reference, comparison = study.reference, study.comparison
    guides = comparison.guides.rename_axis("guide").reset_index()
    gaps = comparison.gaps.table.drop(columns=["elbo", "elbo_se"])
    nearness = pd.DataFrame([{"guide": fit.guide.name, **_nearness(fit)} for fit in study.fits])
    return {
        "model": study.model.name,
        "title": study.model.title,
        "dataset": study.model.dataset.name,
        "seed": study.seed,
        "command": study.command,
        "machine": study.machine,
        "versions": dict(study.versions),
        "seconds": {name: float(value) for name, value in study.stages.items()},
        "reference": {
            "origin": reference.origin,
            "status": reference.status.name,
            "sentence": reference.status.value,
            "reasons": list(reference.reasons),
            "verdicts_given": bool(comparison.reference_ok),
            "seconds": float(reference.cost.seconds),
        },
        "verdict": comparison.overall.verdict.value if comparison.overall.verdict else "",
        "sentence": comparison.overall.sentence,
        "thresholds": asdict(comparison.thresholds),
        "log_evidence": _evidence(comparison.gaps.evidence),
        "guides": _records(guides.merge(nearness, on="guide").merge(gaps, on="guide")),
        "corrections": _records(comparison.corrections.rename_axis("correction").reset_index()),
        "predictions": {
            "problem": comparison.predictions.problem,
            "scores": _records(comparison.predictions.scores),
            "calibration": _records(comparison.predictions.calibration),
        },
        "focus": _records(comparison.focus),
        "advice": list(comparison.advice),
    }


def _evidence(evidence: Any) -> dict[str, Any]:
    """The log evidence for programs, in nats; None where a number is not known."""
    ends = {"value": evidence.estimate, "low": evidence.low, "high": evidence.high}
    numbers = {name: end.value if end else None for name, end in ends.items()}
    errors = {f"{name}_se" if name != "value" else "se": end.se if end else None for name, end in ends.items()}
    words = {"how": evidence.how, "problem": evidence.problem, "log_copies": evidence.log_copies}
    return {name: _plain(value) for name, value in {**numbers, **errors, **words}.items()}


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): _plain(value) for key, value in row.items()} for row in frame.to_dict("records")]


def _plain(value: Any) -> Any:
    """A value that JSON can hold; None for NaN and infinities, which JSON has not."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
