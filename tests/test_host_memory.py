"""Programs reuse the memory of the call before."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import resource, statistics, sys
    import jax, jax.numpy as jnp
    from sana_jax.devices import computing
    from sana_jax.host_memory import keep_freed_memory

    if sys.argv[1] == "keep":
        assert keep_freed_memory("cpu")
    if sys.argv[1] == "start":
        with computing("cpu") as device:
            assert device == jax.devices()[0]
    # Of 64 MB, far more than what glibc keeps by itself; the result is one number.
    function = jax.jit(lambda x: jnp.fft.fft(jnp.broadcast_to(x, (64, 1 << 16)).reshape(-1, 64)).real.sum())
    faults = []
    for _ in range(40):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        function(jnp.ones(1 << 16)).block_until_ready()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    # The heap grows for some calls, as long as small blocks settle between the large ones.
    print(int(statistics.median(faults[20:])))
"""


def faults_of_a_call(how: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), how]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.fixture(scope="module")
def left_alone() -> int:
    return faults_of_a_call("leave")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("how", ["keep", "start"])
def test_a_call_finds_the_memory_of_the_one_before(left_alone, how):
    assert left_alone > 5_000  # 4 KiB each
    assert faults_of_a_call(how) < left_alone / 20


LARGE_BLOCK = """
    import ctypes, resource, sys
    from sana_jax.host_memory import keep_freed_memory

    if sys.argv[1] == "keep":
        assert keep_freed_memory("cpu")
    library, pages = ctypes.CDLL(None), 200
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size = 5 * 2**30  # of which few pages are touched

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = library.malloc(ctypes.c_size_t(size))
        assert block
        for page in range(pages):
            ctypes.memset(block + page * (size // pages), 1, 1)
        library.free(block)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    print([faults() for _ in range(3)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_of_several_gigabytes_are_kept_too():
    """A threshold of 2 GiB, the largest that glibc's call takes in numbers, gave them back."""

    def faults_again(how: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(LARGE_BLOCK), how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults_again("leave") >= 200
    assert faults_again("keep") < 20


THREADS_BLOCK = """
    import ctypes, resource, sys, threading
    from sana_jax.host_memory import keep_freed_memory

    if sys.argv[1] == "keep":
        assert keep_freed_memory("cpu")
    library, size, faults = ctypes.CDLL(None), 40 * 2**20, []
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

    def work():
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = library.malloc(ctypes.c_size_t(size))
            ctypes.memset(block, 1, size)
            library.free(block)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    print(faults[-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_blocks_of_other_threads_are_kept_too():
    """In their own heaps, which glibc would return as soon as they are empty."""

    def faults_again(how: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(THREADS_BLOCK), how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults_again("leave") > 1_000
    assert faults_again("keep") < 20


HEAPS = """
    import ctypes, pathlib, sys
    import jax, jax.numpy as jnp
    from sana_jax.host_memory import keep_freed_memory

    assert keep_freed_memory("cpu")
    # One product for each of many pairs of small matrices, each of which takes a block of memory of its own.
    left, right = jnp.ones((2, 384, 16, 16))
    jax.jit(lambda: jnp.einsum("hnd,hne->hde", left, right))().block_until_ready()
    library = ctypes.CDLL(None)
    library.fopen.restype, library.fclose.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    library.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    stream = library.fopen(sys.argv[1].encode(), b"w")
    assert stream and library.malloc_info(0, stream) == 0
    library.fclose(stream)
    print(pathlib.Path(sys.argv[1]).read_text().count("<heap "))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_threads_that_compute_have_heaps_of_their_own(tmp_path):
    """One for all holds so many free blocks that finding one of them was a quarter of a small network's step."""
    command = [sys.executable, "-c", textwrap.dedent(HEAPS), str(tmp_path / "heaps.xml")]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) > 1


HUGE_PAGES = """
    import ctypes, resource, sys
    from sana_jax.host_memory import keep_freed_memory

    def addresses():  # pages of them
        return int(open("/proc/self/statm").read().split()[0])

    before = addresses()
    if sys.argv[1] == "limited":
        limit = before * resource.getpagesize() + 2**30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if sys.argv[1] != "leave":
        assert keep_freed_memory("cpu")
    taken = addresses()
    keep_freed_memory("cpu") if sys.argv[1] == "again" else None
    assert addresses() == taken
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    library, size = ctypes.CDLL(None), 2**29
    library.malloc.restype = ctypes.c_void_p
    ctypes.memset(library.malloc(ctypes.c_size_t(size)), 1, size)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
"""
SYSTEM_CHOICE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not SYSTEM_CHOICE.exists() or "[madvise]" not in SYSTEM_CHOICE.read_text(),
    reason="Linux that lets programs choose huge pages",
)
@pytest.mark.parametrize(("how", "huge"), [("leave", False), ("keep", True), ("again", True), ("limited", False)])
def test_what_is_kept_lies_in_huge_pages(how, huge):
    """Once, however often they are asked for; and where addresses are limited, in small ones."""
    command = [sys.executable, "-c", textwrap.dedent(HUGE_PAGES), how]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    pages = 2**29 // os.sysconf("SC_PAGESIZE")
    assert (int(done.stdout) < pages / 4) == huge


@pytest.mark.parametrize(("setting", "counted"), [("0\n", False), ("1\n", False), ("2\n", True), (None, False)])
def test_where_addresses_count_as_memory(tmp_path, setting, counted):
    """There half of the memory would be taken from other programs, and from this one's children."""
    from sana_jax.host_memory import refuses_overcommit

    if setting is not None:
        (tmp_path / "proc/sys/vm").mkdir(parents=True)
        (tmp_path / "proc/sys/vm/overcommit_memory").write_text(setting)
    assert refuses_overcommit(str(tmp_path)) == counted


def test_is_left_alone_where_a_gpu_is_asked_for():
    from sana_jax.host_memory import keep_freed_memory

    assert not keep_freed_memory("gpu")
