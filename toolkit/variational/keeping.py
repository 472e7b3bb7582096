"""Fits kept on disk, so that an interrupted study goes on from what it finished."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from numpyro import handlers

from toolkit.cost import Cost
from toolkit.estimate import Estimate
from toolkit.modelling.model import Model
from toolkit.status import Status
from toolkit.storage import Storage
from toolkit.variational.building import build_guide
from toolkit.variational.certificates import Certificate, Scope
from toolkit.variational.fits import Fit
from toolkit.variational.guides import Guide
from toolkit.variational.solvers.svi import Trace

_KIND = "fit"
_VERSION = 16
"""Part of every kept fit's name: raised when the same settings would no longer give the same fit."""


def fit_key(fingerprint: str, guide: Guide, key: jax.Array, settings: dict[str, Any]) -> str | None:
    """The name under which a fit is kept; None for a user's own guide, whose code has no fingerprint."""
    if not guide.is_named:
        return None
    versions = [importlib.metadata.version(package) for package in ("numpy", "optax", "scipy")]
    chosen = (guide.name, guide.rank, guide.chart, jax.random.key_data(key).tolist(), sorted(settings.items()))
    parts = (_VERSION, versions, fingerprint, *chosen)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def keep_fit(storage: Storage, name: str, fit: Fit) -> None:
    """Store a fit's parameters, course and figures."""
    arrays = {f"start/{name}": np.asarray(value) for name, value in fit.start.items()}
    arrays |= {
        f"param/{number}/{name}": np.asarray(leaf)
        for name, value in fit.params.items()
        for number, leaf in enumerate(jax.tree.leaves(value))
    }
    if fit.fresh_log_weights is not None:
        arrays["fresh_log_weights"] = fit.fresh_log_weights
    for number, trace in enumerate(fit.traces):
        arrays |= {f"trace{number}/{column}": getattr(trace, column) for column in ("steps", "elbo", "se")}
    meta = {
        "status": fit.status.name,
        "message": fit.message,
        "elbo": fit.elbo,
        "certificate": _certificate_as_dict(fit.certificate),
        "log_evidence": fit.log_evidence,
        "optima": fit.optima,
        "reached": fit.reached,
        "solver": fit.solver,
        "why": fit.why,
        "invalid_steps": fit.invalid_steps,
        "cost": asdict(fit.cost),
        "traces": len(fit.traces),
        "rank": fit.guide.rank,
    }
    storage.save(_KIND, name, arrays, meta)


def kept_fit(storage: Storage, name: str, model: Model, guide: Guide) -> Fit | None:
    """The fit that was stored under that name; None if there is none, or it was damaged."""
    entry = storage.load(_KIND, name)
    if entry is None:
        return None
    arrays, meta = entry
    leaves: dict[str, list[np.ndarray]] = {}
    for key, value in arrays.items():
        if key.startswith("param/"):
            leaves.setdefault(key.split("/", 2)[2], []).append(value)
    start = {key.removeprefix("start/"): value for key, value in arrays.items() if key.startswith("start/")}
    guide = guide.of_rank(meta["rank"]) if meta["rank"] else guide
    built = build_guide(model, guide, start or None) if leaves else None
    params = _nested(leaves, built, model) if built else {}
    return Fit(
        guide,
        model,
        Status[meta["status"]],
        meta["message"],
        elbo=Estimate(*meta["elbo"]) if meta["elbo"] else None,
        fresh_log_weights=arrays.get("fresh_log_weights"),
        certificate=_certificate(meta["certificate"]),
        log_evidence=meta["log_evidence"],
        optima=tuple(Estimate(*optimum) for optimum in meta["optima"]),
        reached=tuple(meta["reached"]),
        solver=meta["solver"],
        why=meta["why"],
        traces=tuple(
            Trace(*(arrays[f"trace{number}/{column}"] for column in ("steps", "elbo", "se")))
            for number in range(meta["traces"])
        ),
        invalid_steps=meta["invalid_steps"],
        cost=Cost(**meta["cost"]),
        autoguide=built,
        params=params,
        start=start,
    )


def _certificate_as_dict(certificate: Certificate | None) -> dict[str, Any] | None:
    if certificate is None:
        return None
    return {name: getattr(certificate, name) for name in ("gap", "limit", "draws", "sets")} | {
        "scope": certificate.scope.name
    }


def _certificate(kept: dict[str, Any] | None) -> Certificate | None:
    if kept is None:
        return None
    return Certificate(Estimate(*kept["gap"]), kept["limit"], Scope[kept["scope"]], kept["draws"], kept["sets"])


def _nested(leaves: dict[str, list[np.ndarray]], built: Callable[..., Any], model: Model) -> dict[str, Any]:
    """Parameters in the form that the guide gives them: a flow's are trees, all others are arrays."""
    with jax.enable_x64(True):
        trace = handlers.trace(handlers.seed(built, 0)).get_trace(**model.arrays)
    forms = {name: jax.tree.structure(site["value"]) for name, site in trace.items() if site["type"] == "param"}
    single = jax.tree.structure(0)
    return {name: jax.tree.unflatten(forms.get(name, single), values) for name, values in leaves.items()}
