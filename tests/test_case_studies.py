"""Every case study runs from end to end, quickly, and ends with a decision and a report."""

import runpy
import sys
from pathlib import Path

import pytest

CASES = sorted((Path(__file__).parent.parent / "case_studies").glob("[0-9]*.py"))
# The first stands for all in the quick tests; the others take most of a minute each on a slow machine.
QUICK = CASES[:1]


def identifier(path: Path) -> str:
    return path.stem


def parameters() -> list[object]:
    return [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow, id=path.stem) for path in CASES]


@pytest.mark.parametrize("path", parameters())
def test_runs_and_decides(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    assert "Decision" in capsys.readouterr().out
    reports = sorted(tmp_path.glob("*/report.html"))
    assert reports
    for report in reports:
        assert "not judged: an error stopped it" not in report.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", CASES, ids=identifier)
def test_is_short_and_in_percent_format(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 200
    assert lines[0] == "# %% [markdown]"
    assert sum(line.startswith("# %%") for line in lines) >= 6


def test_there_is_one_for_each_model() -> None:
    texts = [path.read_text(encoding="utf-8") for path in CASES]
    import models

    for name in models.names():
        assert any(f'models.load("{name}")' in text for text in texts), f"no case study of {name}"
