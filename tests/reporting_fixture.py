"""Studies made of synthetic numbers, with every table that the report reads; no inference behind them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas as pd
import xarray as xr

from toolkit import Dataset, Estimate, Model, Quantity, Status, Thresholds, Verdict
from toolkit.comparison.gaps import GAP_COLUMNS, Gaps
from toolkit.comparison.overall import Overall
from toolkit.comparison.predictions import SCORE_COLUMNS, Predictions
from toolkit.comparison.replicated import IN_SAMPLE, LEFT_OUT
from toolkit.cost import Cost
from toolkit.modelling.scalars import Scalars, scalars
from toolkit.sampling.evidence import LogEvidence
from toolkit.variational.certificates import Certificate, Scope

GUIDES = ("mean_field", "low_rank", "full_rank")
CLASSES = {
    "mean_field": "AutoNormal",
    "low_rank": "AutoLowRankMultivariateNormal",
    "full_rank": "AutoMultivariateNormal",
}
MEASURES = ("radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity", "concave points")
CHAINS, DRAWS, LIMIT = 4, 1_000, {"shift": 0.1, "low": 0.9, "high": 1.11}


def logistic(x: Any, y: Any = None) -> None:
    """A logistic regression.

    The model, for rows i and features j:

        intercept ~ Normal(0, 5)
        beta[j]   ~ Normal(0, 2.5)
        y[i]      ~ Bernoulli(logit = intercept + sum_j x[i, j] beta[j])

    Features are standardised.
    """
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    with numpyro.plate("feature", x.shape[1]):
        beta = numpyro.sample("beta", dist.Normal(0.0, 2.5))
    with numpyro.plate("row", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + x @ beta), obs=y)


def single(y: Any = None) -> None:
    mean = numpyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
    numpyro.factor("likelihood", -0.5 * jnp.sum((y - mean) ** 2))


def logistic_model(features: int = 30, **names: str) -> Model:
    rng = np.random.default_rng(1)
    labels = [f"{kind} {m}" for kind in ("mean", "error", "worst") for m in MEASURES] + [
        f"ratio {i}" for i in range(features)
    ]
    x = rng.standard_normal((40, features))
    data = Dataset(
        names.pop("dataset", "breast_cancer"),
        {"x": x, "y": (x[:, 0] > 0).astype(int)},
        coords={"feature": np.array(labels[:features])},
        source="synthetic numbers for tests",
        licence="none needed",
    )
    quantities = (Quantity("intercept", "intercept", "log odds"), Quantity("beta", "slope", "log odds per sd"))
    return Model(
        logistic,
        data,
        quantities=quantities,
        name="collinear_logistic",
        title=names.pop("title", "Collinear logistic regression"),
        question=names.pop("question", "Which measurements raise the odds that a mass is malignant?"),
    )


def single_model() -> Model:
    return Model(single, Dataset("five_numbers", {"y": np.arange(5.0)}), name="single", title="One mean")


def make_study(features: int = 30, *, focus: bool = True, **names: str) -> SimpleNamespace:
    """Three guides: one too narrow in everything, one that did not arrive, one right."""
    return _study(logistic_model(features, **names), focus=focus)


def single_study() -> SimpleNamespace:
    """One scalar, a flat prior, and a factor in place of an observed site."""
    return _study(single_model(), focus=False)


def reference_failed() -> SimpleNamespace:
    """NUTS disagrees with itself: no verdicts."""
    study = make_study()
    reference, comparison = study.reference, study.comparison
    reference.status = Status.RHAT
    reference.reasons = (
        "R-hat is 1.52 for beta[mean area], above 1.01.",
        "Bulk ESS is 7 for beta[mean area], below 400.",
    )
    reference.diagnostics.loc["beta[mean area]"] = [1.52, 7.0, 22.0]
    reference.log_density[0] -= 40.0
    comparison.reference_ok = False
    comparison.table["verdict"] = ""
    comparison.guides["verdict"] = ""
    comparison.guides["sentence"] = "no verdict: the reference failed its checks"
    comparison.advice = ("Run longer chains before trusting any guide.",)
    comparison.overall = Overall(None, "", "No verdict: the reference failed its checks.", {})
    low = max(fit.elbo for fit in study.fits)
    comparison.gaps = _gaps(study.fits, LogEvidence(None, problem="there is no reference that passed", low=low))
    return study


def guide_failed() -> SimpleNamespace:
    """The mean field stopped with an error; the other two stand."""
    study = make_study()
    fits, comparison = list(study.fits), study.comparison
    text = "no start was found: site beta has no valid value"
    fits[0] = SimpleNamespace(
        **{
            **vars(fits[0]),
            "status": Status.FAILED,
            "message": text,
            "elbo": None,
            "certificate": None,
            "optima": (),
            "traces": (),
            "usable": False,
        }
    )
    numbers = [c for c in comparison.guides if comparison.guides[c].dtype.kind == "f" and c != "seconds"]
    comparison.guides.loc["mean_field", numbers] = np.nan
    words = [c for c in comparison.guides if c.startswith("worst") and c.endswith("_quantity")]
    comparison.guides.loc["mean_field", words] = ""
    comparison.guides.loc["mean_field", ["status", "verdict", "sentence"]] = ["FAILED", "", f"failed: {text}"]
    comparison.table = comparison.table[comparison.table["guide"] != "mean_field"]
    comparison.quantities = comparison.quantities[comparison.quantities["source"] != "mean_field"]
    comparison.pairs = comparison.pairs[comparison.pairs["guide"] != "mean_field"]
    comparison.focus = comparison.focus[comparison.focus["source"] != "mean_field"]
    del comparison.sample["mean_field"], comparison.correlations["mean_field"]
    study.fits = tuple(fits)
    comparison.gaps = _gaps(study.fits, comparison.gaps.evidence)
    return study


def _study(model: Model, *, focus: bool) -> SimpleNamespace:
    rng = np.random.default_rng(7)
    draws = _draws(rng, model)
    reference = _reference(rng, model, draws["reference"])
    fits = tuple(_fit(rng, model, name) for name in GUIDES)
    comparison = _comparison(model, draws, reference, fits, focus)
    return SimpleNamespace(
        model=model,
        fits=fits,
        reference=reference,
        comparison=comparison,
        seed=0,
        stages={"fit mean_field": 0.7, "fit low_rank": 1.5, "fit full_rank": 1.2, "reference": 7.4, "compare": 2.1},
        command=f"elbowroom study {model.name} --seed 0",
        versions={"elbowroom": "0.1.0", "numpyro": "0.22.0", "jax": "0.12.0", "arviz": "1.3.0", "Python": "3.13.0"},
        machine="Linux, 2 cores, CPU",
    )


def _draws(rng: np.random.Generator, model: Model) -> dict[str, np.ndarray]:
    """Draws of all scalars, `(chain, draw, scalar)` for NUTS and `(1, draw, scalar)` for the guides."""
    size = sum(int(np.prod(model.sites[q.site].shape)) for q in model.quantities)
    loadings = rng.standard_normal((size, 3))
    covariance = loadings @ loadings.T + 0.4 * np.eye(size)
    factor = np.linalg.cholesky(covariance)
    mean = rng.normal(0.0, 1.2, size)
    narrow = 1 / np.sqrt(np.diag(np.linalg.inv(covariance)))
    scales = {"mean_field": np.diag(narrow), "low_rank": factor * rng.uniform(0.55, 1.15, (size, 1))}
    out = {"reference": mean + rng.standard_normal((CHAINS, DRAWS, size)) @ factor.T}
    for guide in GUIDES:
        moved = {"low_rank": rng.normal(0.0, 0.35, size) * np.sqrt(np.diag(covariance))}.get(guide, 0.0)
        out[guide] = mean + moved + rng.standard_normal((1, CHAINS * DRAWS, size)) @ scales.get(guide, factor).T
    return out


def _reference(rng: np.random.Generator, model: Model, values: np.ndarray) -> SimpleNamespace:
    sites, at = {}, 0
    for quantity in model.quantities:
        shape = model.sites[quantity.site].shape
        width = int(np.prod(shape))
        sites[quantity.site] = values[..., at : at + width].reshape(*values.shape[:2], *shape)
        at += width
    names = scalars(model, sites).names
    diagnostics = pd.DataFrame(
        {
            "rhat": 1 + np.abs(rng.normal(0, 0.0012, len(names))),
            "ess_bulk": rng.uniform(1_900, 4_100, len(names)),
            "ess_tail": rng.uniform(1_700, 3_300, len(names)),
        },
        index=list(names),
    )
    log_density = -85.0 - rng.gamma(len(names) / 2, 1.0, (CHAINS, DRAWS))
    return SimpleNamespace(
        model=model,
        draws=sites,
        status=Status.PASSED,
        reasons=(),
        diagnostics=diagnostics,
        divergences=0,
        ebfmi=np.array([0.98, 1.02, 0.95, 1.07]),
        tree_depth_hits=0,
        log_density=log_density,
        energy=-log_density + rng.gamma(len(names) / 2, 1.0, (CHAINS, DRAWS)),
        cost=Cost(3.2, 4.2, 61_000, 52_000_000),
        origin="NUTS, 4 chains x 1,000 draws after 1,000 warm-up",
        chart="plain",
        seed_text="seed 0",
        methods="R-hat and ESS after rank normalisation (Vehtari et al. 2021).",
        usable=True,
        modes=False,
    )


_ENDS = {"mean_field": -77.31, "low_rank": -66.2, "full_rank": -58.01}
_STATUS = {"mean_field": Status.ARRIVED, "low_rank": Status.BUDGET, "full_rank": Status.ARRIVED}


# A global bound, no certificate by SVI, and a local bound beside a second optimum.
_CERTIFICATES = {
    "mean_field": Certificate(Estimate(0.052, 0.0042), 0.0619, Scope.GLOBAL, 256, 4),
    "low_rank": None,
    "full_rank": Certificate(Estimate(0.061, 0.009), 0.0822, Scope.LOCAL, 1_024, 4),
}
_OPTIMA = {
    "mean_field": (Estimate(-77.31, 0.021),),
    "low_rank": (Estimate(-66.2, 0.021), Estimate(-72.8, 0.05)),
    "full_rank": (Estimate(-58.01, 0.021), Estimate(-59.42, 0.03)),
}


def _trace(rng: np.random.Generator, name: str, start: int) -> SimpleNamespace:
    """The course of a start: by SVI blocks of steps with their errors, on fixed draws a few exact evaluations."""
    if name == "low_rank":
        steps = np.arange(50, 2_001, 50)
        elbo = _ENDS[name] - 400 * np.exp(-steps / (260 + 40 * start)) - 6 * start - 0.004 * (2_000 - steps)
        return SimpleNamespace(steps=steps, elbo=elbo + rng.normal(0, 0.25, steps.size), se=np.full(steps.size, 0.25))
    steps = np.arange(1.0, 7.0 if name == "mean_field" else 42.0 + 7 * start)
    # What is fitted to the draws lies a little above the ELBO on fresh ones.
    elbo = _OPTIMA[name][start].value + 0.04 - 30 * np.exp(-steps * 6 / steps.size)
    return SimpleNamespace(steps=steps, elbo=elbo, se=np.zeros(steps.size))


def _fit(rng: np.random.Generator, model: Model, name: str) -> SimpleNamespace:
    traces = [_trace(rng, name, start) for start in range(len(_OPTIMA[name]))]
    seconds = {"mean_field": 0.2, "low_rank": 0.9, "full_rank": 0.6}[name]
    return SimpleNamespace(
        guide=SimpleNamespace(
            name=name, label=CLASSES[name], chart=None, contains=(), title=f"{name} ({CLASSES[name]})"
        ),
        model=model,
        status=_STATUS[name],
        message="last block still rose by 0.2 nats" if name == "low_rank" else "",
        elbo=Estimate(_ENDS[name], 0.021),
        certificate=_CERTIFICATES[name],
        optima=_OPTIMA[name],
        solver="svi" if name == "low_rank" else "fixed_draws",
        why="asked for" if name == "low_rank" else "on fixed draws the ELBO is a smooth function",
        traces=tuple(traces),
        invalid_steps=3 if name == "low_rank" else 0,
        cost=Cost(0.5 + 0.1 * seconds, seconds, 32_000, 8_400_000),
        usable=True,
        modes=False,
    )


def _comparison(
    model: Model, draws: dict[str, np.ndarray], reference: Any, fits: tuple[Any, ...], focus: bool
) -> SimpleNamespace:
    named = scalars(model, reference.draws)
    sample = {source: replace(named, values=values[:, ::4]) for source, values in draws.items()}
    table = pd.concat([_metrics(guide, named, draws) for guide in GUIDES], ignore_index=True)
    correlations = {s: _correlation(v, named.names[:60]) for s, v in draws.items()} if len(named.names) > 1 else {}
    comparison = SimpleNamespace(
        table=table,
        quantities=pd.concat([_quantities(s, named, v) for s, v in draws.items()], ignore_index=True),
        pairs=_pairs(correlations),
        correlations=correlations,
        focus=_focus(named, draws) if focus else _focus(named, draws).iloc[:0],
        agreement=_agreement(named, draws),
        reference_ok=True,
        sample=sample,
        thresholds=Thresholds(),
        advice=("Report full_rank's intervals; use mean_field for point predictions only.",),
        corrections=pd.DataFrame(columns=["of"]),
        predictions=_predictions(),
        to_datatree=lambda: _datatree(named, draws),
    )
    comparison.guides = _guides(table, fits, len(named.names))
    count = len(named.names)
    comparison.overall = Overall(
        Verdict.RIGHT, "full_rank", f"Yes, from full_rank: all {count} quantities are right.", {}
    )
    comparison.gaps = _gaps(fits, LogEvidence(Estimate(-57.31, 0.014), "bridge sampling between the reference and q"))
    return comparison


def _predictions() -> Predictions:
    """What 60 zeros and ones look like, of which three guides know as much as the reference or less."""
    rng = np.random.default_rng(5)
    chance = rng.uniform(size=60)
    seen = (rng.uniform(size=60) < chance).astype(float)
    lost = {"mean_field": 5.3, "low_rank": 3.8, "full_rank": 0.02}
    scores, checks, calibration, observations = [], [], [], []
    for i, source in enumerate(("reference", *GUIDES, "reference")):
        kind = LEFT_OUT if i == len(GUIDES) + 1 else IN_SAMPLE
        value = np.clip(chance + 0.02 * i * rng.normal(size=60), 0.001, 0.999)
        frame = {
            "site": "y",
            "unit": np.arange(60),
            "position": np.arange(60),
            "observed": seen,
            "source": source,
            "kind": kind,
        }
        observations.append(pd.DataFrame({**frame, "value": value}))
        score = float(np.square(value - seen).mean())
        row = {
            "site": "y",
            "measure": "Brier score",
            "source": source,
            "kind": kind,
            "units": 60 - (kind == LEFT_OUT),
            "value": score,
            "se": 0.02,
        }
        calibration.append({**row, "difference": 0.001 * i, "difference_se": 0.0004})
        if kind == LEFT_OUT:
            continue
        row = {"site": "y", "statistic": "mean", "observed": seen.mean(), "source": source, "mean": 0.5, "low": 0.4}
        checks.append(
            {
                **row,
                "high": 0.6,
                "p_value": 0.004 if i == 0 else 0.3,
                "p_value_se": 0.003,
                "sd_ratio": 1 + 0.2 * i,
                "sd_ratio_se": 0.02,
            }
        )
        score_row = dict.fromkeys(SCORE_COLUMNS, np.nan) | {"source": source, "observations": 60, "looked_at": 60}
        score_row |= {"verdict": "", "sentence": "", "problem": "", "loo_problem": "", "unreliable": 0, "matched": 0}
        if source == "reference":
            score_row |= {
                "loo": -31.2,
                "loo_se": 0.09,
                "loo_data_se": 4.1,
                "p_loo": 2.9,
                "p_loo_se": 0.1,
                "matched": 2,
                "unreliable": 1,
            }
        else:
            score_row |= {"loss": lost[source], "loss_se": 0.2, "sentence": f"{source} in words"}
            score_row |= {"loo_problem": "its draws are too far from the posterior to be weighted"}
        scores.append(score_row)
    return Predictions(
        pd.DataFrame(scores, columns=list(SCORE_COLUMNS)),
        pd.DataFrame(checks),
        pd.DataFrame(calibration),
        pd.concat(observations, ignore_index=True),
        pd.DataFrame({"site": "y", "unit": np.arange(60), "elpd": -0.5 - seen * chance, "elpd_se": 0.02, "khat": 0.1}),
        parameters=2,
    )


def _gaps(fits: tuple[Any, ...], evidence: LogEvidence) -> Gaps:
    rows = []
    for fit in fits:
        known, gap = evidence.estimate or evidence.low, fit.certificate
        row = dict.fromkeys(GAP_COLUMNS, np.nan) | {"guide": fit.guide.name, "kl_pq_problem": "", "problem": ""}
        row |= {"optimisation_scope": "", "cdf_difference_quantity": "", "labels": 0.0}
        if fit.elbo is None or known is None:
            rows.append(row | {"problem": "the fit has no optimum"})
            continue
        below = known.value - fit.elbo.value
        row |= {"elbo": fit.elbo.value, "elbo_se": fit.elbo.se, "kl_qp_low": below}
        if gap:
            row |= {
                "optimisation": gap.gap.value,
                "optimisation_limit": gap.limit,
                "optimisation_scope": gap.scope.value,
            }
            row |= {"family_low": max(below - gap.limit, 0.0)}
        if evidence.estimate:
            row |= {"kl_qp": below, "kl_qp_se": 0.025, "kl_qp_high": below, "family_high": below if gap else np.nan}
            row |= {"kl_pq": 3.6 * below, "kl_pq_se": 0.4, "kl_pq_khat": 0.2, "tv_bound": min(1.0, below)}
            row |= {"cdf_difference": 0.3, "cdf_difference_se": 0.008, "cdf_difference_quantity": "intercept"}
        row |= {"expected_log_likelihood": fit.elbo.value + 40, "kl_to_prior": 40.0, "kl_to_prior_se": 0.2}
        rows.append(row | {"energy": fit.elbo.value - 25, "energy_se": 0.2, "entropy": 25.0})
    return Gaps(evidence, pd.DataFrame(rows, columns=list(GAP_COLUMNS)))


def _datatree(named: Scalars, draws: dict[str, np.ndarray]) -> xr.DataTree:
    groups = {}
    for source, values in draws.items():
        data = {"scalar": (("chain", "draw", "name"), values)}
        groups[f"/{source}"] = xr.Dataset(data, coords={"name": list(named.names)})
    return xr.DataTree.from_dict(groups)


def _verdict(value: np.ndarray, se: np.ndarray, low: float, high: float) -> np.ndarray:
    right = (value - 2 * se > low) & (value + 2 * se < high)
    wrong = (value - 2 * se > high) | (value + 2 * se < low)
    return np.where(right, "right", np.where(wrong, "wrong", "cannot tell"))


def _metrics(guide: str, named: Scalars, draws: dict[str, np.ndarray]) -> pd.DataFrame:
    p, q = draws["reference"].reshape(-1, len(named.names)), draws[guide].reshape(-1, len(named.names))
    sd, size = p.std(0), len(named.names)
    shift, ratio = (q.mean(0) - p.mean(0)) / sd, q.std(0) / sd
    inside = {c: np.quantile(q, [0.5 - c / 2, 0.5 + c / 2], axis=0) for c in (0.5, 0.9)}
    cover = {c: ((p > low) & (p < high)).mean(0) for c, (low, high) in inside.items()}
    distance = np.abs(np.sort(p, axis=0) - np.sort(q, axis=0)).mean(0) / sd
    rows = {
        "shift": (shift, np.full(size, 0.018), -0.1, 0.1),
        "sd_ratio": (ratio, 0.013 * ratio, 0.9, 1.11),
        "coverage_50": (cover[0.5], np.full(size, 0.009), np.nan, np.nan),
        "coverage_90": (cover[0.9], np.full(size, 0.005), 0.87, 0.93),
        "wasserstein_1": (distance, np.full(size, 0.012), np.nan, np.nan),
    }
    frames = [
        pd.DataFrame(
            {
                "guide": guide,
                "quantity": named.names,
                "metric": metric,
                "value": value,
                "se": se,
                "verdict": "" if np.isnan(low) else _verdict(value, se, low, high),
            }
        )
        for metric, (value, se, low, high) in rows.items()
    ]
    return pd.concat(frames, ignore_index=True)


def _quantities(source: str, named: Scalars, values: np.ndarray) -> pd.DataFrame:
    flat = values.reshape(-1, len(named.names))
    q5, q25, q50, q75, q95 = np.quantile(flat, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    sd = flat.std(0)
    return pd.DataFrame(
        {
            "source": source,
            "quantity": named.names,
            "title": named.titles,
            "unit": named.units,
            "mean": flat.mean(0),
            "mean_se": sd / np.sqrt(len(flat)),
            "sd": sd,
            "sd_se": sd / np.sqrt(2 * len(flat)),
            "q5": q5,
            "q25": q25,
            "q50": q50,
            "q75": q75,
            "q95": q95,
        }
    )


def _correlation(values: np.ndarray, names: tuple[str, ...]) -> pd.DataFrame:
    flat = values.reshape(-1, values.shape[-1])[:, : len(names)]
    return pd.DataFrame(np.corrcoef(flat.T), index=list(names), columns=list(names))


def _pairs(correlations: dict[str, pd.DataFrame]) -> pd.DataFrame:
    columns = ["guide", "quantity_a", "quantity_b", "reference", "guide_value", "difference", "se"]
    frames = []
    for guide in GUIDES if correlations else ():
        p, q = correlations["reference"], correlations[guide]
        a, b = np.triu_indices(len(p), 1)
        frame = pd.DataFrame(
            {
                "guide": guide,
                "quantity_a": p.index[a],
                "quantity_b": p.index[b],
                "reference": p.to_numpy()[a, b],
                "guide_value": q.to_numpy()[a, b],
            }
        )
        frame["difference"] = frame["guide_value"] - frame["reference"]
        frame["se"] = 0.017
        frames.append(frame.reindex(frame["difference"].abs().sort_values(ascending=False).index).head(50))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def _focus(named: Scalars, draws: dict[str, np.ndarray]) -> pd.DataFrame:
    rows = []
    last = min(len(named.names) - 1, 20)
    for source, values in draws.items():
        flat = values.reshape(-1, len(named.names))
        guide = source != "reference"
        width = flat[:, last].std() / draws["reference"][..., last].std()
        said = "" if not guide else "as NUTS" if width > 0.9 else f"too narrow, {width:.2f} x NUTS"
        rows.append((named.names[last], False, source, flat[:, last], said))
        event = flat[:, 0] < flat[:, last]
        rows.append((f"{named.names[0]} < {named.names[last]}", True, source, event, "as NUTS" if guide else ""))
    return pd.DataFrame(
        [
            {
                "item": item,
                "event": event,
                "source": source,
                "mean": np.nan if event else v.mean(),
                "mean_se": np.nan if event else v.std() / np.sqrt(v.size),
                "low": np.nan if event else np.quantile(v, 0.05),
                "high": np.nan if event else np.quantile(v, 0.95),
                "probability": v.mean() if event else np.nan,
                "probability_se": v.std() / np.sqrt(v.size) if event else np.nan,
                "sentence": said,
            }
            for item, event, source, v, said in rows
        ]
    )


def _agreement(named: Scalars, draws: dict[str, np.ndarray]) -> pd.DataFrame:
    flat = {g: draws[g].reshape(-1, len(named.names)) for g in GUIDES}
    means, sds = np.stack([v.mean(0) for v in flat.values()]), np.stack([v.std(0) for v in flat.values()])
    return pd.DataFrame(
        {
            "quantity": named.names,
            "mean_smallest": means.min(0),
            "mean_largest": means.max(0),
            "sd_smallest": sds.min(0),
            "sd_largest": sds.max(0),
            "sentence": np.where(np.ptp(means, axis=0) < 0.3 * sds.min(0), "the guides agree", "the guides disagree"),
        }
    )


def _worst(table: pd.DataFrame, guide: str, metric: str, target: float) -> tuple[float, float, str]:
    rows = table[(table["guide"] == guide) & (table["metric"] == metric)]
    error = (np.log(rows["value"]) if metric == "sd_ratio" else rows["value"] - target).abs()
    row = rows.loc[error.idxmax()]
    return row["value"], row["se"], row["quantity"]


_SENTENCES = {
    "mean_field": ("wrong", "no: {n} of {n} too narrow, the worst {q}, sd {v:.2f} x NUTS; the means are right"),
    "low_rank": ("wrong", "no: it did not arrive; {w} of {n} wrong, the worst {q}, sd {v:.2f} x NUTS"),
    "full_rank": ("right", "yes: all {n} quantities right"),
}


def _guides(table: pd.DataFrame, fits: tuple[Any, ...], size: int) -> pd.DataFrame:
    rows = {}
    for fit in fits:
        name = fit.guide.name
        shift, ratio, cover = (
            _worst(table, name, metric, target)
            for metric, target in (("shift", 0.0), ("sd_ratio", 1.0), ("coverage_90", 0.9))
        )
        own = table[table["guide"] == name]
        wrong = own[own["verdict"] == "wrong"]["quantity"].nunique()
        verdict, sentence = _SENTENCES[name]
        rows[name] = {
            "title": fit.guide.title,
            "status": fit.status.name,
            "verdict": verdict,
            "sentence": sentence.format(n=size, w=wrong, q=ratio[2], v=ratio[0]),
            "quantities": size,
            "right": size if verdict == "right" else size - wrong,
            "wrong": 0 if verdict == "right" else wrong,
            "cannot_tell": 0,
            "elbo": fit.elbo.value,
            "elbo_se": fit.elbo.se,
            "khat": {"mean_field": 1.41, "low_rank": 0.93, "full_rank": 0.28}[name],
            "khat_se": 0.03,
            **_named("worst_shift", shift),
            "worst_shift_least": max(abs(shift[0]) - 0.055, 0.0),
            "worst_shift_most": abs(shift[0]) + 0.055,
            **_named("worst_sd_ratio", ratio),
            **_named("worst_coverage_90", cover),
            "seconds": fit.cost.seconds,
            "gradient_evaluations": fit.cost.gradient_evaluations,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("guide")


def _named(prefix: str, worst: tuple[float, float, str]) -> dict[str, Any]:
    return {prefix: worst[0], f"{prefix}_se": worst[1], f"{prefix}_quantity": worst[2]}
