"""The command line: what a user types, what they read, and the exit code that a script sees."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import toolkit.cli
from toolkit import Model, Storage, read_dataset, study
from toolkit.cli import app
from toolkit.targets import parse_options, resolve

HERE = Path(__file__).parent / "cli_models"
ELBOWROOM = Path(sys.executable).with_name("elbowroom")
GROWTH, HEIGHTS, NUMBERS = f"{HERE}/growth.py:growth", f"{HERE}/growth.csv", f"{HERE}/numbers.csv"
QUICK = ("--guides", "mean_field", "--chains", "2", "--warmup", "300", "--draws", "500")
QUICK_STUDY = {"guides": ("mean_field",), "chains": 2, "warmup": 300, "draws": 500}


@pytest.fixture(autouse=True)
def _undone(monkeypatch):
    """A target's folder is put on sys.path, as for a script; not for the other tests."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(*words):
    """The command in this process; stdout and stderr together in `.output`."""
    return CliRunner().invoke(app, [str(word) for word in words])


def spawn(words, folder, cache):
    """The command in a process of its own, whose programs come from the tests' store of compiled ones."""
    environment = os.environ | {
        "ELBOWROOM_CACHE": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return subprocess.Popen(
        [ELBOWROOM, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment,
    )


def tables(report):
    """Every table of a report but those that hold seconds, which no two runs share."""
    return {
        path.name: path.read_bytes()
        for path in sorted((report / "tables").iterdir())
        if path.name not in ("guides.csv", "fits.csv")
    }


def kinds(name):
    return f"{HERE}/kinds.py:{name}"


# What answers without work


def test_help_imports_nothing_heavy_and_answers_in_under_a_second():
    heavy = ("jax", "numpyro", "arviz", "pandas", "matplotlib")
    code = f"import sys, toolkit.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    # Time on the CPU, so that a busy machine does not fail the test; children's times are summed by the system.
    before = os.times()
    subprocess.run([ELBOWROOM, "--help"], capture_output=True, check=True, timeout=60)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0


def test_version_is_the_distribution_s():
    assert re.fullmatch(r"elbowroom \d+\.\d+\.\d+\S*\n", run("--version").output)


def test_list_has_a_line_for_each_curated_model():
    names = [line.split()[0] for line in run("list").output.splitlines()]
    assert names == sorted(names)
    assert {"collinear_logistic", "gaussian_target", "hierarchical_regression", "lda", "poisson_glm"} <= set(names)
    files = (Path(__file__).parent.parent / "models").glob("[!_]*.py")
    assert set(names) == {file.stem for file in files}


def test_show_gives_question_data_options_and_sites():
    result = run("show", "collinear_logistic")
    assert result.exit_code == 0
    for text in ("Collinear logistic regression", "data      breast_cancer", "prior='normal'", "beta"):
        assert text in result.output


@pytest.mark.parametrize("module", ["toolkit", "toolkit.cli"])
def test_the_command_is_there_as_a_module(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "list"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "collinear_logistic" in done.stdout


def test_study_s_help_tells_the_exit_codes():
    text = " ".join(run("study", "--help").output.split())
    for part in ("0, a report was written", "1, a report was written, but", "2, a mistake", "130, stopped"):
        assert part in text


# What a target may be


def test_a_text_column_becomes_codes_with_labels_and_options_are_static():
    model = resolve(GROWTH, Path(HEIGHTS), {"noise": 2.0})
    assert list(model.dataset.coords["school"]) == ["north", "south"]
    assert model.dataset.static == {"noise": 2.0}
    assert set(model.dataset.arrays) == {"age", "school", "height"}


@pytest.mark.parametrize(
    ("name", "data", "options", "first"),
    [
        ("bound", None, {}, 0.3),
        ("factory", None, {}, 0.3),
        ("factory", None, {"scale": 2.0}, 0.6),
        ("rescaled", NUMBERS, {"scale": 2.0}, 0.6),
    ],
)
def test_a_name_may_be_a_model_or_a_function_that_returns_one(name, data, options, first):
    model = resolve(kinds(name), data and Path(data), options)
    assert model.dataset.name == "four_numbers"
    assert model.dataset.arrays["y"][0] == pytest.approx(first, rel=1e-12)


def test_a_matrix_comes_from_npz(tmp_path):
    np.savez(tmp_path / "design.npz", design=np.eye(4)[:, :3], y=np.arange(4.0), unused=np.zeros(2))
    model = resolve(kinds("regression"), tmp_path / "design.npz", {})
    assert model.sites["beta"].shape == (3,)
    assert set(model.dataset.arrays) == {"design", "y"}


def test_a_file_may_bear_the_name_of_a_package(tmp_path):
    (tmp_path / "models.py").write_text((HERE / "kinds.py").read_text())
    before = sys.modules["models"]
    assert resolve(f"{tmp_path}/models.py:bound", None, {}).name == "mean"
    assert sys.modules["models"] is before


def test_the_data_of_a_curated_model_may_be_one_s_own(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"score": rng.normal(size=12), "dose": rng.normal(size=12), "ward": list("abc") * 4})
    frame.to_csv(tmp_path / "own.csv", index=False)
    model = resolve("hierarchical_regression", tmp_path / "own.csv", {"formula": "score ~ dose + (1 | ward)"})
    assert model.name == "hierarchical_regression"


def test_options_are_read_as_values():
    texts = ["a=3", "b=0.5", "c=True", "d=none", "e=[1, 2]", "f=laplace", "g=y ~ x=1"]
    assert parse_options(texts) == {
        "a": 3, "b": 0.5, "c": True, "d": None, "e": [1, 2], "f": "laplace", "g": "y ~ x=1"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("factor_only", "its likelihood is a factor: predictive draws are left out"),
        ("flat", "which is flat for mu: prior draws are left out"),
        ("mixture", "high summed out by enumeration"),
    ],
)
def test_check_says_what_is_special(name, text):
    result = run("check", kinds(name), "--data", NUMBERS)
    assert result.exit_code == 0
    assert "broken" not in result.output
    assert text in result.output


# Misuse: a sentence and exit code 2


@pytest.fixture
def cut_csv(tmp_path):
    """Data files with one fault each."""
    files = {
        "hole.csv": "y\n1.0\n\n2.0\nnan\n",
        "text_hole.csv": "age,school,height\n1,north,70\n2,,80\n",
        "empty.csv": "",
        "other.csv": "x\n1\n",
        "data.txt": "y\n1\n",
        "cut.npz": "PK\x03\x04 and no more",
        "unfinished.py": "def model(y:\n    pass\n",
        "quits.py": "raise SystemExit(0)\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    return tmp_path


MISUSE = {
    "unknown model": (["nosuch"], "Expected a model's name, one of collinear_logistic,"),
    "unknown option of a curated model": (["lda", "--option", "topic=3"], "got topic."),
    "option without a value": ([GROWTH, "--option", "noise"], "Expected --option as name=value; got 'noise'."),
    "option twice": ([GROWTH, "--option", "noise=1", "--option", "noise=2"], "Expected --option noise once"),
    "unknown option of one's own": (
        [GROWTH, "--data", HEIGHTS, "--option", "nose=1"],
        "Expected options of 'growth', one of age, school, height, noise; got nose.",
    ),
    "option for a model": ([kinds("bound"), "--option", "a=1"], "which is a Model with data already"),
    "unknown guide": (
        [GROWTH, "--data", HEIGHTS, "--guides", "meanfield"],
        "Expected a guide's name, one of mean_field",
    ),
    "no guide": ([GROWTH, "--data", HEIGHTS, "--guides", ","], "Expected at least one guide"),
    "unknown chart": ([GROWTH, "--data", HEIGHTS, "--chart", "centred"], "Expected chart to be one of ['plain']"),
    "unknown focus": ([GROWTH, "--data", HEIGHTS, "--focus", "per_yaer > 6"], "per_yaer"),
    "no draws": ([GROWTH, "--data", HEIGHTS, "--draws", "0"], "Expected draws to be at least 8; got 0."),
    "one chain": ([GROWTH, "--data", HEIGHTS, "--chains", "1"], "Expected chains to be at least 2; got 1."),
    "certain acceptance": (
        [GROWTH, "--data", HEIGHTS, "--target-accept", "1"],
        "Expected target_accept between 0 and 1; got 1.0.",
    ),
    "no tolerance": (
        [GROWTH, "--data", HEIGHTS, "--tolerance", "0"],
        "Expected a positive tolerance in nats and a positive whole max_gradients; got 0.0",
    ),
    "no steps": (
        [GROWTH, "--data", HEIGHTS, "--max-gradients", "0"],
        "Expected a positive tolerance in nats and a positive whole max_gradients; got 0.1 and 0",
    ),
    "no data": ([GROWTH], "Expected data for 'age', 'school' of 'growth'; got none: add --data"),
    "data not there": ([GROWTH, "--data", "nosuch.csv"], "Expected a data file at 'nosuch.csv'; found none"),
    "data of another kind": (
        [kinds("mean"), "--data", "data.txt"],
        "Expected a .csv or .npz data file; got 'data.txt'",
    ),
    "empty data": ([kinds("mean"), "--data", "empty.csv"], "Expected a readable .csv file"),
    "half an archive": ([kinds("mean"), "--data", "cut.npz"], "it is no whole NPZ archive"),
    "an array without a name": ([kinds("mean"), "--data", "single.npz"], "it holds a single array without a name"),
    "missing column": (
        [GROWTH, "--data", "other.csv"],
        "Expected data for the arguments 'age', 'school' of 'growth'; 'other.csv' holds 'x': add the column, or give "
        "what is no data as an option (on the command line --option name=value).",
    ),
    "missing value": ([kinds("mean"), "--data", "hole.csv"], "Expected finite numbers in data array 'y'; got 1 NaN"),
    "missing text": ([GROWTH, "--data", "text_hole.csv"], "Expected a value in every row of the text column 'school'"),
    "curated data not there": (["hierarchical_regression", "--data", "nosuch.csv"], "nosuch.csv"),
    "no such file": (["nosuch.py:model"], "Expected a Python file at 'nosuch.py'; found none"),
    "no name": ([f"{HERE}/kinds.py"], "Expected path/to/file.py:name; got"),
    "name not in file": ([kinds("meen")], "Expected 'meen' in"),
    "name of a number": ([f"{HERE}/mistakes.py:NUMBER"], "to be a Model or callable; it is a int"),
    "syntax error": (["unfinished.py:model"], "Expected 'unfinished.py' to import; it stops with SyntaxError"),
    "file that quits": (["quits.py:model"], "Expected 'quits.py' to import; it stops with SystemExit"),
    "output below a file": (
        [GROWTH, "--data", HEIGHTS, "--out", f"{HEIGHTS}/sub"],
        "Expected an output folder that can",
    ),
    "reference not there": ([GROWTH, "--data", HEIGHTS, "--against", "nosuch.nc"], "nosuch.nc"),
}


@pytest.mark.parametrize(("words", "text"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_a_sentence_and_leaves_nothing(words, text, cut_csv, monkeypatch):
    monkeypatch.chdir(cut_csv)
    before = set(cut_csv.rglob("*"))
    result = run("study", *words)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("elbowroom: Expected")
    assert text in result.output
    assert "Traceback" not in result.output
    assert not isinstance(result.exception, ValueError)
    assert {path for path in cut_csv.rglob("*") if "__pycache__" not in path.parts} == before


MISTAKES = {
    "observes_nothing": "Expected model 'observes_nothing' to observe something; it has only mu",
    "endless": "'count' cannot be enumerated: sum it out of the likelihood",
    "wrong_plate": "Expected 3 values of site 'y' along plate 'row' of model 'wrong_plate'; got 4",
    "wrong_shape": "Expected model 'wrong_shape' to run on dataset 'numbers'; it stops with TypeError: dot_general",
    "broken_factory": "Expected model 'observes_nothing' to observe something; it has only mu",
}


@pytest.mark.parametrize(("name", "text"), MISTAKES.items())
def test_a_model_that_cannot_be_studied_is_told(name, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("study", f"{HERE}/mistakes.py:{name}", "--data", NUMBERS)
    assert result.exit_code == 2
    assert text in result.output
    assert not list(tmp_path.iterdir())


BROKEN = {
    "observes_nothing": "broken  observes something: ",
    "endless": "broken  has no discrete latent left over: ",
    "wrong_plate": "broken  has coords that fit its plates: ",
    "wrong_shape": "broken  runs on the data: ",
    "impossible": "broken  has a finite density: ",
}


@pytest.mark.parametrize(("name", "text"), BROKEN.items())
def test_check_ends_at_the_broken_rung_with_exit_code_1(name, text):
    result = run("check", f"{HERE}/mistakes.py:{name}", "--data", NUMBERS)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith(text)
    assert result.output.count("broken") == 1


# Studies


STUDY = ("study", GROWTH, "--data", HEIGHTS, "--option", "noise=2.0", "--focus", "per_year > 6", *QUICK)


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    """A study of fifteen lines and a CSV by the command in a process of its own: its folder and what it said."""
    folder = tmp_path_factory.mktemp("by_command")
    process = spawn(STUDY, folder, folder / "cache")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return folder, out, err


def test_a_callable_of_one_s_own_and_a_csv_give_a_report(by_command):
    folder, out, err = by_command
    report = folder / "reports" / "growth"
    html = (report / "report.html").read_text()
    for text in ("offset[north]", "offset[south]", "P(per_year &gt; 6)", "--option noise=2.0"):
        assert text in html
    assert out.splitlines()[-1].startswith("reports/growth/report.html (")
    assert re.search(r"^mean_field +\w+", out, re.M)
    assert re.search(r"^reference +NUTS, 2 chains x 500 draws after 300 warm-up", out, re.M)


def test_off_a_terminal_there_is_a_line_a_stage_and_no_control_character(by_command):
    _, out, err = by_command
    stages = ["tracing", "starts", "fit mean_field", "reference", "compare", "predict", "report"]
    assert err.splitlines() == [f"{stage}: done" for stage in stages]
    assert not re.search(r"[^\n -~±×≤≥−–\w]", out + err)


def test_the_same_by_the_api_finds_what_the_command_finished(by_command, tmp_path):
    folder, _, _ = by_command
    fn = resolve(GROWTH, Path(HEIGHTS), {}).fn
    model = Model(fn, read_dataset(HEIGHTS, fn, {"noise": 2.0}))
    storage = Storage(folder / "cache")
    done = study(model, focus=("per_year > 6",), storage=storage, **QUICK_STUDY)
    assert done.resumed == ("fit mean_field", "reference")
    assert done.write(tmp_path).is_file()
    assert tables(tmp_path) == tables(folder / "reports" / "growth")


def test_a_study_that_was_stopped_goes_on_to_the_same_tables(by_command, tmp_path, monkeypatch):
    stopped = []

    @contextlib.contextmanager
    def stopping():
        def progress(stage, done, total, text):
            if stage == "reference" and done and not stopped:
                stopped.append(text)
                raise KeyboardInterrupt

        yield progress

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toolkit.cli, "_progress", stopping)
    first = run(*STUDY)
    assert first.exit_code == 130
    assert stopped
    assert first.output == "\nelbowroom: stopped; what was finished is kept. The same command goes on from there.\n"
    second = run(*STUDY)
    assert second.exit_code == 0
    assert "fit mean_field: taken from the cache\n" in second.output
    assert tables(tmp_path / "reports" / "growth") == tables(by_command[0] / "reports" / "growth")


@pytest.mark.slow
def test_a_cache_entry_cut_in_half_is_said_and_made_again(by_command, tmp_path, monkeypatch):
    folder, _, _ = by_command
    shutil.copytree(folder / "cache", tmp_path / "cache")
    for kind in ("fit", "reference"):
        (entry,) = (tmp_path / "cache" / kind).iterdir()
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    monkeypatch.setenv("ELBOWROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = run(*STUDY)
    assert result.exit_code == 0
    for kind in ("fit", "reference"):
        assert re.search(
            rf"^The stored {kind} '\w+' was damaged; it was removed and is made again\.$", result.output, re.M
        )
    assert "taken from the cache" not in result.output
    assert tables(tmp_path / "reports" / "growth") == tables(folder / "reports" / "growth")


def test_a_density_of_zero_everywhere_leaves_a_report_and_exit_code_1(tmp_path):
    result = run("study", f"{HERE}/mistakes.py:impossible", "--data", NUMBERS, "--out", tmp_path, *QUICK)
    assert result.exit_code == 1
    assert (tmp_path / "report.html").is_file()
    assert "at the last site 'never' has a log density of -inf" in result.output
    last = "elbowroom: nothing could be compared, because the reference has no draws and no guide could be fitted."
    assert result.output.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param(
            "factor_only", "Predictive draws are left out: the likelihood is a factor", marks=pytest.mark.slow
        ),
        pytest.param(
            "flat", "Prior and prior predictive draws are left out: the prior of mu is flat", marks=pytest.mark.slow
        ),
        pytest.param("mixture", "Discrete sites summed out by enumeration: high.", marks=pytest.mark.slow),
    ],
)
def test_the_report_says_what_is_left_out(name, text, tmp_path):
    result = run("study", kinds(name), "--data", NUMBERS, "--out", tmp_path, *QUICK)
    assert result.exit_code == 0, result.output
    assert text in (tmp_path / "report.md").read_text()


# Opening


def test_open_shows_the_last_report_or_a_folder_s(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert "none is known: run 'elbowroom study' first" in run("open").output
    (tmp_path / "report.html").write_text("a report")
    toolkit.cli._remember(tmp_path / "report.html")
    assert run("open").exit_code == 0
    assert run("open", tmp_path).exit_code == 0
    assert opened == [(tmp_path / "report.html").as_uri()] * 2
    result = run("open", tmp_path / "nosuch")
    assert result.exit_code == 2
    assert "found none: run 'elbowroom study' first" in result.output


# Ctrl-C


def interrupted(words, folder, when):
    """What a study said that got SIGINT once `when` was true, and the seconds from the signal to its end."""
    process = spawn(words, folder, folder / "cache")
    deadline = time.monotonic() + 240
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    seconds = time.monotonic() - sent
    assert process.returncode == 130, out + err
    assert "Traceback" not in err
    assert err.endswith("\nelbowroom: stopped; what was finished is kept. The same command goes on from there.\n")
    return err, seconds


def test_ctrl_c_that_a_library_swallows_stops_the_study_at_the_next_block(monkeypatch, tmp_path):
    def swallowing(model, *, progress, **_):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        progress("reference", 0, 1, "")
        pytest.fail("the work went on")

    monkeypatch.setattr("toolkit.studies.study", swallowing)
    before = signal.getsignal(signal.SIGINT)
    assert run("study", kinds("bound"), "--out", tmp_path).exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("words", "said"), [((), "stopped; what was finished is kept."), (("--no-cache",), "stopped.\n")]
)
def test_only_what_is_kept_is_said_to_be(words, said, monkeypatch, tmp_path):
    def stopped(model, **_):
        raise KeyboardInterrupt

    monkeypatch.setattr("toolkit.studies.study", stopped)
    result = run("study", kinds("bound"), "--out", tmp_path, *words)
    assert result.exit_code == 130
    assert f"elbowroom: {said}" in result.output


@pytest.mark.slow
def test_ctrl_c_in_mid_fit_and_in_mid_nuts_then_the_same_numbers(tmp_path):
    words = [*STUDY[:-1], "120000", "--guides", "mean_field,dais", "--max-gradients", "32000"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped.mkdir()
    whole.mkdir()
    cache = stopped / "cache"

    # dais takes many seconds, and begins once the mean field is kept.
    err, seconds = interrupted(words, stopped, lambda: list(cache.glob("fit/*.entry")))
    assert "fit mean_field: done\n" in err
    assert "fit dais: done\n" not in err
    assert seconds < 10

    def in_nuts():
        return len(list(cache.glob("fit/*.entry"))) == 2 and time.sleep(2) is None

    err, seconds = interrupted(words, stopped, in_nuts)
    assert "fit dais: done\n" in err
    assert "reference: done\n" not in err
    assert seconds < 10

    for folder in (stopped, whole):
        process = spawn(words, folder, folder / "cache")
        out, err = process.communicate(timeout=280)
        assert process.returncode == 0, err
        assert ("fit mean_field: taken from the cache\nfit dais: taken from the cache\n" in out) is (folder is stopped)
    assert tables(stopped / "reports" / "growth") == tables(whole / "reports" / "growth")
