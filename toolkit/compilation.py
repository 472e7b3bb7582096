"""Compiled programs that outlive the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax

from toolkit.storage import cache_folder

# At this level the programs of a fit are ready in about two thirds of the time and run as fast as at the highest,
# measured on the curated models. NUTS, which runs longest and is not ready sooner, keeps the highest.
QUICK = {"xla_backend_optimization_level": 1}


_JAX_LEAST_SECONDS, _LEAST_SECONDS = 1.0, 0.2  # of compiling, for a program to be kept: JAX's default and ours


def peak_bytes(compiled: Any) -> int:
    """What a compiled program holds at once, or 0 where the backend does not say."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    return int(memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes)


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs in the cache folder, unless it was told where (or that it should not) already.

    `JAX_ENABLE_COMPILATION_CACHE=false`, or JAX's option of that name, turns it off. Where the folder cannot be written
    nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder: Path = cache_folder() / "jax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if not os.access(folder, os.W_OK):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == _JAX_LEAST_SECONDS:  # nobody chose another
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
