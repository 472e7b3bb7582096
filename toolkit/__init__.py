"""How much room is there between a variational answer and the posterior, whose is it, and does it matter?

The public names are imported when they are first used, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.comparison.comparisons import Comparison as Comparison
    from toolkit.comparison.comparisons import compare as compare
    from toolkit.comparison.diagnosis import Diagnosis as Diagnosis
    from toolkit.comparison.diagnosis import diagnose as diagnose
    from toolkit.comparison.verdicts import Thresholds as Thresholds
    from toolkit.comparison.verdicts import Verdict as Verdict
    from toolkit.cost import Cost as Cost
    from toolkit.estimate import Estimate as Estimate
    from toolkit.leaderboards import Entry as Entry
    from toolkit.leaderboards import leaderboard as leaderboard
    from toolkit.modelling.check import check as check
    from toolkit.modelling.dataset import Dataset as Dataset
    from toolkit.modelling.dataset import read_dataset as read_dataset
    from toolkit.modelling.labels import Labels as Labels
    from toolkit.modelling.model import Model as Model
    from toolkit.modelling.model import Quantity as Quantity
    from toolkit.reporting.reports import Report as Report
    from toolkit.reporting.reports import render as render
    from toolkit.sampling.references import Reference as Reference
    from toolkit.sampling.references import as_reference as as_reference
    from toolkit.sampling.references import load_reference as load_reference
    from toolkit.sampling.references import reference as reference
    from toolkit.status import Status as Status
    from toolkit.storage import Storage as Storage
    from toolkit.storage import default_storage as default_storage
    from toolkit.studies import Study as Study
    from toolkit.studies import study as study
    from toolkit.variational.certificates import Certificate as Certificate
    from toolkit.variational.certificates import Scope as Scope
    from toolkit.variational.fits import Fit as Fit
    from toolkit.variational.fitting import fit as fit
    from toolkit.variational.gradients import GradientNoise as GradientNoise
    from toolkit.variational.gradients import expectation_gradients as expectation_gradients
    from toolkit.variational.gradients import gradient_noise as gradient_noise
    from toolkit.variational.guides import GUIDES as GUIDES
    from toolkit.variational.guides import Guide as Guide
    from toolkit.variational.minibatches import Minibatch as Minibatch

_HOMES = {
    "comparison.comparisons": ("Comparison", "compare"),
    "comparison.diagnosis": ("Diagnosis", "diagnose"),
    "comparison.verdicts": ("Thresholds", "Verdict"),
    "cost": ("Cost",),
    "estimate": ("Estimate",),
    "leaderboards": ("Entry", "leaderboard"),
    "modelling.check": ("check",),
    "modelling.dataset": ("Dataset", "read_dataset"),
    "modelling.labels": ("Labels",),
    "modelling.model": ("Model", "Quantity"),
    "reporting.reports": ("Report", "render"),
    "sampling.references": ("Reference", "as_reference", "load_reference", "reference"),
    "status": ("Status",),
    "storage": ("Storage", "default_storage"),
    "studies": ("Study", "study"),
    "variational.certificates": ("Certificate", "Scope"),
    "variational.fitting": ("Fit", "fit"),
    "variational.gradients": ("GradientNoise", "expectation_gradients", "gradient_noise"),
    "variational.guides": ("GUIDES", "Guide"),
    "variational.minibatches": ("Minibatch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'toolkit' has no attribute '{name}'")
    # ArviZ wraps NumPyro only if NumPyro was imported first (arviz-base 1.3 loads its converters lazily).
    importlib.import_module("numpyro")
    return getattr(importlib.import_module(f"toolkit.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
