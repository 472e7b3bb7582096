"""Draws read from a file in ArviZ's form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray

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
    """The kept sites' draws from a netCDF file; deterministic sites that it lacks are computed from the latents.

    Raises:
        ValueError: There is no such file, it is not in ArviZ's form, or its draws do not fit the model.
    """
    if not path.is_file():
        raise ValueError(f"Expected a file of draws at '{path}'; found none: check the path.")
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
