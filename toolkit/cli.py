"""The command `elbowroom`."""

from __future__ import annotations

import ast
import gc
import os
import signal
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# Only what answers `--help` is imported here; NumPyro, JAX and ArviZ wait until a command needs them.

if TYPE_CHECKING:
    from toolkit.studies import Study

app = typer.Typer(
    help="How much room is there between a variational answer and the posterior of your NumPyro model?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)

_MISUSE, _FAILED, _STOPPED = 2, 1, 130

Target = Annotated[str, typer.Argument(help="A curated model's name, or path/to/file.py:name for your own.")]
Data = Annotated[Path | None, typer.Option(help="A .csv or .npz file whose columns are your callable's arguments.")]
Options = Annotated[list[str] | None, typer.Option("--option", help="name=value: a model's option; may be repeated.")]


@app.command("list")
def list_models() -> None:
    """List the curated models, a line each."""
    spec = find_spec("models")
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else Path("models")
    for path in sorted(folder.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        typer.echo(f"{path.stem:<26}{text.partition(chr(10))[0]}")


@app.command()
def show(model: Annotated[str, typer.Argument(help="A curated model's name.")]) -> None:
    """Show a curated model: its question, density, priors, data, sites and options."""
    with _sentences():
        import inspect

        import models

        module = models.load(model)
        built = module.model()
        typer.echo(f"{inspect.getdoc(module)}\n")
        typer.echo(f"data      {built.dataset.name}: {built.dataset.source} ({built.dataset.licence})")
        typer.echo(f"charts    {', '.join(built.charts)}; default {built.chart}")
        typer.echo("options")
        for parameter in inspect.signature(module.model).parameters.values():
            if parameter.name not in ("data", "dataset"):
                typer.echo(f"  {parameter.name}={parameter.default!r}")
        typer.echo("sites")
        for site in built.sites.values():
            typer.echo(f"  {site.name:<24}{site.kind:<15}{site.distribution:<22}{site.shape}")


@app.command()
def study(
    target: Target,
    data: Data = None,
    option: Options = None,
    guides: Annotated[
        str, typer.Option(help="Guides, separated by commas; mean_field@centred names a chart.")
    ] = "mean_field,low_rank,full_rank",
    focus: Annotated[list[str] | None, typer.Option(help="A quantity that matters, such as 'beta[floor] > 0'.")] = None,
    seed: Annotated[int, typer.Option(help="Makes every random number.")] = 0,
    out: Annotated[Path | None, typer.Option(help="The report's folder; reports/<name> if not given.")] = None,
    chart: Annotated[str | None, typer.Option(help="The chart in which NUTS runs.")] = None,
    chains: Annotated[int, typer.Option(help="NUTS chains.")] = 4,
    warmup: Annotated[int, typer.Option(help="Warm-up transitions of each chain.")] = 1_000,
    draws: Annotated[int, typer.Option(help="Draws kept of each chain.")] = 1_000,
    target_accept: Annotated[
        float, typer.Option(help="NUTS' target acceptance; higher is slower, and helps against divergences.")
    ] = 0.9,
    until_decided: Annotated[
        int, typer.Option(help="Draw longer until each guide is right or wrong, at most so many draws a chain.")
    ] = 0,
    threshold: Annotated[
        list[str] | None,
        typer.Option(help="What counts as right, such as shift=0.05 or sd_ratio=0.95,1.05; may be repeated."),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Reference draws from a file or folder (ArviZ, NPZ, posteriordb), instead of NUTS."),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="The optimisation gap that is good enough, in nats.")] = 0.1,
    max_gradients: Annotated[
        int, typer.Option(help="The budget of each guide, in gradients of the log density.")
    ] = 3_000_000,
    solver: Annotated[str, typer.Option(help="auto, fixed_draws, natural_gradient or svi.")] = "auto",
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Neither use nor keep finished work; compiled programs are kept.")
    ] = False,
) -> None:
    """Fit guides, run NUTS, compare them, and write a report.

    Exit codes: 0, a report was written, whatever it says of the guides; 1, a report was written, but NUTS gave no
    draws or no guide could be fitted; 2, a mistake in the call, told in a sentence; 130, stopped by Ctrl-C: the same
    command goes on from what was finished.
    """
    with _sentences(keeps=not no_cache):
        begun = time.perf_counter()
        folder = _writable(out or Path("reports") / target.rpartition(":")[2].replace("/", "_"))
        from toolkit.comparison.verdicts import Thresholds
        from toolkit.sampling.references import load_reference
        from toolkit.storage import default_storage
        from toolkit.studies import study as run
        from toolkit.targets import parse_options, resolve

        storage, thresholds = None if no_cache else default_storage(), Thresholds.parse(threshold or [])
        model = resolve(target, data, parse_options(option or []))
        with _heard() as heard, _progress() as shown, _few_collections():

            def progress(stage: str, done: int, total: int, text: str) -> None:
                if heard:
                    raise KeyboardInterrupt
                shown(stage, done, total, text)

            done = run(
                model,
                guides=[name.strip() for name in guides.split(",") if name.strip()],
                focus=focus or (),
                seed=seed,
                tolerance=tolerance,
                max_gradients=max_gradients,
                solver=solver,
                chains=chains,
                warmup=warmup,
                draws=draws,
                chart=chart,
                target_accept=target_accept,
                until_decided=until_decided,
                thresholds=thresholds,
                against=load_reference(against, model) if against else None,
                storage=storage,
                progress=progress,
                command=_command(),
            )
            progress("report", 0, 1, "drawing")
            report = done.write(folder)
            progress("report", 1, 1, "done")
        _remember(report)
        _summary(done, report, time.perf_counter() - begun)
        _fail_if_nothing_to_compare(done)


@app.command()
def check(target: Target, data: Data = None, option: Options = None) -> None:
    """Check a model, rung by rung, and say what to do about the first that breaks.

    Exit codes: 0, nothing is broken; 1, a rung is broken; 2, a mistake in the call.
    """
    with _sentences():
        from toolkit.modelling.check import check as climb
        from toolkit.targets import find, parse_options

        found = find(target, data, parse_options(option or []))
        rungs = climb(*found) if isinstance(found, tuple) else climb(found)
        for rung in rungs:
            typer.echo(
                f"{'ok    ' if rung.passed else 'broken'}  {rung.name}{': ' + rung.message if rung.message else ''}"
            )
        if not rungs[-1].passed:
            raise typer.Exit(_FAILED)


@app.command("check-fit")
def check_fit(
    target: Target,
    data: Data = None,
    option: Options = None,
    guides: Annotated[str, typer.Option(help="Guides, separated by commas.")] = "mean_field,low_rank,full_rank",
    seed: Annotated[int, typer.Option(help="Makes every random number.")] = 0,
    threshold: Annotated[
        list[str] | None, typer.Option(help="What counts as right, such as shift=0.05; may be repeated.")
    ] = None,
    simulations: Annotated[
        int, typer.Option(help="Data sets that are simulated and refitted for VSBC; 0 leaves it out.")
    ] = 0,
    out: Annotated[Path | None, typer.Option(help="A CSV file for every number; none if not given.")] = None,
) -> None:
    """Fit guides and say what one may of each without NUTS: a predicted verdict with the evidence behind it.

    Exit codes: 0, whatever is said of the guides; 1, no guide could be fitted; 2, a mistake in the call.
    """
    with _sentences():
        import jax
        import pandas as pd

        from toolkit.comparison.diagnosis import diagnose
        from toolkit.comparison.verdicts import Thresholds
        from toolkit.targets import parse_options, resolve
        from toolkit.variational.fitting import fit

        model, thresholds = resolve(target, data, parse_options(option or [])), Thresholds.parse(threshold or [])
        names = [name.strip() for name in guides.split(",") if name.strip()]
        folder = _writable(out.parent) if out else None
        key, tables, usable = jax.random.PRNGKey(seed), [], False
        with _progress() as shown:
            for name in names:
                fitted = fit(model, name, key=jax.random.fold_in(key, 0), progress=shown)
                usable = usable or fitted.usable
                found = diagnose(
                    fitted,
                    key=jax.random.fold_in(key, 1),
                    thresholds=thresholds,
                    simulations=simulations,
                    progress=shown,
                )
                tables.append(found.table)
                typer.echo(f"{name:<14} {found.sentence}")
                for evidence in found.evidence:
                    typer.echo(f"{'':<14} {evidence}")
        if out and folder:
            folder.mkdir(parents=True, exist_ok=True)
            pd.concat(tables).to_csv(out, index=False, lineterminator="\n")
            typer.echo(out)
        if not usable:
            raise typer.Exit(_FAILED)


@app.command()
def leaderboard(
    targets: Annotated[
        list[str], typer.Argument(help="Models, as in study; a curated one may have options: lda:topics=4.")
    ],
    guides: Annotated[str, typer.Option(help="Guides, separated by commas.")] = "mean_field,low_rank,full_rank",
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0",
    out: Annotated[Path, typer.Option(help="The folder for the table, the page and the cells.")] = Path("leaderboard"),
    chains: Annotated[int, typer.Option(help="NUTS chains.")] = 4,
    warmup: Annotated[int, typer.Option(help="Warm-up transitions of each chain.")] = 1_000,
    draws: Annotated[int, typer.Option(help="Draws kept of each chain.")] = 1_000,
) -> None:
    """Study many models with many guides and seeds; one table (Parquet) and one page.

    What is done is kept in the folder: the same command after Ctrl-C goes on with what is missing, and tries again what
    failed. A cell that failed is rows with its reason.

    Exit codes: 0, the table was written, whatever is in it; 2, a mistake in the call; 130, stopped by Ctrl-C.
    """
    with _sentences(keeps=True):
        import models
        from toolkit.leaderboards import PAGE, TABLE, Entry
        from toolkit.leaderboards import leaderboard as run
        from toolkit.storage import default_storage
        from toolkit.targets import parse_options, resolve

        def entry(target: str) -> Entry:
            name, colon, given = target.partition(":") if ".py" not in target else (target, "", "")
            options = parse_options(given.split(",")) if colon else {}
            if ".py" not in target:
                models.load(name)  # a misspelt name is a mistake in the call, and not a cell that failed
            return Entry(target, lambda: resolve(name, None, options))

        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError as error:
            raise ValueError(f"Expected seeds as whole numbers, such as 0,1,2; got '{seeds}'.") from error
        with _heard() as heard, _progress() as shown:

            def progress(stage: str, done: int, total: int, text: str) -> None:
                if heard:
                    raise KeyboardInterrupt
                shown(stage, done, total, text)

            table = run(
                [entry(target) for target in targets],
                _writable(out),
                guides=[name.strip() for name in guides.split(",") if name.strip()],
                seeds=numbers,
                settings={"chains": chains, "warmup": warmup, "draws": draws},
                storage=default_storage(),
                progress=progress,
            )
        for (model, seed), own in table.groupby(["model", "seed"], sort=False):
            found = ", ".join(f"{row['guide']} {row['verdict'] or 'not judged'}" for _, row in own.iterrows())
            typer.echo(f"{model}, seed {seed}: {found}")
        typer.echo(out / TABLE)
        typer.echo(out / PAGE)


@app.command("open")
def open_report(
    folder: Annotated[Path | None, typer.Argument(help="A report's folder; the last one written if not given.")] = None,
) -> None:
    """Open a report in the browser."""
    with _sentences():
        report = folder / "report.html" if folder else _last()
        if not report.is_file():
            raise ValueError(f"Expected a report at '{report}'; found none: run 'elbowroom study' first.")
        typer.echo(report)
        webbrowser.open(report.resolve().as_uri())


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        typer.echo(f"elbowroom {version('elbowroom')}")
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()


def _command() -> str:
    import shlex

    return shlex.join(["elbowroom", *sys.argv[1:]])


def _writable(folder: Path) -> Path:
    """The folder; told now if it could not be made or written, not after minutes of work, and not made yet."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"Expected an output folder that can be written; '{folder}' cannot: {error.strerror}. "
            "Choose another with --out."
        ) from error
    return folder


@contextmanager
def _sentences(*, keeps: bool = False) -> Iterator[None]:
    """Misuse as one sentence and an exit code, without a traceback; `ELBOWROOM_DEBUG=1` shows it.

    Args:
        keeps: Whether finished work outlives Ctrl-C.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("ELBOWROOM_DEBUG"):
            raise
        typer.secho(f"elbowroom: {error}", err=True, fg="red")
        raise typer.Exit(_MISUSE) from error
    except KeyboardInterrupt as error:
        kept = "; what was finished is kept. The same command goes on from there." if keeps else "."
        typer.secho(f"\nelbowroom: stopped{kept}", err=True)
        raise typer.Exit(_STOPPED) from error


@contextmanager
def _heard() -> Iterator[list[int]]:
    """The Ctrl-C signals so far: one that lands in compiled code may come out as that library's own error."""
    heard: list[int] = []

    def hear(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, hear)
    try:
        yield heard
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _few_collections() -> Iterator[None]:
    """Python's collector at work more seldom.

    Tracing makes many small objects, and what JAX holds is large: at the defaults a twentieth of a study's time goes
    to finding nothing.
    """
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Bars with time left on a terminal, a line for each finished stage elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    tasks: dict[str, Any] = {}

    finished: set[str] = set()

    def tell(stage: str, done: int, total: int, text: str) -> None:
        # Starts are searched once in each chart.
        if done >= total and stage not in finished:
            finished.add(stage)
            typer.echo(f"{stage}: done", err=True)

    if not console.is_terminal:
        yield tell
        return
    with Progress(*columns, console=console) as bars:

        def update(stage: str, done: int, total: int, text: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, text=text)
            bars.update(tasks[stage], completed=done, total=total, text=text if done < total else "done")

        yield update


def _summary(study: Study, report: Path, seconds: float) -> None:
    for stage in study.resumed:
        typer.echo(f"{stage}: taken from the cache")
    for note in study.notes:
        typer.echo(note)
    typer.echo(study.comparison.overall.sentence)
    for name, row in study.comparison.guides.iterrows():
        typer.echo(f"{name:<14} {row['sentence']}")
    typer.echo(f"{'reference':<14} {study.reference.origin}: {study.reference.status.value}")
    for reason in study.reference.reasons:
        typer.echo(f"{'':<14} {reason}")
    for _, row in study.comparison.focus.iterrows():
        if isinstance(row["sentence"], str) and row["sentence"]:
            typer.echo(f"{row['source']:<14} {row['item']}: {row['sentence']}")
    for advice in study.comparison.advice:
        typer.echo(f"{'next':<14} {advice}")
    typer.echo(f"{report} ({seconds:.0f} s)")


def _fail_if_nothing_to_compare(study: Study) -> None:
    reasons = []
    if not study.reference.usable:
        reasons.append("the reference has no draws")
    if not any(fit.usable for fit in study.fits):
        reasons.append("no guide could be fitted")
    if reasons:
        typer.secho(f"elbowroom: nothing could be compared, because {' and '.join(reasons)}.", err=True, fg="red")
        raise typer.Exit(_FAILED)


def _remember(report: Path) -> None:
    """Note where the report is for `elbowroom open`, even with --no-cache: a path is no finished work."""
    from toolkit.storage import cache_folder

    note = cache_folder() / "last_report"
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(str(report.resolve()))
    except OSError as error:
        typer.echo(f"'elbowroom open' will not know of this report: '{note}' cannot be written ({error.strerror}).")


def _last() -> Path:
    from toolkit.storage import cache_folder

    note = cache_folder() / "last_report"
    if not note.is_file():
        raise ValueError("Expected a report to have been written; none is known: run 'elbowroom study' first.")
    return Path(note.read_text())


if __name__ == "__main__":
    main()
