"""A comparison as an ArviZ DataTree, for programs and files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from toolkit.modelling.model import Model
from toolkit.modelling.scalars import Scalars


def tree(
    model: Model, sample: Mapping[str, Scalars], guides: pd.DataFrame, table: pd.DataFrame, floors: pd.DataFrame
) -> xr.DataTree:
    """The group `reference` and one for each guide, with draws by site; below each guide its group `errors`.

    A source's group holds its (thinned) draws as ArviZ expects a posterior: dims chain and draw, then the site's own
    with the dataset's coords. `errors` holds each metric and its se over the dim quantity, and `wasserstein_1_floor`,
    what wasserstein_1 would be on average if nothing differed. The guide's row of the table is in the attributes.
    `xarray.open_datatree(path)` gives back what `.to_netcdf(path)` wrote.
    """
    groups: dict[str, xr.Dataset] = {}
    for source in dict.fromkeys(["reference", *map(str, guides.index)]):
        group = "/" + source.replace("/", "_")
        groups[group] = _draws(model, sample[source]) if source in sample else xr.Dataset()
        groups[group].attrs["inference_library"] = "numpyro"
        if source in guides.index:
            groups[group].attrs |= _attributes(guides.loc[[source]].iloc[0])
            groups[group + "/errors"] = _errors(table[table["guide"] == source], floors.get(source))
    return xr.DataTree.from_dict(groups)


def _draws(model: Model, source: Scalars) -> xr.Dataset:
    variables, coords = {}, {}
    sites = np.array(source.sites)
    for site in dict.fromkeys(source.sites):
        shape = model.sites[site].shape
        # A dim may not bear a variable's name unless it is its index (xarray); plates are often named as a site.
        dims = [f"{dim}_dim" if dim in source.sites else dim for dim in model.dims(site)]
        values = source.values[:, :, sites == site]
        variables[site.replace("/", "_")] = (("chain", "draw", *dims), values.reshape(*values.shape[:2], *shape))
        for dim, name in zip(model.dims(site), dims, strict=True):
            if dim in model.dataset.coords:
                coords[name] = _labels(model.dataset.coords[dim])
    return xr.Dataset(variables, {**coords, "chain": np.arange(source.values.shape[0])})


def _labels(labels: np.ndarray) -> np.ndarray:
    """Coords as a file can hold them: numbers as they are, everything else as text."""
    return labels if labels.dtype.kind in "iuf" else labels.astype(str)


def _errors(rows: pd.DataFrame, floor: pd.Series | None) -> xr.Dataset:
    if rows.empty:
        return xr.Dataset()
    wide = rows.pivot(index="quantity", columns="metric", values=["value", "se"])
    wide = wide.reindex(pd.unique(rows["quantity"]))
    variables = {}
    for metric in dict.fromkeys(rows["metric"]):
        variables[metric] = ("quantity", wide["value", metric].to_numpy(dtype=float))
        variables[f"{metric}_se"] = ("quantity", wide["se", metric].to_numpy(dtype=float))
    if floor is not None:
        variables["wasserstein_1_floor"] = ("quantity", floor.reindex(wide.index).to_numpy(dtype=float))
    return xr.Dataset(variables, {"quantity": wide.index.to_numpy(dtype=str)})


def _attributes(row: pd.Series) -> dict[str, str | float | int]:
    """The row's values in the types that netCDF has."""
    return {str(name): value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
