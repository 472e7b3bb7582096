"""The model as text and as a graph, read from its program without running inference."""

from __future__ import annotations

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
from numpyro.infer.inspect import get_model_relations

from toolkit.modelling.sites import DETERMINISTIC, FACTOR
from toolkit.reporting.contents import Block, Picture, Section, Text
from toolkit.reporting.figures.graph import Node, model_graph
from toolkit.reporting.tables import sites_table

# A drawing with more nodes than this says less than the table of sites.
_MOST_NODES = 40


def what_is_the_model(model: Any) -> Section:
    """The model in tilde notation where its documentation has it, its sites, its graph and its source."""
    blocks: list[Block] = []
    notation = tilde_notation(model.fn)
    if notation:
        blocks.append(Text("In the words of its author", notation))
    if model.summed_out:
        blocks.append(f"Discrete sites summed out by enumeration: {', '.join(model.summed_out)}.")
    blocks.append(sites_table(model))
    blocks += [_graph(model), *_without_prior(model), _source(model.fn)]
    return Section("model", "What is the model?", tuple(blocks))


def tilde_notation(fn: Callable[..., Any]) -> str:
    """The indented lines with `~` of the callable's or its module's documentation; empty if there are none."""
    program = _unwrapped(fn)
    module = sys.modules.get(getattr(program, "__module__", ""), None)
    for text in (inspect.getdoc(program), inspect.getdoc(module) if module else None):
        blocks = [block for block in (text or "").split("\n\n") if _is_notation(block)]
        if blocks:
            return "\n\n".join(textwrap.dedent(block).strip("\n") for block in blocks)
    return ""


def _is_notation(block: str) -> bool:
    lines = block.strip("\n").split("\n")
    return any(" ~ " in line for line in lines) and all(line.startswith("  ") for line in lines)


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.unwrap(fn)


def _graph(model: Any) -> Picture | str:
    """The graph, or the sentence that says why there is none."""
    if len(model.sites) > _MOST_NODES:
        return f"No graph: {len(model.sites)} sites are too many to draw; the table has them all."
    try:
        relations = get_model_relations(model.bound("plain"), model_kwargs=model.arrays)
    except (TypeError, ValueError, KeyError, NotImplementedError, AssertionError, jax.errors.JAXTypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"No graph: NumPyro cannot trace what depends on what in this model ({reason})."
    names = [name for name in model.sites if name in relations["sample_sample"]]
    sizes = {plate: size for site in model.sites.values() for plate, size, _ in site.plates}
    direct = _direct({name: [p for p in relations["sample_sample"][name] if p in names] for name in names})
    plates = relations["plate_sample"].items()
    return model_graph(
        [
            Node(
                name,
                model.sites[name].kind,
                model.sites[name].distribution,
                () if model.sites[name].kind in (DETERMINISTIC, FACTOR) else _over(name, plates, sizes),
                tuple(direct[name]),
            )
            for name in names
        ]
    )


def _over(name: str, plates: Any, sizes: dict[str, int]) -> tuple[str, ...]:
    return tuple(f"{plate} × {sizes[plate]:,}" for plate, members in plates if name in members and plate in sizes)


def _direct(parents: dict[str, list[str]]) -> dict[str, list[str]]:
    """NumPyro's relations, in program order: a parent never stands after its child."""
    order = {name: i for i, name in enumerate(parents)}
    return {name: [p for p in own if order[p] < order[name]] for name, own in parents.items()}


def _without_prior(model: Any) -> list[str]:
    """What cannot be drawn from this model, and why."""
    if model.flat_priors:
        names = ", ".join(model.flat_priors)
        return [
            f"Prior and prior predictive draws are left out: the prior of {names} is flat, and "
            "nothing can be drawn from it."
        ]
    if not model.observed:
        return [
            "Predictive draws are left out: the likelihood is a factor, so that the model has no observed site to draw."
        ]
    return []


def _source(fn: Callable[..., Any]) -> Text | str:
    try:
        return Text("Source of the callable", textwrap.dedent(inspect.getsource(_unwrapped(fn))).rstrip(), folded=True)
    except (OSError, TypeError):
        return "The callable's source is not at hand: it was not read from a file."
