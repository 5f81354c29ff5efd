"""The host's memory: how much of it there is, and what the C library does with what a program gives back."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import pathlib

import jax

# Parameters of glibc's mallopt, from its malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = -1  # of a threshold; any other that an int holds ends at 2 GiB, which a step of a medium network passes
_TWO_HEAPS_OF_A_THREAD = 2 * 64 * 2**20  # with that much to spare, glibc returns none of a thread's heaps
_HUGE_PAGES, _HUGE_PAGE_BYTES = 14, 2**21  # MADV_HUGEPAGE of Linux's madvise; an x86 processor's

# Of a container: what it may use, and what it uses.
_CONTAINER_LIMIT, _CONTAINER_USE = "sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current"


def available_host_bytes(root: str = "/") -> int | None:
    """Bytes of memory that a program can still take, a container's limit included; None where Linux does not say.

    ``root`` is where the system's files are.
    """
    try:
        lines = pathlib.Path(root, "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    try:
        limit, use = (int(pathlib.Path(root, name).read_text()) for name in (_CONTAINER_LIMIT, _CONTAINER_USE))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return max(0, min(free, limit - use))


def refuses_overcommit(root: str = "/") -> bool:
    """Whether Linux counts addresses that nothing was written to as used memory, as some clusters have it.

    ``root`` is where the system's files are.
    """
    try:
        return pathlib.Path(root, "proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False


def keep_freed_memory(device: str = "auto") -> bool:
    """Makes glibc keep what is freed for the next call, where programs are going to run on the CPU.

    On a CPU, XLA takes the temporary memory of a program anew in every call, and glibc returns a block of that size to
    the kernel at once: every page is then mapped and zeroed again, which was a fifth to two fifths of a training step.
    Until it ends, the process thus holds the most that it ever held. Where Linux leaves the choice to programs, pages
    of that memory are huge: there are fewer to map, and the processor finds them sooner.

    XLA's threads take thousands of small blocks in a step of a small network. Each thread has a heap of its own for
    them: in one for all, finding a free block among the many there was a quarter of the time. Heaps of threads hold no
    block of over 64 MB, so that programs run in the thread that calls them (``jax_cpu_enable_async_dispatch`` off): the
    process's first thread has the heap that grows without a limit. Called from another, a program's larger blocks are
    mapped anew in every call.

    To be called before JAX first looks for devices. Later calls do nothing of use and no harm.

    Args:
        device: what the program is told to run on; with ``"auto"`` that is the CPU where JAX has no plugin.

    Returns:
        Whether it will; not with a GPU, whose memory JAX manages itself, and not with another C library.
    """
    if device == "gpu" or (device == "auto" and importlib.metadata.entry_points(group="jax_plugins")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER)):
        return False
    if not refuses_overcommit():  # there, every thread's heap would count as memory from the start
        mallopt(_TOP_PAD, _TWO_HEAPS_OF_A_THREAD)
        _choose_huge_pages()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


@functools.cache
def _choose_huge_pages() -> None:
    """Asks for huge pages where glibc's heap is going to grow; once, since the heap that has grown is kept.

    Addresses are taken for half of the memory that there is, and none of it is touched. Where addresses are limited, or
    the system has no huge pages to ask for, pages are what they are elsewhere.
    """
    library, size = ctypes.CDLL(None), (available_host_bytes() or 0) // 2
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    block = library.malloc(ctypes.c_size_t(size))
    if block is None:
        return
    start = -(-block // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    length = max(0, block + size - start) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _HUGE_PAGES)
    library.free(block)
