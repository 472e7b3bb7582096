"""Draws from elsewhere, matched to a model by site name: from files of several forms, or from memory."""

from __future__ import annotations

import gzip
import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray

from toolkit.modelling.dataset import read_npz
from toolkit.modelling.model import Model
from toolkit.sampling.posterior import completed, kept_sites

_ENGINE = "h5netcdf"


@dataclass(frozen=True, eq=False)
class FileDraws:
    """What a file holds for a model.

    Attributes:
        sites: Every kept site, `(chain, draw, ...)` in float64.
        divergences: Divergent transitions; None where the file does not say.
        energy: The Hamiltonian, `(chain, draw)`; None where the file does not say.
        log_density: The sampler's log density, `(chain, draw)`; None where the file does not say.
    """

    sites: dict[str, np.ndarray]
    divergences: int | None
    energy: np.ndarray | None
    log_density: np.ndarray | None


def read_draws(path: Path, model: Model) -> FileDraws:
    """The kept sites' draws from a file or folder; deterministic sites that they lack are computed from the latents.

    Args:
        path: A netCDF file in ArviZ's form; an NPZ file; a JSON file of posteriordb (`.json`, `.json.zip` or
            `.json.gz`: a list of chains, each with lists of draws by name); or a folder with one of these.
        model: Whose sites the draws are of.

    Raises:
        ValueError: There is no such file, it is in none of these forms, or its draws do not fit the model.
    """
    found = _file_in(path) if path.is_dir() else path
    if not found.is_file():
        raise ValueError(f"Expected a file of draws at '{path}'; found none: check the path.")
    if found.suffix == ".npz":
        return fitted_to_model(_from_npz(found), found.name, model)
    if ".json" in found.suffixes[-2:]:
        return fitted_to_model(_from_json(found), found.name, model)
    return _from_netcdf(found, model)


def fitted_to_model(draws: Mapping[str, np.ndarray], source: str, model: Model) -> FileDraws:
    """Draws by name, `(chain, draw, ...)` or element by element (`theta[1]`, `theta[2]`, ..., from 1), for a model.

    Raises:
        ValueError: They lack a latent site, have another shape than the model's, or are not finite numbers.
    """
    whole = _stacked(draws, source)
    variables = {name: _with_dims(name, np.asarray(values), source) for name, values in whole.items()}
    return FileDraws(_sites(xarray.Dataset(variables), Path(source), model), None, None, None)


def _with_dims(name: str, values: np.ndarray, source: str) -> xarray.Variable:
    if values.ndim < 2:
        raise ValueError(f"Expected draws of '{name}' in '{source}' as (chain, draw, ...); got shape {values.shape}.")
    return xarray.Variable(("chain", "draw", *[f"{name}_dim_{i}" for i in range(values.ndim - 2)]), values)


def _file_in(folder: Path) -> Path:
    """The one file of draws in a folder."""
    kinds = ("*.nc", "draws*.npz", "*.json.zip", "draws*.json", "draws*.json.gz")
    found = sorted({file for kind in kinds for file in folder.glob(kind)})
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"Expected one file of draws in folder '{folder}'; found {names}: give the file itself.")
    return found[0]


def _from_npz(path: Path) -> dict[str, np.ndarray]:
    """Arrays by name; or `draws` (chain, draw, parameter) with `parameters`, their names."""
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a readable NPZ file of draws; '{path.name}' is not: {error}") from error
    if set(arrays) == {"draws", "parameters"} and arrays["draws"].ndim == 3:
        return {str(name): arrays["draws"][:, :, i] for i, name in enumerate(arrays["parameters"])}
    return arrays


def _from_json(path: Path) -> dict[str, np.ndarray]:
    """Chains as a list, each an object of lists of draws by name, as posteriordb keeps them."""
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                text = archive.read(archive.namelist()[0])
        else:
            text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        chains = json.loads(text)
        return {name: np.array([chain[name] for chain in chains], dtype=float) for name in chains[0]}
    except (OSError, ValueError, TypeError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"Expected chains of draws by name in '{path.name}', as posteriordb writes them ([{{name: [...]}}, ...]); "
            f"it cannot be read as such: {type(error).__name__} {error}"
        ) from error


