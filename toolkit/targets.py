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

import jax
import pandas as pd
from numpyro import handlers

import models
from toolkit.modelling.dataset import Dataset, read_dataset, read_npz
from toolkit.modelling.model import Model
from toolkit.modelling.sites import trace_sites


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


Program = tuple[Callable[..., Any], Dataset]
"""A NumPyro callable and what it is to be conditioned on, not yet checked."""


def resolve(target: str, data: Path | None, options: Mapping[str, Any]) -> Model:
    """The model that `target` names, on the data given; see `find`.

    Raises:
        ValueError: There is no such model, file or name; the data or the options do not fit; or what was found is
            no model that can be studied.
    """
    found = find(target, data, options)
    return found if isinstance(found, Model) else Model(*found)


def find(target: str, data: Path | None, options: Mapping[str, Any]) -> Model | Program:
    """What `target` names: a model, or a callable with its dataset for `check` or `Model` to judge.

    Args:
        target: The name of a curated model, or `path/to/file.py:name`, where the name is a `Model`, a function that
            returns one, or a NumPyro callable.
        data: A `.csv` or `.npz` file; a curated model's own data, or none, if None.
        options: A curated model's options, the arguments of a function that returns a `Model`, or the static
            arguments of a NumPyro callable.

    Raises:
        ValueError: There is no such model, file or name; the data or the options do not fit.
    """
    if ".py" in target:
        return _own(target, data, dict(options))
    if target not in models.names():
        raise ValueError(
            f"Expected a model's name, one of {', '.join(models.names())}, or path/to/file.py:name; got '{target}'."
        )
    module = models.load(target)
    _check_options(module.model, options, f"model '{target}'")
    if data is None:
        return module.model(**options)
    first = next(iter(signature(module.model).parameters))
    return module.model(_frame(data) if first == "data" else _all_arrays(data), **options)


def _frame(data: Path) -> pd.DataFrame:
    if data.suffix != ".csv" or not data.is_file():
        raise ValueError(f"Expected a .csv data file that is there; got '{data}'.")
    try:
        return pd.read_csv(data)
    except (OSError, ValueError) as error:  # pandas' own errors of parsing are among the latter
        raise ValueError(f"Expected a readable .csv file; '{data}' is not: {error}") from error


def _all_arrays(data: Path) -> Dataset:
    """Every array of an NPZ, or every column of a CSV, for a curated model to check."""
    if data.suffix == ".npz" and data.is_file():
        names = list(read_npz(data))
    else:
        names = [str(name) for name in _frame(data).columns]

    def taker(**kwargs: Any) -> None: ...

    parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in names if name.isidentifier()]
    taker.__signature__ = signature(taker).replace(parameters=parameters)  # type: ignore[attr-defined]
    return read_dataset(data, taker)


def _own(target: str, data: Path | None, options: dict[str, Any]) -> Model | Program:
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
    _check_options(found, options, f"'{name}'")
    if data is None:
        _check_needs(found, options)
        dataset = Dataset("no data file", {}, static=options)
    else:
        dataset = read_dataset(data, found, options)
    return _returned_model(found, dataset) or (found, dataset)


def _returned_model(found: Callable[..., Any], dataset: Dataset) -> Model | None:
    """The model that a function returns; None for a NumPyro callable, whose faults are told by who checks it."""
    kwargs = {**dataset.static, **dataset.arrays}
    wants_values = False
    try:
        if trace_sites(found, kwargs):
            return None
    except jax.errors.JAXTypeError:  # a function that makes a Dataset cannot be traced
        wants_values = True
    except Exception:  # a broken callable, or a function that cannot make its model: told below, or by `Model`
        wants_values = False
    try:
        with handlers.block():
            returned = found(**kwargs)
    except Exception as error:
        if not wants_values:
            return None  # tracing met the same error, and `Model` puts it into words
        text = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        name = getattr(found, "__name__", "model")
        raise ValueError(f"Expected '{name}' to run on dataset '{dataset.name}'; it stops with {text}") from error
    return returned if isinstance(returned, Model) else None


def _check_needs(found: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Without a data file, every argument must have a default or come as an option."""
    needed = [p for p in signature(found).parameters.values() if p.default is Parameter.empty]
    missing = [p.name for p in needed if p.name not in options and p.kind is not Parameter.VAR_KEYWORD]
    if missing:
        raise ValueError(
            f"Expected data for {', '.join(map(repr, missing))} of '{getattr(found, '__name__', 'the model')}'; "
            "got none: add "
            "--data file.csv (or .npz), or --option name=value for static arguments."
        )


def _check_options(fn: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    parameters = signature(fn).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        known = [name for name in parameters if name not in ("data", "dataset")]
        raise ValueError(
            f"Expected options of {what}, {'one of ' if known else ''}{', '.join(known) or 'which has none'}; "
            f"got {', '.join(unknown)}."
        )


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"Expected a Python file at '{path}'; found none: check the path.")
    # A name of its own: a user's models.py must not take the place of the package of that name.
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"Expected a Python file; '{path}' cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    # As when a script is run: the file may import its neighbours, and is found by name while it runs.
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises is the user's to hear of, in a sentence
        raise ValueError(f"Expected '{path}' to import; it stops with {type(error).__name__}: {error}") from error
    return module


def _attribute(module: ModuleType, name: str, path: str) -> Any:
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(f"Expected '{name}' in '{path}'; it has {', '.join(own) or 'nothing callable'}.")
    return getattr(module, name)
