"""What the gradient estimators need of a guide's draw: log p - log q, the score, and the gradient along the path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import Delta, MaskedDistribution, biject_to, constraints
from numpyro.infer.util import log_density

from toolkit.modelling.model import Model
from toolkit.variational.gradient_estimators import NEED_PATH, NEED_SCORE
from toolkit.variational.guides import Guide
from toolkit.variational.objectives import Redrawn, log_weight

Params = dict[str, Any]
Single = Callable[[Any, Any], tuple[Any, Any, Any]]
"""From parameters (parameter,) and a key: f at a draw, its score and its path's gradient.

Score and path (parameter,) are None where they cannot be had; the value is None where both are.
"""

_KEY = 0  # of the draw by which a guide is looked at
_SCORE, _PATH, _DRAWS = "score", "path", "draws"


@dataclass(frozen=True, eq=False)
class GuideGradients:
    """A guide's gradients as functions of one vector of its unconstrained parameters.

    Attributes:
        program: The NumPyro guide.
        vector: The parameters, (parameter,).
        params: The same by NumPyro's name, constrained.
        names: Name and element of each entry of the vector.
        single: What is known of one draw.
        absent: Estimators that cannot be had, with the reason.
        to_vector: From constrained parameters to the vector.
        constrain: From the vector to the guide's parameters, and those of the model that are held.
    """

    program: Callable[..., Any]
    vector: Any
    params: Params
    names: list[tuple[str, str]]
    single: Single
    absent: dict[str, str]
    to_vector: Callable[[Params], Any]
    constrain: Callable[[Any], Params]

    def at(self, params: Params) -> GuideGradients:
        """The same at other parameters."""
        return replace(self, vector=self.to_vector(params), params=params)


def guide_gradients(
    model: Model, guide: Guide, program: Callable[..., Any], given: Mapping[str, Any]
) -> GuideGradients:
    """The gradients of a guide's ELBO in its unconstrained parameters.

    Args:
        model: The model.
        guide: The guide.
        program: What its `build` has made, set up on the model's data.
        given: Parameters by NumPyro's name, constrained; those of the guide that are not given are where it begins.

    Raises:
        ValueError: A parameter is unknown or of another shape, or the guide is a point mass.
    """
    arrays, bound = jax.device_put(model.arrays), model.bound(guide.chart)
    begun, transforms = _begun(program, arrays)
    of_model = model.parameters(guide.chart or model.chart)
    params = _checked(guide, begun, given, of_model, transforms)
    own = {name: value for name, value in given.items() if name in of_model}

    def to_vector(params: Params) -> Any:
        return ravel_pytree({name: transforms[name].inv(params[name]) for name in begun})[0]

    _, unravel = ravel_pytree({name: transforms[name].inv(value) for name, value in params.items()})

    def constrain(vector: Any) -> Params:
        return own | {name: transforms[name](value) for name, value in unravel(vector).items()}

    vector = to_vector(params)
    absent = _absent(guide, program, constrain, vector, arrays)
    scored, moving = not absent.keys() >= NEED_SCORE, not absent.keys() >= NEED_PATH

    def single(vector: Any, key: Any) -> tuple[Any, Any, Any]:
        value, score, path = None, None, None
        if moving:
            value, path = jax.value_and_grad(lambda v: log_weight(key, constrain(v), bound, program, arrays))(vector)
        if scored:
            again, score = _scored(bound, program, constrain, vector, key, arrays)
            value = again if value is None else value  # the path's, where no transform was inverted
        return value, score, path

    return GuideGradients(program, vector, params, element_names(unravel(vector)), single, absent, to_vector, constrain)


def _begun(program: Callable[..., Any], arrays: Any) -> tuple[Params, Params]:
    """The guide's parameters where it begins, constrained, and the transform to each from unconstrained space."""
    transforms: Params = {}

    def run(arrays: Any) -> Params:
        with handlers.block():
            sites = handlers.trace(handlers.seed(program, _KEY)).get_trace(**arrays).values()
        found = [site for site in sites if site["type"] == "param"]
        transforms.update(
            {site["name"]: biject_to(site["kwargs"].get("constraint", constraints.real)) for site in found}
        )
        return {site["name"]: site["value"] for site in found}

    return dict(jax.jit(run)(arrays)), transforms