def _stacked(draws: Mapping[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Draws whose names have indices from 1, as in Stan, put together site by site."""
    whole: dict[str, np.ndarray] = {}
    parts: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for name, values in draws.items():
        indexed = re.fullmatch(r"(.+)\[(\d+(?:,\d+)*)\]", name.replace(" ", ""))
        if indexed:
            place = tuple(int(i) - 1 for i in indexed[2].split(","))
            parts.setdefault(indexed[1], {})[place] = np.asarray(values)
        else:
            whole[name] = np.asarray(values)
    for site, elements in parts.items():
        shape = tuple(1 + max(place) for place in zip(*elements, strict=True))
        if len(elements) != math.prod(shape) or min(min(place) for place in elements) < 0:
            raise ValueError(
                f"Expected every element of '{site}' in '{source}', counted from 1; got {len(elements)} of "
                f"{math.prod(shape)}."
            )
        first = next(iter(elements.values()))
        whole[site] = np.empty((*first.shape, *shape))
        for place, values in elements.items():
            at: tuple[Any, ...] = (..., *place)
            whole[site][at] = values
    return whole


def _from_netcdf(path: Path, model: Model) -> FileDraws:
    try:
        with xarray.open_datatree(path, engine=_ENGINE) as tree:
            groups = {name: node.to_dataset().load() for name, node in tree.children.items()}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"Expected a netCDF file in ArviZ's form (as DataTree.to_netcdf writes it); '{path.name}' cannot be read "
            f"as one: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    posterior = groups.get("posterior")
    if posterior is None:
        raise ValueError(
            f"Expected a group 'posterior' in '{path.name}'; it has {', '.join(map(repr, groups)) or 'no groups'}."
        )
    statistics = groups.get("sample_stats", xarray.Dataset())
    return FileDraws(
        _sites(posterior, path, model),
        int(statistics["diverging"].sum()) if "diverging" in statistics else None,
        _rows(statistics, "energy"),
        _rows(statistics, "lp"),
    )


def _sites(posterior: xarray.Dataset, path: Path, model: Model) -> dict[str, np.ndarray]:
    found = {name: _values(posterior[name], path, model) for name in kept_sites(model) if name in posterior.data_vars}
    missing = [name for name in kept_sites(model) if name not in found]
    if not missing:
        return found
    latents = [name for name in model.latents if name not in found]
    if latents:
        raise ValueError(
            f"Expected draws of every latent of model '{model.name}' in '{path.name}'; it lacks "
            f"{', '.join(map(repr, latents))} and holds {', '.join(map(repr, map(str, posterior.data_vars)))}."
        )
    made, _ = completed(model, {name: found[name] for name in model.latents})
    return made | found


def _values(variable: xarray.DataArray, path: Path, model: Model) -> np.ndarray:
    name = str(variable.name)
    if not {"chain", "draw"} <= set(variable.dims):
        raise ValueError(
            f"Expected dims chain and draw on '{name}' in '{path.name}'; got {', '.join(map(str, variable.dims))}."
        )
    values = variable.transpose("chain", "draw", ...).to_numpy()
    shape = model.sites[name].shape
    if values.shape[2:] != shape:
        raise ValueError(
            f"Expected draws of '{name}' shaped (chain, draw{''.join(f', {n}' for n in shape)}) in '{path.name}'; "
            f"got {values.shape}: are they from this model on this data?"
        )
    if values.dtype.kind not in "biuf" or not np.isfinite(values).all():
        raise ValueError(f"Expected finite numbers as draws of '{name}' in '{path.name}'; some are not.")
    if values.shape[1] < 8:
        raise ValueError(f"Expected at least 8 draws a chain of '{name}' in '{path.name}'; got {values.shape[1]}.")
    return values.astype(np.float64)


def _rows(statistics: xarray.Dataset, name: str) -> np.ndarray | None:
    """A statistic as `(chain, draw)`, or None where the file has none that can be judged."""
    if name not in statistics or set(statistics[name].dims) != {"chain", "draw"}:
        return None
    values: Any = statistics[name].transpose("chain", "draw").to_numpy().astype(np.float64)
    return values if np.isfinite(values).all() else None
