"""Imports point down the list of layers in the design, and nothing else."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit

ROOT = Path(__file__).parent.parent
# From the bottom up; a set holds layers that do not know each other.
LAYERS: tuple[set[str], ...] = (
    {"status", "estimate", "influence", "cost", "progress", "storage"},
    {"compilation", "threads"},
    {"modelling"},
    {"variational", "sampling"},
    {"comparison"},
    {"reporting"},
    {"studies", "targets"},
    {"leaderboards"},
    {"cli"},
    {"__main__"},
)
PLOTTING = {"matplotlib", "arviz_plots", "seaborn", "plotly", "bokeh"}
INFERENCE = {"fit", "reference", "compare", "NUTS", "HMC", "MCMC", "SVI", "Predictive"}
# What a command names may be a curated model; nothing else in the toolkit knows that there are any.
KNOW_MODELS = {"cli.py", "targets.py"}
FILES = sorted((ROOT / "toolkit").rglob("*.py"))


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports; `from a import b` gives a and a.b."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def layer(part: str) -> int:
    (found,) = (height for height, parts in enumerate(LAYERS) if part in parts)
    return found


def part(name: str) -> str:
    """`toolkit.sampling.nuts` lies in `sampling`."""
    return name.split(".")[1]


def identifier(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    "path", [f for f in FILES if f.parent != ROOT / "toolkit" or f.stem != "__init__"], ids=identifier
)
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT / "toolkit").with_suffix("").parts[0]
    for name in imported(path):
        if name.startswith("toolkit.") and part(name) != own:
            assert layer(part(name)) < layer(own), f"{identifier(path)} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_only_the_command_line_knows_the_curated_models(path: Path) -> None:
    if path.parent != ROOT / "toolkit" or path.name not in KNOW_MODELS:
        assert not {name for name in imported(path) if name.split(".")[0] == "models"}


@pytest.mark.parametrize("path", FILES, ids=identifier)
def test_only_figures_plot(path: Path) -> None:
    if "figures" not in path.parts:
        assert not {name.split(".")[0] for name in imported(path)} & PLOTTING
    assert not {name.split(".")[0] for name in imported(path, top_level_only=True)} & {"arviz", "arviz_plots"}


@pytest.mark.parametrize("path", [f for f in FILES if "reporting" in f.parts], ids=identifier)
def test_reporting_runs_no_inference(path: Path) -> None:
    assert not {name.split(".")[-1] for name in imported(path)} & INFERENCE


ARRAYS_ONLY = ("influence", "comparison.metrics", "comparison.sides", "comparison.wasserstein", "sampling.bridge")


@pytest.mark.parametrize("name", ARRAYS_ONLY)
def test_metrics_take_arrays_and_know_no_noun_but_the_estimate(name: str) -> None:
    for found in imported(ROOT.joinpath("toolkit", *name.split(".")).with_suffix(".py")):
        if found.startswith("toolkit."):
            assert any(found.startswith(f"toolkit.{other}") for other in ("estimate", *ARRAYS_ONLY))


def test_the_public_names_are_those_that_a_type_checker_sees() -> None:
    body = ast.parse((ROOT / "toolkit" / "__init__.py").read_text()).body
    (seen,) = (node for node in body if isinstance(node, ast.If))
    homes = {
        a.name: n.module for n in seen.body if isinstance(n, ast.ImportFrom) for a in n.names if a.name == a.asname
    }
    assert sorted(homes) == sorted(toolkit.__all__)
    for name, home in homes.items():
        assert getattr(toolkit, name) is getattr(importlib.import_module(str(home)), name)


def test_every_layer_is_real() -> None:
    parts = {path.relative_to(ROOT / "toolkit").with_suffix("").parts[0] for path in FILES} - {"__init__"}
    assert parts <= set().union(*LAYERS)


@pytest.mark.parametrize("module", ["toolkit.influence", "toolkit.comparison.leave_one_out", "toolkit.sampling.modes"])
def test_numpyro_comes_before_arviz_whatever_is_imported_first(module: str) -> None:
    """Else arviz-base leaves a lazy NumPyro behind, whose distributions lack what NumPyro's have."""
    program = f"import {module}; import numpyro.distributions as d; assert d.util.validate_sample"
    subprocess.run([sys.executable, "-c", program], check=True)
