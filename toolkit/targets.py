"""What a command names: a curated model, or something in a user's own file; with data and options, a `Model`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from numpyro import handlers

import models
from toolkit.modelling.dataset import Dataset, read_dataset
from toolkit.modelling.model import Model


def parse_options(options: list[str]) -> dict[str, Any]:
    """`key=value` texts as a dictionary; numbers, booleans, lists and None are read as such, the rest is text.

    Raises:
        ValueError: A text has no `=`, or a key comes twice.
    """
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"Expected --option as name=value; got '{option}'.")
        if key in parsed:
            raise ValueError(f"Expected --option {key} once; got it twice.")
        parsed[key] = _value(text)
    return parsed


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def resolve(target: str, data: Path | None, options: Mapping[str, Any]) -> Model:
    """The model that `target` names, on the data given.

    Args:
        target: The name of a curated model, or `path/to/file.py:name`, where the name is a `Model`, a function that
            returns one, or a NumPyro callable.
        data: A `.csv` or `.npz` file; a curated model's own data if None.
        options: A curated model's options, the arguments of a function that returns a `Model`, or the static
            arguments of a NumPyro callable.

    Raises:
        ValueError: There is no such model, file or name; the data or the options do not fit.
    """
    if ".py" in target:
        return _own(target, data, dict(options))
    module = models.load(target)
    _check_options(module.model, options, f"model '{target}'")
    if data is None:
        return module.model(**options)
    first = next(iter(signature(module.model).parameters))
    return module.model(_frame(data) if first == "data" else _all_arrays(data), **options)


def _frame(data: Path) -> pd.DataFrame:
    if data.suffix != ".csv" or not data.is_file():
        raise ValueError(f"Expected a .csv data file that is there; got '{data}'.")
    return pd.read_csv(data)


def _all_arrays(data: Path) -> Dataset:
    """Every array of an NPZ, or every column of a CSV, for a curated model to check."""
    if data.suffix == ".npz" and data.is_file():
        with np.load(data, allow_pickle=False) as file:
            names = list(file.files)
    else:
        names = [str(name) for name in _frame(data).columns]

    def taker(**kwargs: Any) -> None: ...

    parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names if name.isidentifier()]
    taker.__signature__ = signature(taker).replace(parameters=parameters)  # type: ignore[attr-defined]
    return read_dataset(data, taker)


def _own(target: str, data: Path | None, options: dict[str, Any]) -> Model:
    path, colon, name = target.rpartition(":")
    if not colon:
        raise ValueError(f"Expected path/to/file.py:name; got '{target}': say which name in the file is meant.")
    found = _attribute(_import(Path(path)), name, path)
    if isinstance(found, Model):
        if data is not None or options:
            raise ValueError(f"Expected neither --data nor --option for '{name}', which is a Model with data already.")
        return found
    if not callable(found):
        raise ValueError(  # noqa: TRY004 - misuse of the command line, told like any other
            f"Expected '{name}' in '{path}' to be a Model or callable; it is a {type(found).__name__}."
        )
    if data is not None:
        return Model(found, read_dataset(data, found, options))
    _check_options(found, options, f"'{name}'")
    returned = _returned(found, options)
    return returned if isinstance(returned, Model) else Model(found, Dataset("no data file", {}, static=options))


def _returned(found: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """What a function returns, run where a NumPyro callable may run as well; None if it needs arguments."""
    needed = [p for p in signature(found).parameters.values() if p.default is Parameter.empty]
    missing = [p.name for p in needed if p.name not in options and p.kind is not Parameter.VAR_KEYWORD]
    if missing:
        raise ValueError(
            f"Expected data for {', '.join(map(repr, missing))} of '{getattr(found, '__name__', 'the model')}'; got none: add "
            " --data file.csv (or .npz), or --option name=value for static arguments."
        )
    with handlers.block(), handlers.seed(rng_seed=0):
        return found(**options)


def _check_options(fn: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    parameters = signature(fn).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        known = [name for name in parameters if name not in ("data", "dataset")]
        raise ValueError(
            f"Expected options of {what}, {', '.join(known) or 'which has none'}; got {', '.join(unknown)}."
        )


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"Expected a Python file at '{path}'; found none: check the path.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected a Python file; '{path}' cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    # As when a script is run: the file may import its neighbours, and is found by name while it runs.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to hear of, in a sentence
        raise ValueError(f"Expected '{path}' to import; it stops with {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"Expected '{name}' in '{path}'; it has {', '.join(own) or 'nothing callable'}.")
    return getattr(module, name)
