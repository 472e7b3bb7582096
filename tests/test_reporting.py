"""Reports of synthetic studies: what they say, that they stand alone, and that the same study gives the same bytes.

Golden files are made again with `ELBOWROOM_GOLDEN=write pytest tests/test_reporting.py`; look at their difference.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reporting_fixture as studies
import xarray as xr
from numpyro.infer.reparam import LocScaleReparam

import toolkit
from toolkit.comparison.verdicts import Thresholds
from toolkit.estimate import Estimate
from toolkit.reporting import first_screen
from toolkit.reporting.arrival import gap_cell, optima_cell, optima_sentences, solver_sentences
from toolkit.reporting.differences import differences, worst_first
from toolkit.reporting.figures.canvas import blank, drawn, file_png, file_svg, ratio_axis, segments, styled, titled
from toolkit.reporting.figures.graph import Node, layered
from toolkit.reporting.figures.pairs import binned_density, correlation_matrices, mass_levels, worst_pairs
from toolkit.reporting.figures.traces import elbo_traces
from toolkit.reporting.first_screen import health, next_commands
from toolkit.reporting.nats import nats
from toolkit.reporting.palette import INK, PAGE, PLAIN, SOFT, TEXTS, looks
from toolkit.reporting.reports import Report, render
from toolkit.reporting.tables import focus_table, minus, number, significant, worst_diagnostics
from toolkit.status import Status
from toolkit.variational.certificates import Certificate, Scope

GOLDEN = Path(__file__).parent / "golden"
VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}
VARIANTS: dict[str, Callable[[], SimpleNamespace]] = {
    "three guides": studies.make_study,
    "one scalar": studies.single_study,
    "reference failed": studies.reference_failed,
    "a guide failed": studies.guide_failed,
}


class Page(HTMLParser):
    """Tags, headings and attributes of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)


@cache
def rendered(variant: str) -> Report:
    return render(VARIANTS[variant]())


@pytest.fixture(scope="module")
def report() -> Report:
    return rendered("three guides")


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Report:
    return rendered(request.param)


def skeleton(html: str) -> str:
    """The page without its figures and style: headings, words, numbers and structure."""
    html = re.sub(r"<svg.*?</svg>", "<svg/>", html, flags=re.DOTALL)
    html = re.sub(r"<style>.*?</style>", "<style/>", html, flags=re.DOTALL)
    return re.sub(r"\n\s*\n+", "\n", html)


