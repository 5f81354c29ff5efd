"""Every published configuration: the tables cover the full-size state dict, nothing missing, nothing over."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel, SanaVideoTransformer3DModel

from configs.published import PUBLISHED_TRANSFORMERS
from convert.families import network_of, parameter_count
from sana_jax.models.controlnet import SanaControlNetConfig
from sana_jax.models.sana_video import SanaVideoConfig
from sana_jax.weights.rules import misfits, places
from sana_jax.weights.safetensors_files import TensorInfo


class Shapes:
    """A source of names and shapes; buffers of whole numbers keep their dtype."""

    location = "published"

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.tensors = {
            name: TensorInfo(np.dtype(np.float32 if t.is_floating_point() else np.int64), tuple(t.shape))
            for name, t in state.items()
        }


def check(class_, fields: dict, tensors: int | None = None) -> None:
    fields = {key: value for key, value in fields.items() if not key.startswith("_")}
    with torch.device("meta"):
        state = class_(**fields).state_dict()
    network = network_of({"_class_name": class_.__name__, **fields}, "config")
    wanted = places(network.rules, network.abstract)
    problems = misfits(Shapes(state), wanted, network.ignored)
    assert not problems, str(problems)
    kept = {name for name in state if name not in wanted}
    assert all(name.endswith("num_batches_tracked") for name in kept)
    if tensors is not None:
        assert len(wanted) == tensors


TENSORS = {"Sana_600M": 548, "Sana_1600M": 396, "SANA1.5_1.6B": 476, "SANA1.5_4.8B": 1396}
TENSORS |= {"Sana_Sprint_0.6B": 664, "Sana_Sprint_1.6B": 480}


@pytest.mark.parametrize("name", PUBLISHED_TRANSFORMERS)
def test_transformers(name):
    (count,) = [count for start, count in TENSORS.items() if name.startswith(start)]
    check(SanaTransformer2DModel, PUBLISHED_TRANSFORMERS[name].config.to_dict(), count)


@pytest.mark.parametrize("config", [SanaControlNetConfig.controlnet_600m(), SanaControlNetConfig.controlnet_1600m()])
def test_controlnets(config):
    check(SanaControlNetModel, config.to_dict())


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (SanaVideoConfig.sana_video_2b_480p(), 496, 2_056_862_144),
        (SanaVideoConfig.sana_video_2b_720p(), 496, 2_057_148_928),
    ],
    ids=["480p", "720p"],
)
def test_video_transformers(config, tensors, parameters):
    check(SanaVideoTransformer3DModel, config.to_dict(), tensors)
    network = network_of(config.to_dict(), "config")
    assert parameter_count(network.abstract) == parameters
    assert network.family == "SANA-Video 2B"


@pytest.mark.parametrize("name", ["f32c32_sana", "f32c32_in", "f32c32_mix", "f64c128_in", "f128c512_mix"])
def test_autoencoders(name):
    from sana_jax.autoencoders.dc_ae_config import DCAEConfig

    check(AutoencoderDC, getattr(DCAEConfig, name)().to_dict())


def test_the_text_encoder():
    from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma2Model

    from sana_jax.models.gemma import GemmaConfig

    config = GemmaConfig()
    fields = {key: value for key, value in config.to_dict().items() if key not in ("architectures", "model_type")}
    for class_ in (Gemma2Model, Gemma2ForCausalLM):
        with torch.device("meta"):
            state = class_(Gemma2Config(**fields)).state_dict()
        network = network_of(config.to_dict(), "config", state)
        problems = misfits(Shapes(state), places(network.rules, network.abstract), network.ignored)
        assert not problems, str(problems)
        assert network.family == "Gemma-2 2B"
