"""Weights that leave a device for host memory and come back, and how much of that memory there is."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.host_memory import available_host_bytes
from sana_jax.pipelines.residency import TEXT, leave
from sana_jax.weights import resident
from sana_jax.weights.resident import Resident


@pytest.fixture
def beside_a_gpu(monkeypatch):
    """As if arrays were not in the host's memory, of which 100 bytes are left."""
    monkeypatch.setattr(resident, "is_host_memory", lambda params: False)
    monkeypatch.setattr(resident, "available_host_bytes", lambda: 100)


def counted(size: int) -> tuple[Resident, list[int]]:
    """Weights of ``size`` numbers, and a list that grows whenever they are read."""
    read: list[int] = []

    def params():
        read.append(1)
        return {"kernel": jnp.arange(size, dtype=jnp.bfloat16)}

    return Resident("network", 2 * size, params), read


def test_are_read_once(beside_a_gpu, capsys):
    weights, read = counted(20)
    assert not weights.keep_on_host()  # there is nothing yet
    before = np.asarray(weights.params["kernel"])
    for _ in range(2):
        leave(TEXT, "text_encoder_freed", {TEXT: weights})
        assert not weights.loaded
        np.testing.assert_array_equal(weights.params["kernel"], before)
        assert weights.params["kernel"].dtype == jnp.bfloat16
    assert len(read) == 1
    assert capsys.readouterr().out == "the text encoder leaves the device for host memory, 40 B\n"


def test_are_read_again_where_there_is_no_room(beside_a_gpu, capsys):
    weights, read = counted(40)
    for _ in range(2):
        assert weights.params
        leave(TEXT, "text_encoder_freed", {TEXT: weights})
    assert len(read) == 2
    assert capsys.readouterr().out == ""
    held = Resident.of("network", weights.params)
    assert not held.keep_on_host()


def test_are_read_again_on_a_cpu():
    weights, read = counted(20)
    assert weights.params
    leave(TEXT, "one_at_a_time", {TEXT: weights})
    assert weights.params
    assert len(read) == 2


def test_host_memory(tmp_path):
    assert available_host_bytes(str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert available_host_bytes(str(tmp_path)) == 5_000 * 1024
    container = tmp_path / "sys" / "fs" / "cgroup"
    container.mkdir(parents=True)
    for limit, found in (("max", 5_000 * 1024), ("3000000", 1_000_000), ("1000000", 0), ("99999999", 5_000 * 1024)):
        (container / "memory.max").write_text(f"{limit}\n")
        (container / "memory.current").write_text("2000000\n")
        assert available_host_bytes(str(tmp_path)) == found
