"""How many threads linear algebra may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

_SMALL = 200  # dimensions below which a second thread waits longer than it helps, the more so on a busy machine


@contextmanager
def threads_for(size: int) -> Iterator[None]:
    """Within it, NumPy's and SciPy's linear algebra uses one thread where vectors are short, and else what it likes.

    Args:
        size: Of the vectors and square matrices at hand.
    """
    if size >= _SMALL:
        yield
        return
    with threadpool_limits(1, user_api="blas"):
        yield
