"""Published sizes compiled for an H100 that need not be here: how many kernels they start, and what memory they take.

With ``pip install 'jax[cuda12]'`` or ``'jax[cuda13]'``, which bring the compiler; skipped without.
"""

from __future__ import annotations

import jax
import pytest

from kernels.softmax_attention.cudnn import on_capability
from sana_jax.errors import UserError
from sana_jax.gpu_compiler import Target
from tests.benchmarks.compiled_for_gpu import compile_steps
from tests.benchmarks.gpu_compiler import H100, compile_for
from tests.benchmarks.gpu_networks import NETWORKS
from tests.benchmarks.reckoning import reckon
from train.memory import compiled_bytes

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1800)]

# Kernels and GB of temporary memory at most, a tenth above what they were (BUILD_NOTES.md).
MOST = {
    "text_encoder": (834, 0.13),
    "sana_1600m_1024": (900, 0.15),
    "sana_1600m_1024_int8": (1120, 0.17),
    "sana_1600m_1024_fp8": (1120, 0.17),
    "sana_1600m_1024_int4": (900, 0.15),
    "sana_1600m_1024_nvfp4": (1185, 0.14),
    "sprint_1600m_1024": (1082, 0.11),
    "dc_ae_decoder_1024": (303, 0.9),
    "sana_video_480p": (1300, 4.3),
    "longsana_block": (1436, 1.1),
    "wan_decoder_frame": (382, 3.6),
    "world": (20_900, 2.3),
    "world_chunk": (5_200, 1.4),
    "refiner_block": (2_765, 0.46),
    "ltx2_decoder_chunk": (648, 2.8),
}
# From jax 0.12 on XLA cuts a layer's weights out of their stack ahead, and holds them: GB at most of these, and a fifth
# more of the others.
AHEAD = {"sana_1600m_1024": 0.21, "sprint_1600m_1024": 0.17, "refiner_block": 0.86}
# GB in all on each device.
STEPS = {("lora_24gb", 1): 5.0, ("sana_1600m_1024", 8): 29.0, ("sana_wm_2b_chunk_causal", 64): 80.0}


@pytest.fixture(scope="module")
def device():
    try:
        (found,) = Target(H100, 1).devices()
    except UserError as error:
        pytest.skip(str(error))
    return found


def test_every_network_has_a_limit():
    assert MOST.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", MOST)
def test_a_pass(name, device):
    kernels, memory = MOST[name]
    if jax.__version_info__ >= (0, 12):
        memory = AHEAD.get(name, 1.2 * memory)
    with on_capability(H100.capability):
        function, arguments = NETWORKS[name]()
    compiled = compile_for(device, function, *arguments)
    assert reckon(compiled.as_text()).launches <= kernels
    assert compiled.memory_analysis().temp_size_in_bytes <= memory * 1e9


@pytest.mark.parametrize(("preset", "count"), STEPS)
def test_a_train_step(preset, count, device):
    for _, compiled, _ in compile_steps(preset, count):
        assert compiled_bytes(compiled) <= STEPS[preset, count] * 1e9
