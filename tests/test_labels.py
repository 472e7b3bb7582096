"""Relabelling: any permutation of labels is undone, draw by draw, in every site that carries them."""

import re
import time
from collections.abc import Callable

import numpy as np
import pytest

from toolkit import Labels

LABELS = Labels(axes={"topics": -2, "theta": -1}, by="topics", count=3)


def _one_labelling(rng: np.random.Generator, chains: int = 2, draws: int = 50) -> dict[str, np.ndarray]:
    """Draws around three clearly different topics."""
    centre = np.eye(3, 6) * 5 + np.arange(6) / 10
    return {
        "topics": centre + rng.normal(size=(chains, draws, 3, 6)),
        "theta": rng.normal(size=(chains, draws, 4, 3)) + np.array([0.0, 10.0, 20.0]),
        "share": rng.normal(size=(chains, draws)),
    }


def _switched(rng: np.random.Generator, draws: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {name: values.copy() for name, values in draws.items()}
    for index in np.ndindex(draws["share"].shape):
        order = rng.permutation(3)
        out["topics"][index] = draws["topics"][index][order]
        out["theta"][index] = draws["theta"][index][:, order]
    return out


def test_orders_bring_each_draw_to_the_anchors_labelling() -> None:
    rng = np.random.default_rng(0)
    truth = _one_labelling(rng)
    switched = _switched(rng, truth)
    anchor = truth["topics"].mean((0, 1))
    flat = {name: values.reshape(-1, *values.shape[2:]) for name, values in switched.items()}
    orders = LABELS.orders(flat["topics"], anchor)
    assert orders.shape == (100, 3)
    back = np.take_along_axis(flat["topics"], orders[:, :, None], axis=1)
    np.testing.assert_array_equal(back, truth["topics"].reshape(back.shape))
    own = LABELS.orders(truth["topics"].reshape(back.shape), anchor)
    np.testing.assert_array_equal(own, np.tile(np.arange(3), (100, 1)))
    # The inverse order takes the anchor's labelling to a draw's.
    first = {name: values.reshape(-1, *values.shape[2:])[:1] for name, values in truth.items()}
    there = LABELS.permuted(first, np.argsort(orders[0]).tolist())
    for name, values in there.items():
        np.testing.assert_array_equal(values[0], flat[name][0])


def test_labels_switched_in_every_draw_come_back_to_one_order() -> None:
    rng = np.random.default_rng(0)
    truth = _one_labelling(rng)
    found = LABELS.relabel(_switched(rng, truth))
    order = np.argsort(np.argmax(found["topics"].mean((0, 1)), axis=-1))
    np.testing.assert_array_equal(found["topics"][..., order, :], truth["topics"])
    np.testing.assert_array_equal(found["theta"][..., order], truth["theta"])
    np.testing.assert_array_equal(found["share"], truth["share"])


def test_an_anchor_fixes_the_order() -> None:
    rng = np.random.default_rng(1)
    truth = _one_labelling(rng)
    found = LABELS.relabel(_switched(rng, truth), anchor=truth["topics"].mean((0, 1)))
    for name, values in truth.items():
        np.testing.assert_array_equal(found[name], values)


def test_matching_is_joint_and_not_label_by_label() -> None:
    """Both labels are nearest to the first place of the anchor; only one may have it."""
    labels = Labels(axes={"mean": -1}, by="mean", count=2)
    found = labels.relabel({"mean": np.array([[[1.0, 0.4]]])}, anchor=np.array([0.0, 9.0]))
    np.testing.assert_array_equal(found["mean"], [[[0.4, 1.0]]])


def test_draws_are_not_changed_in_place() -> None:
    rng = np.random.default_rng(2)
    draws = _switched(rng, _one_labelling(rng))
    before = {name: values.copy() for name, values in draws.items()}
    LABELS.relabel(draws)
    for name, values in before.items():
        np.testing.assert_array_equal(draws[name], values)


def test_the_copies_are_counted() -> None:
    assert LABELS.log_copies == pytest.approx(np.log(6), rel=1e-14)


def test_a_reference_s_draws_are_relabelled_within_a_second() -> None:
    rng = np.random.default_rng(3)
    labels = Labels(axes={"topics": -2}, by="topics", count=4)
    draws = {"topics": rng.dirichlet(np.ones(200), size=(4, 1_000, 4))}
    start = time.process_time()
    labels.relabel(draws)
    assert time.process_time() - start < 1.0


DRAWS = np.zeros((2, 5, 3, 6))
ERRORS = {
    "unknown by": (lambda: Labels({"a": -1}, "b", 2), "matched by one of ['a']; got 'b'"),
    "axis": (lambda: Labels({"a": 2}, "a", 2), "(-1 is the last); got others for ['a']"),
    "count": (lambda: Labels({"a": -1}, "a", 1), "at least 2 labels; got 1"),
    "missing": (lambda: LABELS.relabel({"theta": DRAWS}), "Expected draws of site 'topics'"),
    "size": (lambda: LABELS.relabel({"topics": DRAWS[:, :, :2]}), "3 labels on axis -2; got shape (2, 5, 2, 6)"),
    "rank": (lambda: LABELS.relabel({"topics": DRAWS[0, 0]}), "3 labels on axis -2; got shape (3, 6)"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_misuse_gets_its_sentence(case: str) -> None:
    call: Callable[[], object] = ERRORS[case][0]
    with pytest.raises(ValueError, match=re.escape(ERRORS[case][1])):
        call()
