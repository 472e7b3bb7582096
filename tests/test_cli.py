"""The command line: what a user types, what they read, and the exit code that a script sees."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from toolkit.cli import app
from toolkit.targets import parse_options, resolve

HERE = Path(__file__).parent / "cli_models"
ELBOWROOM = Path(sys.executable).with_name("elbowroom")
GROWTH, HEIGHTS, NUMBERS = f"{HERE}/growth.py:growth", f"{HERE}/growth.csv", f"{HERE}/numbers.csv"
QUICK = ("--guides", "mean_field", "--chains", "2", "--warmup", "300", "--draws", "500")
QUICK_STUDY = {"guides": ("mean_field",), "chains": 2, "warmup": 300, "draws": 500}


def run(*words):
    """The command in this process; stdout and stderr together in `.output`."""
    return CliRunner().invoke(app, [str(word) for word in words])


def spawn(*words, **options):
    return subprocess.Popen(
        [ELBOWROOM, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def kinds(name):
    return f"{HERE}/kinds.py:{name}"


# What answers without work


def test_help_imports_nothing_heavy_and_answers_in_under_a_second():
    code = "import sys, toolkit.cli; print([n for n in ('jax', 'numpyro', 'arviz', 'pandas', 'matplotlib') if n in sys.modules])"
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
    assert names == ["collinear_logistic", "hierarchical_regression", "lda", "poisson_glm"]


def test_show_gives_question_data_options_and_sites():
    result = run("show", "collinear_logistic")
    assert result.exit_code == 0
    for text in ("Collinear logistic regression", "data      breast_cancer", "prior='normal'", "beta"):
        assert text in result.output


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
    "no draws": ([GROWTH, "--data", HEIGHTS, "--draws", "0"], "Expected draws to be at least 4; got 0."),
    "one chain": ([GROWTH, "--data", HEIGHTS, "--chains", "1"], "Expected chains to be at least 2; got 1."),
    "no tolerance": (
        [GROWTH, "--data", HEIGHTS, "--tolerance", "0"],
        "Expected a positive tolerance and positive max_steps; got 0.0",
    ),
    "no steps": (
        [GROWTH, "--data", HEIGHTS, "--max-steps", "0"],
        "Expected a positive tolerance and positive max_steps; got 0.1 and 0",
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
        "Expected data for the arguments 'age', 'school' of 'growth'; 'other.csv' holds 'x'.",
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
    assert MISTAKES.get(name, "the log density") or "Expected a finite log density" in result.output
    assert result.output.count("broken") == 1
