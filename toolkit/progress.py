"""How long runs say where they are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as `progress(stage, done, total, text)` between blocks of work; raising from it stops the work."""


def silent(stage: str, done: int, total: int, text: str) -> None:
    """Show nothing."""
