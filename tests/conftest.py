"""What holds for every test: the CPU unless a GPU is asked for, shapes checked, GPU tests counted where none is."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import tempfile

# Before JAX looks for devices. `JAX_PLATFORMS=cuda pytest` runs on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's older code generator for loops takes a third of the time to compile. Only releases that are known to have it are
# told, since XLA ends a process over a flag that it does not know. `make prove` compiles as users do.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
# Tests replace parts of networks, which a program from the disk would not notice.
os.environ.setdefault("SANA_JAX_EXECUTABLES", "0")
# One cache of compiled programs for a whole session, for the programs that tests start.
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


def _keep_programs_in_memory() -> dict:
    """Test processes read the session's cache and never write it; what they compile again they have in memory.

    XLA has died in test processes that had compiled for half an hour, while it put one more program into the cache.
    """
    from jax._src import compilation_cache  # the public module lacks the two functions that are replaced

    kept, read = {}, compilation_cache.get_executable_and_time

    def get(key, options, backend, devices, callbacks=()):
        if key not in kept or callbacks:  # JAX from 0.12 on names the host's functions that a program calls
            return read(key, options, backend, devices, *([callbacks] if callbacks else []))
        return kept[key], 0

    def put(key, name, executable, *how):
        kept[key] = executable

    compilation_cache.get_executable_and_time, compilation_cache.put_executable_and_time = get, put
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return kept


_KEPT = _keep_programs_in_memory()
# What test modules compute while they are imported is compiled as their tests are: see pytest_runtest_setup.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module", autouse=True)
def _programs_of_a_module():
    """Programs are kept for a module's tests: XLA has died in processes that held those of half an hour."""
    yield
    _KEPT.clear()
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _mesh_is_left():
    """A mesh that a test leaves behind would change what every later one in this process traces."""
    before = jax.sharding.get_abstract_mesh()
    yield
    assert jax.sharding.get_abstract_mesh() == before, "a mesh was set and not left"


def pytest_collection_finish() -> None:
    """What has been imported by now stays: the garbage collector need not look through PyTorch at every turn."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and jax.default_backend() not in ("gpu", "cuda", "rocm"):
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most tests run small programs a few times: LLVM's optimiser would take longer than these. XLA's passes stay."""
    quick = item.path.parent.name != "prove" and not item.get_closest_marker("gpu")
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quick))  # for the programs that tests start


def pytest_unconfigure(config: pytest.Config) -> None:
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)
