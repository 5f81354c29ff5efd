"""What a pipeline keeps from call to call belongs to the networks that it had then."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.selection import preferring
from sana_jax import SanaWMPipeline
from sana_jax.compilation import Programs
from sana_jax.diffusion.samplers import FlowEuler
from tests.pipelines import tiny_long_model, tiny_world


def world() -> SanaWMPipeline:
    tiny = tiny_world.tiny_world()
    transformer = tiny.transformer.clone(softmax_dtype=None)
    return SanaWMPipeline(transformer, tiny.params, FlowEuler(3.0), tiny.text_encoder, tiny.autoencoder, tiny.defaults)


def in_blocks(pipe) -> None:
    pipe.causal_blocks = (2, "uniform")


def rounded(pipe) -> None:
    pipe.transformer = pipe.transformer.clone(softmax_dtype=jnp.bfloat16)


@pytest.mark.parametrize("change", [in_blocks, rounded])
def test_a_world_is_sampled_as_the_pipeline_is_now(change):
    call = {**tiny_world.arguments(4), "num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    pipe, fresh = world(), world()
    before = pipe(**call).frames
    change(pipe)
    change(fresh)
    expected = fresh(**call).frames
    assert np.abs(expected - before).max() > 1e-5
    np.testing.assert_array_equal(pipe(**call).frames, expected)


def test_a_long_video_is_sampled_with_the_network_of_now():
    call = {"prompt": tiny_long_model.PROMPT, "frames": 4, "output_type": "latent"}
    pipe, fresh = tiny_long_model.tiny_pipeline(), tiny_long_model.tiny_pipeline()
    pipe(**call)
    pipe.transformer = fresh.transformer = pipe.transformer.clone(attention_epsilon=1.0)
    np.testing.assert_array_equal(pipe(**call).frames, fresh(**call).frames)


def test_a_program_is_the_one_of_its_kernels_and_precision():
    programs, x = Programs(), jnp.ones(3)
    for around in (nullcontext, lambda: preferring("xla"), lambda: jax.default_matmul_precision("highest")):
        for count in (len(programs) + 1,) * 2:
            with around():
                programs.get("sine", "sine", jnp.sin, x)
            assert len(programs) == count


def test_prompts_are_encoded_by_the_text_encoder_of_now():
    """An encoder that is gone leaves its id to a later one."""

    @dataclasses.dataclass(frozen=True)
    class Encoder:
        number: int
        embedding_dim: int = 12

        def encode(self, prompts, *, negative=False):
            shape = len(prompts), 1
            return np.full((*shape, self.embedding_dim), self.number, np.float32), np.ones(shape, np.int32)

    pipe = tiny_long_model.tiny_pipeline()
    for number in range(50):
        pipe.text_encoder = Encoder(number)
        embeds, _ = pipe._encode_texts({})(["a fox"], False)
        assert embeds[0, 0, 0] == number
