"""Curated models, found by file name: each file brings a NumPyro callable, real data, simulation and a factory."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> tuple[str, ...]:
    """The curated models' names, sorted; one for each file of this folder."""
    return tuple(sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.ispkg and info.name[0] != "_"))


def load(name: str) -> ModuleType:
    """The module of a curated model, with `dataset`, `simulate` and `model`.

    Raises:
        ValueError: There is no model of that name.
    """
    if name not in names():
        raise ValueError(f"Expected a model's name, one of {', '.join(names())}; got '{name}'.")
    return importlib.import_module(f"models.{name}")