def element_names(tree: Params) -> list[tuple[str, str]]:
    """Name and element, such as `("auto_loc", "[2]")`, of each number of a tree of parameters, as it is ravelled."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = f"{path[0].key}{jax.tree_util.keystr(path[1:])}"
        found += [(name, str(list(index)) if index else "") for index in np.ndindex(np.shape(leaf))]
    return found


def _checked(
    guide: Guide, initial: Params, given: Mapping[str, Any], of_model: tuple[str, ...], transforms: Params
) -> Params:
    given = {name: np.asarray(value) if isinstance(value, list | tuple) else value for name, value in given.items()}
    unknown = sorted(set(given) - set(initial) - set(of_model))
    if unknown:
        raise ValueError(
            f"Expected parameters of '{guide.name}', which are {', '.join(initial) or 'none'}; got {unknown[0]!r}."
        )
    for name in set(given) & set(initial):
        shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (initial[name], given[name])]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Expected '{name}' of shape {shapes[0][0]}; got {shapes[1][0]}.")
    chosen = {name: given.get(name, value) for name, value in initial.items()}
    params: Params = jax.tree.map(lambda value: jnp.asarray(value, float), chosen)
    for name in set(given) & set(initial):
        if not all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(transforms[name].inv(params[name]))):
            raise ValueError(f"Expected '{name}' inside its support, as the guide constrains it; got {given[name]}.")
    return params


def _scored(bound: Any, program: Any, constrain: Any, vector: Any, key: Any, arrays: Any) -> tuple[Any, Any]:
    """Log p - log q at a draw, and the score there; the draw is the one that `log_weight` makes with the same key."""
    guide_key, model_key = jax.random.split(key)
    held = jax.lax.stop_gradient(_held(_trace(program, guide_key, constrain(vector), arrays)))

    def log_q(vector: Any) -> Any:
        return _log_q(program, guide_key, constrain(vector), held, arrays)[0]

    of_q, drawn = _log_q(program, guide_key, constrain(vector), held, arrays)
    replayed = handlers.seed(handlers.replay(bound, drawn), model_key)
    of_p, _ = log_density(replayed, (), dict(arrays), constrain(vector))
    return of_p - of_q, jax.grad(log_q)(vector)


def _log_q(program: Any, key: Any, params: Params, held: tuple[Params, Params], arrays: Any) -> tuple[Any, Any]:
    """Log q of what was drawn before, and the trace."""
    again = Redrawn(handlers.seed(program, key), *held)
    return log_density(again, (), dict(arrays), params)


def _trace(program: Any, key: Any, params: Params, arrays: Any, held: Params | None = None) -> dict[str, Any]:
    seeded = handlers.seed(handlers.substitute(program, data={**params, **(held or {})}), key)
    with handlers.block():
        return dict(handlers.trace(seeded).get_trace(**arrays))


def _drawn(trace: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The sites that are drawn; a point mass follows from others or from parameters."""
    for site in trace.values():
        if site["type"] == "sample" and not site["is_observed"] and not _is_point(site["fn"]):
            yield site


def _is_point(law: Any) -> bool:
    """Whether a distribution is a point mass, expanded or not."""
    while not isinstance(law, Delta) and hasattr(law, "base_dist"):
        law = law.base_dist
    return isinstance(law, Delta)


def _values(trace: Mapping[str, Any]) -> Params:
    return {site["name"]: site["value"] for site in _drawn(trace)}


def _held(trace: Mapping[str, Any]) -> tuple[Params, Params]:
    """What was drawn, and what lies before its transforms."""
    return _values(trace), {site["name"]: site["intermediates"] for site in _drawn(trace)}


