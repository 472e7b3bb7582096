"""Compiled programs are kept in the cache folder by default: a second process reads what the first one compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FITTED = """
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
import models
from toolkit import fit
fitted = fit(models.load("collinear_logistic").model(), "mean_field", key=jax.random.PRNGKey(0), starts=1)
print(fitted.status.name, hits.count("/jax/compilation_cache/cache_hits"))
"""
ASKED = """
import jax
from toolkit.compilation import keep_compiled_programs
keep_compiled_programs()
print(jax.config.jax_compilation_cache_dir)
"""
TURNED_OFF = f"import jax; jax.config.update('jax_enable_compilation_cache', False){ASKED}"


def said(program: str, cache: Path, **environment: str) -> list[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    given = {**inherited, "ELBOWROOM_CACHE": str(cache), "JAX_PLATFORMS": "cpu", **environment}
    ended = subprocess.run(
        [sys.executable, "-c", program], env=given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ended.stdout.split()


@pytest.mark.slow
def test_a_second_process_reads_the_programs_of_a_fit(tmp_path: Path) -> None:
    status, hits = said(FITTED, tmp_path)
    assert (status, hits) == ("ARRIVED", "0")
    assert list((tmp_path / "jax").glob("*log_density*"))
    status, hits = said(FITTED, tmp_path)
    assert status == "ARRIVED"
    assert int(hits) > 0


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, "{cache}/jax"),
        ({"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, "elsewhere"),
    ],
    ids=["by default", "told where"],
)
def test_where_programs_are_kept(environment: dict[str, str], folder: str, tmp_path: Path) -> None:
    assert said(ASKED, tmp_path, **environment) == [folder.format(cache=tmp_path)]


@pytest.mark.parametrize(
    ("program", "environment"),
    [
        (ASKED, {"JAX_ENABLE_COMPILATION_CACHE": "false"}),
        (ASKED, {"JAX_ENABLE_COMPILATION_CACHE": "0"}),
        (TURNED_OFF, {}),
    ],
    ids=["by a word", "by a number", "in the program"],
)
def test_nothing_is_kept_or_made_where_it_is_off(program: str, environment: dict[str, str], tmp_path: Path) -> None:
    assert said(program, tmp_path, **environment) == ["None"]
    assert not list(tmp_path.iterdir())


def test_nothing_is_kept_where_no_folder_can_be_made(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("")
    assert said(ASKED, taken) == ["None"]
