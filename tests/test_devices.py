"""What a command computes on, and with which kernels."""

from types import SimpleNamespace

import jax
import pytest

from kernels.selection import preference
from sana_jax.devices import computing, using_kernels
from sana_jax.errors import UserError

CUDA = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="PJRT C API\ncuda 12090"))
ROCM = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="PJRT C API\nrocm 60200"))


def test_kernels_hold_inside_alone():
    with computing("cpu", "xla") as device:
        assert (device, preference()) == (jax.devices()[0], "xla")
    assert preference() == "auto"


def test_kernels_are_for_the_devices_that_they_are_programs_for():
    with using_kernels("pallas", CUDA):
        assert preference() == "pallas"
    for device, platform in ((jax.devices()[0], "cpu"), (ROCM, "rocm")):
        with pytest.raises(UserError, match=f"--kernels pallas has programs for cuda alone, .* {platform}; choose"):
            using_kernels("pallas", device)
        with using_kernels("xla", device):
            assert preference() == "xla"


def test_missing_jax_triton_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"--kernels triton: jax-triton is not installed; pip install 'sana-jax\[gpu\]'"
    ):
        using_kernels("triton", CUDA)
