"""How many threads linear algebra may use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from threadpoolctl import ThreadpoolController

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
    with _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    """NumPy's and SciPy's libraries, looked up once: it takes some milliseconds, and both are loaded long before."""
    import scipy.linalg  # noqa: F401 - its library is to be found, too

    return ThreadpoolController()
