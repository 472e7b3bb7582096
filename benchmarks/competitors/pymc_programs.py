"""Posteriors written for PyMC, on posteriordb's data; sites are named and shaped as in the NumPyro programs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Data = dict[str, np.ndarray]


def read_data(posterior: str) -> Data:
    """A posterior's data as posteriordb has them.

    Raises:
        ValueError: The data are not there.
    """
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("ELBOWROOM_SHARED_DATA", default)) / "posteriordb"
    path = folder / posterior / "data.json"
    if not path.is_file():
        raise ValueError(f"Expected posteriordb's data at {path}; it is not there: set ELBOWROOM_SHARED_DATA.")
    return {name: np.asarray(value, float) for name, value in json.loads(path.read_text()).items()}


def _wells(data: Data) -> None:
    import pymc as pm

    beta = pm.Flat("beta", shape=2)
    pm.Bernoulli("switched", logit_p=beta[0] + beta[1] * data["dist"], observed=data["switched"].astype(int))


def _line(design: np.ndarray, outcome: np.ndarray, sigma: Callable[[], Any]) -> None:
    """A linear regression with flat coefficients and the given noise."""
    import pymc as pm

    beta = pm.Flat("beta", shape=design.shape[1])
    pm.Normal("outcome", pm.math.dot(design, beta), sigma(), observed=outcome)


def _half_cauchy() -> Any:
    import pymc as pm

    return pm.HalfCauchy("sigma", 2.5)


def _flat_scale() -> Any:
    import pymc as pm

    return pm.HalfFlat("sigma")


def _columns(*columns: Any) -> np.ndarray:
    return np.column_stack(np.broadcast_arrays(*columns)).astype(float)


def _kidiq_momhsiq(data: Data) -> None:
    _line(_columns(1, data["mom_hs"], data["mom_iq"]), data["kid_score"], _half_cauchy)


def _kidiq_interaction(data: Data) -> None:
    hs, iq = data["mom_hs"], data["mom_iq"]
    _line(_columns(1, hs, iq, hs * iq), data["kid_score"], _half_cauchy)


def _earnings_height_male(data: Data) -> None:
    _line(_columns(1, data["height"], data["male"]), np.log(data["earn"]), _flat_scale)


def _earnings_interaction_z(data: Data) -> None:
    height, male = data["height"], data["male"]
    z = (height - height.mean()) / height.std(ddof=1)
    _line(_columns(1, z, male, z * male), np.log(data["earn"]), _flat_scale)


def _sblrc(data: Data) -> None:
    import pymc as pm

    beta = pm.Normal("beta", 0, 10, shape=data["X"].shape[1])
    pm.Normal("y", pm.math.dot(data["X"], beta), pm.HalfNormal("sigma", 10), observed=data["y"])


def _nes(data: Data) -> None:
    age = data["age_discrete"]
    design = _columns(
        *(1, data["real_ideo"], data["race_adj"], age == 2, age == 3, age == 4),
        *(data["educ1"], data["gender"], data["income"]),
    )
    _line(design, data["partyid7"], _flat_scale)


def _poisson(data: Data) -> None:
    import pymc as pm

    year = data["year"]
    log_rate = pm.Uniform("alpha", -20, 20)
    for power in (1, 2, 3):
        log_rate += pm.Uniform(f"beta{power}", -10, 10) * year**power
    pm.Poisson("C", pm.math.exp(log_rate), observed=data["C"].astype(int))


def _eight_schools(data: Data) -> None:
    import pymc as pm

    mu, tau = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5)
    z = pm.Normal("z", 0, 1, shape=len(data["y"]))
    pm.Normal("y", mu + tau * z, data["sigma"], observed=data["y"])


PROGRAMS: dict[str, Callable[[Data], None]] = {
    "wells_data-wells_dist": _wells,
    "kidiq-kidscore_momhsiq": _kidiq_momhsiq,
    "kidiq-kidscore_interaction": _kidiq_interaction,
    "earnings-logearn_height_male": _earnings_height_male,
    "earnings-logearn_interaction_z": _earnings_interaction_z,
    "sblrc-blr": _sblrc,
    "nes1980-nes": _nes,
    "GLM_Poisson_Data-GLM_Poisson_model": _poisson,
    "eight_schools-eight_schools_noncentered": _eight_schools,
}
"""posteriordb's name to what is written inside `with pymc.Model():`."""


def build(posterior: str) -> Any:
    """The PyMC model of a posterior."""
    import pymc as pm

    with pm.Model() as program:
        PROGRAMS[posterior](read_data(posterior))
    return program