def assert_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("ELBOWROOM_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    assert text == path.read_text("utf-8")


def test_markdown_is_the_golden_one(report: Report) -> None:
    assert_golden("report.md", report.markdown)


def test_html_without_figures_is_the_golden_one(report: Report) -> None:
    assert_golden("report_skeleton.html", skeleton(report.html))


def test_same_study_gives_the_same_page_and_the_same_figures(report: Report) -> None:
    again = render(studies.make_study())
    assert again.html == report.html
    assert again.drawings == report.drawings


def test_a_drawing_settles_the_layout(report: Report) -> None:
    for name, figure in report.figures.items():
        places = [axes.get_position().bounds for axes in figure.axes]
        file_png(figure)
        assert drawn(figure) == report.drawings[name], name
        assert [axes.get_position().bounds for axes in figure.axes] == places


def test_files_are_white_and_pages_have_no_ground(report: Report) -> None:
    for name, drawing in report.drawings.items():
        ground = drawing[drawing.index('id="patch_1"') :].partition("/>")[0]
        assert 'style="fill: none"' in ground, name
        assert ground.replace("fill: none", "fill: #ffffff") in file_svg(drawing).decode()


def test_geometry_has_two_decimals_and_labels_keep_theirs(report: Report) -> None:
    drawing = report.drawings["reference_health"]
    assert not re.search(r' d="[^"]*\.\d{3}', drawing)
    assert re.search(r">1\.0001</text>", drawing)


def test_segments_lie_where_the_data_does() -> None:
    x, low, high = np.array([0.1, 1.0, 30.0]), np.array([-1.0, 0.0, 2.0]), 3.0
    with styled():
        axes = blank(3.0, 2.0)[1][0, 0]
        axes.set(xscale="log", xlim=(0.05, 50.0), ylim=(-2.0, 4.0))
        segments(axes, (x, low), (x, high), linewidth=1)
    lines = axes.collections[0]
    ends = np.stack([lines.get_transform().transform(path.vertices) for path in lines.get_paths()])
    for end, y in ((0, low), (1, np.full(3, high))):
        np.testing.assert_allclose(ends[:, end], axes.transData.transform(np.column_stack([x, y])), rtol=1e-12)


def test_page_is_well_formed_and_small(variant: Report) -> None:
    Page(variant.html)
    assert len(variant.html.encode()) < 3e6


def test_page_loads_nothing(variant: Report) -> None:
    for tag, attributes in Page(variant.html).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for name in ("src", "href", "srcset", "xlink:href", "data"):
            target = attributes.get(name) or ""
            assert target.startswith(("#", "data:image/png;base64,")) or not target, (tag, target[:80])
    assert not re.search(r"url\(\s*['\"]?(?!#)", variant.html)
    assert "@import" not in variant.html


def test_headings_descend_one_level_at_a_time(variant: Report) -> None:
    levels = [level for level, _ in Page(variant.html).headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


def test_every_figure_states_its_finding(variant: Report) -> None:
    drawn = [attributes for tag, attributes in Page(variant.html).tags if tag == "svg"]
    assert len(drawn) == len(variant.figures) > 0
    for attributes in drawn:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"] or "") > 30
    assert len(re.findall(r"!\[[^\]].*?\]\(figures/\w+\.svg\)", variant.markdown)) == len(variant.figures)


def test_ids_are_unique_and_references_have_a_target(variant: Report) -> None:
    tags = Page(variant.html).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {(a.get("href") or "")[1:] for _, a in tags if (a.get("href") or "").startswith("#")}
    links |= set(re.findall(r"url\(#([^)]+)\)", variant.html))
    assert links <= set(ids)


def test_tables_have_scopes(variant: Report) -> None:
    heads = [attributes for tag, attributes in Page(variant.html).tags if tag == "th"]
    assert heads
    assert all(attributes.get("scope") in {"col", "row"} for attributes in heads)


def test_focus_comes_before_the_verdicts_and_these_before_the_numbers(report: Report) -> None:
    headings = [text for _, text in Page(report.html).headings]
    assert headings[:5] == [
        "Collinear logistic regression",
        "Your quantities",
        "Can variational inference be trusted here?",
        "By how much?",
        "What next?",
    ]


def test_first_screen_says_the_verdicts_and_the_time_saved(report: Report) -> None:
    words = " ".join(" ".join(Page(report.html).words).split())
    assert "yes: all 31 quantities right" in words
    assert "1.2 s, 6.4× sooner than NUTS" in words  # 7.4 s of NUTS over 1.16 s
    assert "no divergences" in words


def test_without_focus_there_is_no_such_section() -> None:
    assert "Your quantities" not in render(studies.make_study(focus=False)).html


def test_failed_reference_stands_in_the_place_of_verdicts() -> None:
    report = rendered("reference failed")
    assert "No verdict: the chains disagree (R-hat above the limit)." in report.html
    assert "R-hat is 1.52 for beta[mean area]" in report.html
    assert "What do the guides agree on?" in report.markdown
    assert "sooner than NUTS" not in report.html
    assert 'class="mark right"' not in report.html
    assert report.summary["reference"]["verdicts_given"] is False


def test_failed_guide_is_a_row_with_its_sentence() -> None:
    report = rendered("a guide failed")
    assert "failed: no start was found: site beta has no valid value" in report.html
    assert "full_rank" in report.html
    assert report.summary["guides"][0]["elbo"] is None


def test_flat_prior_and_single_scalar_are_told_in_a_sentence() -> None:
    markdown = rendered("one scalar").markdown
    assert "Prior and prior predictive draws are left out: the prior of mean is flat" in markdown
    assert "with one quantity there are no pairs" in markdown


def test_reference_without_draws_leaves_a_report() -> None:
    study = studies.reference_failed()
    reference, comparison = study.reference, study.comparison
    reference.usable, reference.draws = False, {}
    reference.diagnostics = reference.diagnostics.iloc[:0]
    reference.log_density = reference.energy = reference.ebfmi = None
    del comparison.sample["reference"], comparison.correlations["reference"]
    comparison.table, comparison.pairs = comparison.table.iloc[:0], comparison.pairs.iloc[:0]
    comparison.quantities = comparison.quantities[comparison.quantities["source"] != "reference"]
    comparison.focus = comparison.focus[comparison.focus["source"] != "reference"]
    numbers = [c for c in comparison.guides if c.startswith("worst") and not c.endswith("_quantity")]
    comparison.guides[numbers] = np.nan
    report = render(study)
    Page(report.html)
    assert "there is no reference" in report.html
    assert "overview" not in report.figures


@pytest.mark.slow
def test_thousand_scalars_stay_small() -> None:
    report = render(studies.make_study(999, focus=False))
    Page(report.html)
    assert len(report.html.encode()) < 3e6
    assert "of 1000" in report.html


def test_text_of_users_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    report = render(studies.make_study(8, title=evil, question="a < b & $c$", dataset="x|y*z"))
    assert evil not in report.html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report.html
    assert "a &lt; b &amp; $c$" in report.html
    assert "<script>" not in report.markdown
    assert r"x\|y\*z" in report.markdown
    Page(report.html)


def test_report_writes_everything_it_names(report: Report, tmp_path: Path) -> None:
    path = report.write(tmp_path / "new" / "folder")
    folder = path.parent
    assert path.read_text("utf-8") == report.html
    assert (folder / "report.md").read_text("utf-8") == report.markdown
    for name in report.figures:
        assert (folder / "figures" / f"{name}.svg").read_bytes().startswith(b"<?xml")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for name, table in report.tables.items():
        assert len(pd.read_csv(folder / "tables" / f"{name}.csv")) == len(table)
    for target in re.findall(r"\((figures/[^)]+)\)", report.markdown):
        assert (folder / target).is_file()
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["verdict"] for row in summary["guides"]] == ["wrong", "wrong", "right"]
    with xr.open_datatree(folder / "draws.nc", engine="h5netcdf") as tree:
        assert set(tree.children) == {"reference", *studies.GUIDES}


def test_unwritable_folder_is_one_sentence(report: Report, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"^Expected a folder that can be written; '.*taken' cannot \(.*\): choose"):
        report.write(tmp_path / "taken")


def test_worst_of_each_column_is_marked_once(report: Report) -> None:
    table = report.markdown.split("## By how much?")[1].split("The worst value of each")[0]
    rows = [line.split("|")[2:-1] for line in table.strip().splitlines()[2:]]
    # The gap is not marked: the worst is a guide without a limit.
    assert [sum("**" in row[column] for row in rows) for column in range(7)] == [1, 0, 1, 1, 1, 1, 1]
    # The mean field has the lowest ELBO, the low rank one did not arrive and is shifted most.
    assert "**−77.31 ± 0.02**" in rows[0][0]
    assert "**" in rows[1][2]


def _fit(**given: object) -> SimpleNamespace:
    """The mean field of the synthetic study, with other ends."""
    return SimpleNamespace(**{**vars(studies.make_study(3, focus=False).fits[0]), **given})


@pytest.mark.parametrize(
    ("given", "text", "note"),
    [
        ({}, "0.062", "global bound"),
        ({"certificate": Certificate(Estimate(0.3, 0.1), 0.5349, Scope.ESTIMATE, 4_096, 4)}, "0.54", "estimate"),
        ({"certificate": None, "status": Status.TOO_FEW_DRAWS}, "–", "too few draws"),
        ({"certificate": None, "status": Status.BUDGET}, "–", "budget used up"),
        ({"certificate": None, "status": Status.BUDGET, "solver": "svi"}, "–", "SVI gives none"),
        ({"certificate": None, "status": Status.DIVERGED, "usable": False}, "–", "no fit"),
        ({"certificate": Certificate(Estimate(0.3, 0.1), np.inf, Scope.LOCAL, 8, 4)}, "–", "no finite limit"),
    ],
)
def test_beside_the_elbo_stands_the_gap_or_why_there_is_none(given: dict[str, object], text: str, note: str) -> None:
    cell = gap_cell(_fit(**given))
    assert (cell.text, cell.note) == (text, note)


def test_optima_are_counted_and_the_best_is_named() -> None:
    assert optima_sentences([_fit()]) == []
    optima = (Estimate(-50.0, 0.03), Estimate(-57.0, 0.04), Estimate(-54.0, 0.02))
    cell = optima_cell(_fit(optima=optima))
    assert (cell.text, cell.note) == ("3", "7.00 ± 0.05 nats apart")
    local = Certificate(Estimate(0.05, 0.01), 0.07, Scope.LOCAL, 256, 4)
    (text,) = optima_sentences([_fit(optima=optima, certificate=local)])
    assert text.startswith(
        "mean_field: its starts led to 3 distinct optima, 7.00 ± 0.05 nats apart (ELBO −50.00 ± 0.03, −54.00 ± 0.02 "
        "and −57.00 ± 0.04). The best one is reported and the lower ones are local optima; nothing is averaged."
    )
    # Where the ELBO is concave there are no local optima, and SVI does not tell optima apart.
    assert "local optima" not in optima_sentences([_fit(optima=optima)])[0]
    assert "3 starts ended 7.00 ± 0.05 nats apart" in optima_sentences([_fit(optima=optima, solver="svi")])[0]
    assert optima_cell(_fit(optima=optima, solver="svi")).text == "3 starts"


def test_many_optima_are_told_by_their_ends() -> None:
    optima = tuple(Estimate(-50.0 - i, 0.03) for i in range(6))
    assert "(ELBO from −50.00 ± 0.03 down to −55.00 ± 0.03)" in optima_sentences([_fit(optima=optima)])[0]


def test_the_solver_is_named_with_its_reason() -> None:
    fits = [
        _fit(solver="natural_gradient", why="no draws pin it"),
        _fit(solver="svi", why="asked for"),
        _fit(solver=""),
    ]
    assert solver_sentences(fits) == [
        "Solver of mean_field: natural gradient, because no draws pin it.",
        "Solver of mean_field: SVI, as asked for.",
    ]


@pytest.mark.parametrize(
    ("solvers", "label", "words"),
    [
        (("fixed_draws", "fixed_draws"), "evaluations of the ELBO", "On fixed draws a line ends a little off"),
        (("natural_gradient", "svi"), "optimisation steps", "Lines of steps that end flat"),
        (("fixed_draws", "svi"), "step or evaluation", "over evaluations of the ELBO (mean_field) or over"),
    ],
)
def test_the_traces_say_what_they_count(solvers: tuple[str, str], label: str, words: str) -> None:
    fits = [_fit(solver=solver) for solver in solvers]
    fits[1].guide = SimpleNamespace(name="other")
    picture = elbo_traces(fits, looks(["mean_field", "other"]))
    assert picture.figure.get_supxlabel() == label
    assert words in picture.reading


def test_exact_courses_have_marks_and_no_band() -> None:
    exact, noisy = studies.make_study(3, focus=False).fits[:2]
    picture = elbo_traces([exact, noisy], looks(["mean_field", "low_rank"]))
    first, second = picture.figure.axes
    # The one patch is how far the family's best may lie above; the SVI fit has bands of errors and no certificate.
    assert (len(first.collections), len(first.patches)) == (0, 1)
    assert (len(second.collections), len(second.patches)) == (2, 0)
    assert first.lines[0].get_marker() == "o"


@pytest.mark.parametrize(
    ("status", "limit"), [(Status.UNPROVEN, 0.31), (Status.TOO_FEW_DRAWS, None), (Status.TOO_FEW_DRAWS, 37.0)]
)
def test_a_fit_without_proof_says_why(status: Status, limit: float | None) -> None:
    study = studies.make_study(3, focus=False)
    why = f"up to {limit} nats: 16,384 draws are too few for 9 parameters" if limit else "no bound: too few draws"
    certificate = Certificate(Estimate(0.2, 0.05), limit, Scope.LOCAL, 16_384, 4) if limit else None
    fit = SimpleNamespace(**{**vars(study.fits[2]), "status": status, "message": why, "certificate": certificate})
    study.fits = (*study.fits[:2], fit)
    report = render(study)
    assert f"{status.value} ({why})" in report.markdown
    row = report.summary["guides"][2]
    assert (row["gap_limit"], row["gap_scope"]) == ((limit, "local bound") if limit else (None, ""))
    assert (row["optima"], row["solver"]) == (2, "fixed_draws")
    assert row["optima_spread"] == pytest.approx(1.41)


def test_whose_fault_stands_on_the_first_screen(report: Report) -> None:
    first = report.markdown.split("## By how much?")[0]
    assert "the optimiser left at most 0.062 nats (global bound)" in first
    assert "whether the family's or the optimiser's is not known: there is no certificate" in first


def test_differences_take_quantiles_where_moments_have_no_error() -> None:
    table = pd.DataFrame(
        [
            ("g", "a", "shift", 0.2, 0.01, "wrong"),
            ("g", "a", "sd_ratio", 1.0, 0.01, "right"),
            ("g", "b", "shift", 7.0, 9.0, ""),
            ("g", "b", "sd_ratio", 50.0, 90.0, ""),
            ("g", "b", "median_shift", 0.0, 0.01, "right"),
            ("g", "b", "spread_ratio", 1.11**3, 0.01, "wrong"),
        ],
        columns=["guide", "quantity", "metric", "value", "se", "verdict"],
    )
    frame = differences(table, Thresholds())
    assert frame["error"].tolist() == pytest.approx([2.0, 3.0])
    assert frame["shift"].tolist() == [0.2, 0.0]
    assert frame["verdict"].tolist() == ["wrong", "wrong"]
    assert worst_first(frame) == ["b", "a"]


@pytest.mark.parametrize(("ratio", "error"), [(0.5, 1.0), (0.25, 2.0), (1.0, 0.0), (1.2, 1.0), (0.0, np.inf)])
def test_a_ratio_is_measured_by_the_threshold_on_its_side(ratio: float, error: float) -> None:
    row = ("g", "a", "sd_ratio", ratio, 0.01, "wrong")
    table = pd.DataFrame([row], columns=["guide", "quantity", "metric", "value", "se", "verdict"])
    assert differences(table, Thresholds(sd_ratio=(0.5, 1.2)))["error"].tolist() == pytest.approx([error])


@pytest.mark.parametrize(
    ("rhat", "ess", "divergences", "text"),
    [
        (1.0021, 1_900.7, 0, "(R-hat ≤ 1.003, ESS ≥ 1,900, no divergences)"),
        (1.0021, 1_900.7, None, "(R-hat ≤ 1.003, ESS ≥ 1,900)"),
        (np.inf, 4.0, 1, "(R-hat infinite, ESS ≥ 4, 1 divergence)"),
        (np.nan, np.nan, 0, "(R-hat unknown, ESS unknown, no divergences)"),
    ],
)
def test_the_references_health_says_what_is_known(rhat: float, ess: float, divergences: int | None, text: str) -> None:
    reference = studies.make_study(3).reference
    reference.diagnostics["rhat"], reference.divergences = rhat, divergences
    reference.diagnostics[["ess_bulk", "ess_tail"]] = ess
    assert text in health(reference)


@pytest.mark.parametrize(
    ("command", "again"),
    [
        ("elbowroom study lda", ("elbowroom study lda --seed 1",)),
        ("elbowroom study lda --option seed=0", ("elbowroom study lda --option seed=0 --seed 1",)),
        ("elbowroom study lda --seed=0 --draws 10", ("elbowroom study lda --seed=1 --draws 10",)),
        ("toolkit.study(model, seed=0)", ("toolkit.study(model, seed=1)",)),
        ("python mine.py", ()),
    ],
)
def test_the_next_command_has_the_next_seed(command: str, again: tuple[str, ...]) -> None:
    study = studies.make_study(3, focus=False)
    study.command = command
    assert next_commands(study) == again


@pytest.mark.parametrize(
    ("given", "command", "again"),
    [
        ({}, "elbowroom study x", "elbowroom study x --draws 8000 --warmup 2000"),
        (
            {"least": 320.0},
            "elbowroom study x --draws 1000 --seed 3",
            "elbowroom study x --draws 2000 --seed 3 --warmup 2000",
        ),
        ({"least": 120.0, "status": Status.FEW_DRAWS}, "elbowroom study x", "elbowroom study x --draws 8000"),
        ({"least": 250.0, "status": Status.FEW_DRAWS}, "elbowroom study x", "elbowroom study x --draws 4000"),
        ({}, "elbowroom study x --warmup=500", "elbowroom study x --warmup=1000 --draws 8000"),
        ({}, "toolkit.study(model, seed=0)", "toolkit.study(model, seed=0, draws=8000, warmup=2000)"),
        ({"status": Status.DIVERGENCES}, "elbowroom study x", "elbowroom study x --target-accept 0.98"),
        (
            {"status": Status.DIVERGENCES},
            "toolkit.study(model, seed=0, target_accept=0.98)",
            "toolkit.study(model, seed=0, target_accept=0.996)",
        ),
        ({"status": Status.DIVERGENCES, "charts": True}, "elbowroom study x", "elbowroom study x --chart other"),
        ({"status": Status.LOW_ENERGY, "charts": True}, "elbowroom study x", "elbowroom study x --chart other"),
        ({"status": Status.LOW_ENERGY}, "elbowroom study x", None),
        ({"modes": True}, "elbowroom study x", None),
        (  # a trial run goes to what a study has by default
            {"least": 12.0, "draws": {"beta": np.zeros((4, 50))}},
            "elbowroom study x --draws 50 --warmup 50",
            "elbowroom study x --draws 1000 --warmup 1000",
        ),
        ({}, "python mine.py", None),
        ({"usable": False}, "elbowroom study x", None),
        ({"origin": "draws from mine.nc"}, "elbowroom study x --against mine.nc", None),
    ],
)
def test_after_a_failed_reference_the_next_command_may_mend_it(
    given: dict[str, Any], command: str, again: str | None
) -> None:
    study, given = studies.reference_failed(), dict(given)
    study.command, reference = command, study.reference
    reference.diagnostics[["ess_bulk", "ess_tail"]] = given.pop("least", 7.0)
    if given.pop("charts", False):
        charted = replace(reference.model, charts={"other": {"beta": LocScaleReparam(0)}})
        given["model"] = charted
    for name, value in given.items():
        setattr(reference, name, value)
    assert next_commands(study) == ((again,) if again else ())


def test_the_defaults_that_commands_go_on_from_are_the_studys() -> None:
    parameters = signature(toolkit.study).parameters
    assert {name: parameters[name].default for name in first_screen._DEFAULTS} == first_screen._DEFAULTS


def test_why_nothing_is_judged_is_said_once_a_guide() -> None:
    study = studies.reference_failed()
    study.comparison.guides["sentence"] = "not judged: the reference failed its checks"
    study.comparison.focus["sentence"] = ""
    text = render(study).markdown
    assert text.count("not judged") == len(studies.GUIDES)
    assert "NUTS (failed its checks)" in text
    assert "This may mend it:" in text
    assert "--draws 8000 --warmup 2000" in text
    assert "What may be said of your quantities?" not in text


def test_where_one_guide_is_not_judged_its_cells_have_a_dash() -> None:
    study = studies.make_study()
    focus = study.comparison.focus
    focus.loc[focus["source"] == "low_rank", "sentence"] = ""
    table = focus_table(focus, looks(studies.GUIDES), "NUTS", True)
    assert table is not None
    assert [row[1].note for row in table.rows] == ["", ""]  # the reference
    assert [row[3].note for row in table.rows] == ["–", "–"]
    assert all(row[2].note not in ("", "–") for row in table.rows)


@pytest.mark.parametrize("status", [Status.UNBOUNDED, Status.IMPROPER, Status.FLAT, Status.DIVERGED])
def test_what_depends_on_when_a_fit_was_stopped_is_not_shown(status: Status) -> None:
    study = studies.make_study(3, focus=False)
    given = {"status": status, "message": "along beta[radius]", "elbo": Estimate(276.91, 0.04)}
    optima = (Estimate(276.91, 0.04), Estimate(259.34, 0.03))
    certificate = Certificate(Estimate(0.2, 0.05), 0.37, Scope.LOCAL, 256, 4)
    fit = SimpleNamespace(**{**vars(study.fits[2]), **given, "optima": optima, "certificate": certificate})
    assert gap_cell(fit).text == optima_cell(fit).text == "–"
    assert gap_cell(fit).note == optima_cell(fit).note == "no optimum"
    assert optima_sentences([fit]) == []
    study.fits = (*study.fits[:2], fit)
    study.comparison.guides.loc["full_rank", ["elbo", "elbo_se"]] = np.nan  # as `compare` gives them
    report = render(study)
    assert "276.9" not in report.markdown
    assert "259.3" not in report.markdown
    assert "0.37" not in report.markdown.split("## Did the fits arrive?")[1].split("## Can the reference")[0]
    assert "| –<br>no optimum | –<br>no optimum |" in report.markdown
    row = report.summary["guides"][2]
    assert (row["elbo"], row["gap_limit"], row["gap_mean"], row["optima"], row["optima_spread"]) == (
        None, None, None, 0, None,
    )  # fmt: skip
    assert np.isnan(report.tables["fits"].loc["full_rank", ["elbo", "elbo_se"]].astype(float)).all()


def test_effective_draws_below_the_limit_do_not_look_as_if_they_reached_it() -> None:
    table = pd.DataFrame({"rhat": [1.002], "ess_bulk": [399.7], "ess_tail": [1_391.2]}, index=["a"])
    assert [cell.text for cell in worst_diagnostics(table).rows[0]] == ["a", "1.002", "399", "1,391"]


def test_draws_from_a_file_claim_no_count_of_divergences() -> None:
    study = studies.make_study(3, focus=False)
    study.reference.divergences = study.reference.tree_depth_hits = None
    text = render(study).markdown
    assert "E-BFMI by chain" in text
    assert "ivergen" not in text


def test_a_point_mass_is_the_narrowest() -> None:
    study = studies.make_study(3, focus=False)
    study.comparison.guides["worst_sd_ratio"] = [0.5, 0.0, 1.0]
    assert render(study).html.count("the worst of this column") == 6


def test_a_guide_without_spread_or_moments_is_drawn() -> None:
    # A point mass and a guide of which nothing is known, beside one that is right.
    study = studies.make_study(3, focus=False)
    table, quantities = study.comparison.table, study.comparison.quantities
    table.loc[(table["guide"] == "mean_field") & (table["metric"] == "sd_ratio"), ["value", "se"]] = 0.0
    table.loc[table["guide"] == "low_rank", ["value", "se"]] = np.nan
    numbers = ["mean", "mean_se", "sd", "sd_se", "q5", "q25", "q50", "q75", "q95"]
    quantities.loc[quantities["source"] == "low_rank", numbers] = np.nan
    report = render(study)
    assert "full_rank's are" in report.html
    assert "low_rank's are" not in report.html
    assert all(file_png(figure).startswith(b"\x89PNG") for figure in report.figures.values())


def test_contours_hold_their_mass() -> None:
    # Exact for a Gaussian: the level that holds a mass m encloses the ellipse of squared radius -2 log(1 - m).
    rng, draws = np.random.default_rng(0), 40_000
    points = rng.multivariate_normal([1.0, -2.0], [[1.0, 1.8], [1.8, 4.0]], draws)
    density, xs, ys = binned_density(points[:, 0], points[:, 1])
    columns = np.clip(np.searchsorted(xs, points[:, 0]), 0, xs.size - 1)
    rows = np.clip(np.searchsorted(ys, points[:, 1]), 0, ys.size - 1)
    for mass, level in zip((0.9, 0.5), mass_levels(density, (0.9, 0.5)), strict=True):
        inside = float((density[rows, columns] >= level).mean())
        # The bandwidth h = n^(-1/6) widens the whitened density by 1 + h^2, so that the contour holds a little more.
        wider = 1 - (1 - mass) ** (1 + draws ** (-1 / 3))
        se = np.sqrt(wider * (1 - wider) / draws)
        cell = 0.5 * max(xs[1] - xs[0], (ys[1] - ys[0]) / 2)  # a draw may sit half a cell off in either sd
        slack = 2 * cell * np.sqrt(-2 * np.log(1 - mass)) * (1 - mass)
        assert abs(inside - wider) < 5 * se + slack


def test_worst_pairs_differ() -> None:
    names = ["a", "b", "c", "d"]
    rows = [
        ("g", x, y, 0.9, 0.0, -0.9 + 0.01 * (i + j), 0.01)
        for i, x in enumerate(names)
        for j, y in enumerate(names)
        if i < j
    ]
    pairs = pd.DataFrame(
        rows, columns=["guide", "quantity_a", "quantity_b", "reference", "guide_value", "difference", "se"]
    )
    chosen = worst_pairs(pairs)
    assert chosen[0] == ("a", "b")
    used = [name for pair in chosen for name in pair]
    assert max(used.count(name) for name in names) == 2


def test_graph_puts_children_below_their_parents() -> None:
    nodes = [
        Node("a", "latent", "Normal", (), ()),
        Node("b", "latent", "Normal", (), ("a",)),
        Node("c", "latent", "Normal", (), ()),
        Node("y", "observed", "Normal", (), ("a", "b", "c")),
    ]
    places = layered(nodes)
    assert all(places[parent][1] < places[node.name][1] for node in nodes for parent in node.parents)
    assert len(set(places.values())) == len(nodes)


@pytest.mark.parametrize(
    ("value", "se", "text", "error"),
    [(-77.312, 0.021, "−77.31", "0.02"), (0.5614, 0.0073, "0.561", "0.007"), (float("nan"), 1.0, "–", "")],
)
def test_numbers_are_rounded_by_their_errors(value: float, se: float, text: str, error: str) -> None:
    cell = number(value, se)
    assert (cell.text, cell.error) == (text, error)


def test_signs_and_thousands() -> None:
    assert minus("-1") == "−1"
    assert significant(12_345.6) == "12,346"
    assert significant(-0.012345) == "−0.0123"


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("colour", [INK, SOFT, *TEXTS], ids=lambda colour: colour.name)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(colour: object, mode: str) -> None:
    bright, dim = sorted((_luminance(getattr(colour, mode)), _luminance(getattr(PAGE, mode))), reverse=True)
    assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_guides_keep_their_colours_and_share_none() -> None:
    panel = looks(["mine", "full_rank", "mean_field"])
    assert panel["full_rank"] == looks(["full_rank"])["full_rank"]
    assert len({look.mark.light for look in panel.values()}) == 3
    assert len({colour.light for colour in PLAIN}) == len(PLAIN)


def test_of_many_guides_the_matrices_of_the_most_wrong_are_drawn() -> None:
    names = ["a", "b", "c", "d", "e", "f"]
    matrices = {"reference": pd.DataFrame(np.eye(2), list("xy"), list("xy"))}
    for i, name in enumerate(names):
        matrices[name] = pd.DataFrame([[1.0, i / 10], [i / 10, 1.0]], list("xy"), list("xy"))
    picture = correlation_matrices(matrices, looks(names), "NUTS")
    titles = {axes.get_title("left") for axes in picture.figure.axes}
    assert {"c", "d", "e", "f"} <= titles
    assert not {"a", "b"} & titles
    assert "the 4 guides of 6 with the largest errors" in picture.reading


@pytest.mark.parametrize(("least", "most"), [(0.9, 1.1), (0.43, 265.0), (0.002, 3.0), (1e-5, 4e5)])
def test_ratios_have_a_place_on_their_axis_and_ticks_around_it(least: float, most: float) -> None:
    with styled():
        _, axes = blank(3, 3, 1, 1)
        ratio_axis(axes[0, 0], [least, most])
        low, high = axes[0, 0].get_ylim()
        ticks = axes[0, 0].get_yticks()
    assert low < least < most < high
    assert 1.0 in ticks
    assert 2 <= sum(low <= tick <= high for tick in ticks) <= 7


def test_nothing_is_minus_zero() -> None:
    assert nats(-1e-13) == "0.000"
    assert str(Estimate(-1e-5, 1e-3)) == "0.0000 ± 0.0010"


def test_what_to_type_is_set_as_code() -> None:
    study = studies.make_study(3, focus=False)
    study.comparison.advice = ("Next: a mixture (`--guides mixture`) of *two*.",)
    made = render(study)
    assert "Next: a mixture (<code>--guides mixture</code>) of *two*." in made.html
    assert r"Next: a mixture (`--guides mixture`) of \*two\*." in made.markdown


@pytest.mark.parametrize(
    ("name", "most", "lines"),
    [
        ("mean_field", 18, ["mean_field"]),
        ("amortised@noncentred", 13, ["amortised", "@noncentred"]),
        ("my_very_long_guide", 9, ["my_very_", "long_", "guide"]),
    ],
)
def test_long_names_above_panels_are_broken_where_they_can_be(name: str, most: int, lines: list[str]) -> None:
    assert titled(name, most).split("\n") == lines


def test_a_point_has_no_more_digits_than_anyone_reads() -> None:
    focus = studies.make_study().comparison.focus
    own = (focus["source"] == "low_rank") & ~focus["event"].astype(bool)
    focus.loc[own, ["mean", "low", "high"]] = 0.398104142013785967
    focus.loc[own, "mean_se"] = 1e-17
    table = focus_table(focus, looks(studies.GUIDES), "NUTS", True)
    assert "0.398 [0.398, 0.398]" in {cell.text for row in table.rows for cell in row}