def moves(looked_at: Callable[[Any], Callable[[Any], Any]], vector: Any) -> bool:
    """Whether any number of a tree moves with the parameters.

    Args:
        looked_at: Gives the tree as a function of the parameters (parameter,), from where these are.
        vector: Where they are.
    """
    direction = jnp.asarray(np.random.default_rng(_KEY).standard_normal(vector.shape))

    def moved(vector: Any, direction: Any) -> Any:
        def numbers(v: Any) -> list[Any]:
            leaves = jax.tree.leaves(tree(v))
            return [jnp.asarray(leaf, float) for leaf in leaves if isinstance(leaf, jax.Array | float | int)]

        tree = looked_at(vector)
        return [(one != 0).any() for one in jax.jvp(numbers, (vector,), (direction,))[1]]

    return any(bool(one) for one in jax.jit(moved)(vector, direction))


def _absent(guide: Guide, program: Any, constrain: Any, vector: Any, arrays: Any) -> dict[str, str]:
    """Estimators that would be wrong for this guide, with the reason."""
    key, problems = jax.random.PRNGKey(_KEY), dict[str, str]()

    def looked_at(vector: Any) -> Any:
        """What is beside the draws as a function of the parameters, while the draws are held."""
        trace = _trace(program, key, constrain(vector), arrays)
        problems.update(_problems(trace))
        held = jax.lax.stop_gradient(_values(trace))
        return lambda v: _beside(_trace(program, key, constrain(v), arrays, held))

    moved = moves(looked_at, vector)
    if _DRAWS in problems:
        raise ValueError(
            f"Expected a guide that draws; '{guide.name}' is a point mass while it is fitted, and its gradient has no "
            "noise."
        )
    if moved:
        problems.setdefault(_SCORE, "a support or a point mass of the guide moves with the parameters")
    if _SCORE not in problems and not _has_density(program, constrain, vector, arrays, key):
        problems[_SCORE] = "the guide's density at a point that is given is not known: its transform has no inverse"
    absent = dict.fromkeys(NEED_SCORE, problems[_SCORE]) if _SCORE in problems else {}
    return (dict.fromkeys(NEED_PATH, problems[_PATH]) if _PATH in problems else {}) | absent


def _problems(trace: Mapping[str, Any]) -> dict[str, str]:
    """What the sites of a guide say against its score, its path, or its having any draws."""
    problems = dict[str, str]() if any(True for _ in _drawn(trace)) else {_DRAWS: "it has none"}
    for site in _drawn(trace):
        if not site["fn"].has_rsample:
            problems.setdefault(_PATH, f"draws of site '{site['name']}' do not move with the parameters")
    for site in trace.values():
        if site["type"] == "sample" and (isinstance(site["fn"], MaskedDistribution) or site["scale"] is not None):
            problems.setdefault(_SCORE, f"the density of site '{site['name']}' is masked or scaled")
        elif site["type"] == "sample" and site["is_observed"]:
            problems.setdefault(_SCORE, f"the guide has a factor of its own, '{site['name']}'")
    return problems


def _beside(trace: Mapping[str, Any]) -> Any:
    """What must not move with the parameters while the draws are held: point masses, their densities, supports."""
    drawn = {site["name"] for site in _drawn(trace)}
    samples = [site for site in trace.values() if site["type"] == "sample" and not site["is_observed"]]
    points = [(site["value"], site["fn"].log_prob(site["value"])) for site in samples if site["name"] not in drawn]
    return points, [site["fn"].support for site in samples if site["name"] in drawn]


def _has_density(program: Any, constrain: Any, vector: Any, arrays: Any, key: Any) -> bool:
    """Whether log q can be had at draws that are given, and not only at those that the guide makes itself."""

    def at_draws(vector: Any) -> Any:
        held = _held(_trace(program, key, constrain(vector), arrays))
        return _log_q(program, key, constrain(vector), held, arrays)[0]

    try:
        jax.eval_shape(at_draws, vector)
    except NotImplementedError:
        return False
    return True
