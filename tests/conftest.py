"""What holds for every test: the CPU unless a GPU is asked for, shapes checked, GPU tests counted where none is."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before JAX looks for devices. `JAX_PLATFORMS=cuda pytest` runs on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One cache of compiled programs for a whole session, for the programs that tests start. Test processes read it and, see
# below, do not write it.
_OWN_CACHE = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _OWN_CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sana-jax-tests-")

from jaxtyping import install_import_hook  # noqa: E402

# Every annotated shape and dtype of these modules is checked at every call, and names of axes must agree. Functions
# that take NumPy arrays and numbers as well, such as those of sana_jax.diffusion, are annotated with what JAX makes of
# them and cannot be checked so.
CHECKED = ("kernels", *(f"sana_jax.nn.{name}" for name in ("adaln", "attention", "mix_ffn", "norms")))
install_import_hook(CHECKED, "beartype.beartype")

import jax  # noqa: E402
import pytest  # noqa: E402

# XLA has died in test processes that had compiled for half an hour, while it put one more program into the cache.
jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and jax.default_backend() not in ("gpu", "cuda", "rocm"):
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
