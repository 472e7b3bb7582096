"""One strict JAX for all tests: float64, and no silent broadcasting over ranks."""

import os
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
_CACHE = Path(os.environ.get("ELBOWROOM_TEST_JAX_CACHE", Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

SHARED_DATA = Path(os.environ.get("ELBOWROOM_SHARED_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"reference posteriors are not at {SHARED_DATA}: set ELBOWROOM_SHARED_DATA")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the user's cache folder."""
    monkeypatch.setenv("ELBOWROOM_CACHE", str(tmp_path_factory.mktemp("cache")))
