"""A leaderboard has a row for each cell, failed ones too, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from targets import line
from typer.testing import CliRunner

import models
from toolkit import Entry, Model, Storage, leaderboard, study
from toolkit.cli import app
from toolkit.leaderboards import CELLS, COLUMNS, PAGE, TABLE

GUIDES = ("mean_field", "full_rank")


def target(correlation: float) -> Model:
    made: Model = models.load("gaussian_target").model(dimensions=2, correlation=correlation)
    return made


def broken() -> Model:
    raise RuntimeError("this model cannot be made\nsecond line")


ENTRIES = [Entry("narrow", lambda: target(0.9)), Entry("round", lambda: target(0.0)), Entry("broken", broken)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("board")
    return folder, leaderboard(ENTRIES, folder, guides=GUIDES, seeds=[0, 1], settings={"draws": 2_000})


@pytest.mark.slow
def test_there_is_a_row_for_each_model_seed_and_guide(written: tuple[Path, pd.DataFrame]) -> None:
    _, table = written
    assert list(table.columns) == list(COLUMNS)
    assert len(table) == 3 * 2 * 2
    by_cell = table.set_index(["model", "seed", "guide"])
    assert by_cell.loc[("narrow", 0, "mean_field"), "verdict"] == "wrong"
    assert by_cell.loc[("narrow", 1, "full_rank"), "verdict"] == "right"
    assert by_cell.loc[("round", 0, "mean_field"), "right"] == 2
    assert by_cell.loc[("narrow", 0, "mean_field"), "kl_qp"] == pytest.approx(0.8304, abs=0.01)
    assert by_cell.loc[("narrow", 0, "mean_field"), "reference_status"] == "EXACT"


def test_a_cell_that_failed_is_rows_with_its_reason(written: tuple[Path, pd.DataFrame]) -> None:
    failed = written[1][written[1]["model"] == "broken"]
    assert set(failed["status"]) == {"FAILED"}
    assert set(failed["sentence"]) == {"this model cannot be made"}
    assert set(failed["verdict"]) == {""}


def test_the_table_is_parquet_with_the_same_types(written: tuple[Path, pd.DataFrame]) -> None:
    folder, table = written
    read = pd.read_parquet(folder / TABLE)
    assert list(read.columns) == list(COLUMNS)
    assert read["seed"].dtype == "Int64"
    pd.testing.assert_frame_equal(read, table, check_dtype=False)


def test_the_page_says_who_is_right_how_often(written: tuple[Path, pd.DataFrame]) -> None:
    html = (written[0] / PAGE).read_text(encoding="utf-8")
    assert "Which guide is right how often?" in html
    assert "this model cannot be made" in html
    assert "✗ wrong" in html
    assert "http" not in html.replace("http://www.w3.org", "")


def test_the_same_call_takes_what_is_done_and_makes_what_is_missing(
    written: tuple[Path, pd.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table = written
    made: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["seed"])
        return study(*args, **kwargs)

    monkeypatch.setattr("toolkit.leaderboards.study", counted)
    again = leaderboard(ENTRIES, folder, guides=GUIDES, seeds=[0, 1], settings={"draws": 2_000})
    assert made == []
    pd.testing.assert_frame_equal(again, table)
    next((folder / CELLS).glob("round-*-1.parquet")).write_bytes(b"cut short")
    leaderboard(ENTRIES, folder, guides=GUIDES, seeds=[0, 1], settings={"draws": 2_000})
    assert made == [1]
    changed = [Entry("narrow", lambda: target(0.8))]
    leaderboard(changed, folder, guides=GUIDES, seeds=[0], settings={"draws": 2_000})
    leaderboard(changed, folder, guides=GUIDES, seeds=[0], settings={"draws": 1_000})
    assert made == [1, 0, 0]  # another model of that name, then other settings


def test_rows_that_were_cut_short_between_key_and_table_are_made_anew(tmp_path: Path) -> None:
    leaderboard(ENTRIES[:1], tmp_path, guides=["mean_field"])
    next((tmp_path / CELLS).glob("narrow-*.json")).unlink()
    again = leaderboard([Entry("narrow", lambda: target(0.5))], tmp_path, guides=["mean_field"])
    assert again["kl_qp"].item() == pytest.approx(0.1438, abs=0.01)
    stated = [Entry("narrow", lambda: dataclasses.replace(target(0.5), log_evidence=-7.0))]
    assert leaderboard(stated, tmp_path, guides=["mean_field"])["kl_qp"].item() == pytest.approx(0.6438, abs=0.01)


def test_what_was_finished_before_a_stop_is_kept(tmp_path: Path) -> None:
    def stopping(stage: str, done: int, total: int, text: str) -> None:
        if stage == "leaderboard" and text.startswith("round"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leaderboard(ENTRIES[:2], tmp_path, guides=GUIDES, progress=stopping)
    assert sorted(path.suffix for path in (tmp_path / CELLS).glob("narrow-*-0.*")) == [".json", ".parquet"]
    assert not list((tmp_path / CELLS).glob("round-*"))
    assert not (tmp_path / TABLE).exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"guides": []}, "at least one model, one guide and one seed"),
        ({"guides": ["mean_field", "mean_field"]}, "each model, guide and seed once"),
        ({"seeds": [1, 1]}, "each model, guide and seed once"),
        ({"guides": ["mean_feild"]}, "Expected a guide's name"),
        ({"settings": {"warmpu": 3}}, "Expected settings of a study; got warmpu"),
    ],
)
def test_misuse_is_told_before_any_work(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        leaderboard([Entry("line", line)], tmp_path, **{"guides": GUIDES, **changes})


def test_the_storage_keeps_what_two_boards_share(tmp_path: Path) -> None:
    storage = Storage(tmp_path / "cache")
    first = leaderboard(ENTRIES[:1], tmp_path / "a", guides=["mean_field"], storage=storage)
    second = leaderboard(ENTRIES[:1], tmp_path / "b", guides=["mean_field"], storage=storage)
    assert first["elbo"].tolist() == second["elbo"].tolist()


def test_the_command_writes_both(tmp_path: Path) -> None:
    targets = ["gaussian_target:dimensions=2", "gaussian_target:dimensions=2,correlation=0.5"]
    result = CliRunner().invoke(
        app, ["leaderboard", *targets, "--guides", "mean_field", "--out", str(tmp_path / "board")]
    )
    assert result.exit_code == 0, result.output
    assert "gaussian_target:dimensions=2, seed 0: mean_field wrong" in result.output
    assert len(pd.read_parquet(tmp_path / "board" / TABLE)) == 2
    for arguments in (["lda", "--seeds", "a"], ["lad"], ["lda", "--guides", "mean_feild"]):
        wrong = CliRunner().invoke(app, ["leaderboard", *arguments, "--out", str(tmp_path)])
        assert wrong.exit_code == 2, arguments
