"""Every network's compiled programs on disk: a second one like it reads them, one of another shape does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import compilation, executables
from sana_jax.autoencoders import dc_ae
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder
from sana_jax.executables import ExecutableStore
from sana_jax.image_encoders.siglip import SiglipImageEncoder
from sana_jax.models import gemma as gemma_model
from sana_jax.models import siglip as siglip_model
from sana_jax.models import siglip_text as siglip_text_model
from sana_jax.models.gemma import Gemma, GemmaConfig
from sana_jax.models.gemma3_config import Gemma3Config
from sana_jax.models.siglip import SiglipVision, SiglipVisionConfig
from sana_jax.models.siglip_text import SiglipTextConfig, SiglipTextModel
from sana_jax.text_encoders import gemma, gemma3
from sana_jax.text_encoders.siglip import SiglipTextEncoder
from sana_jax.weights.components import Resident
from tests.pipelines import tiny_long_model, tiny_world
from tests.pipelines.tiny_refiner import CHANNELS, OPTIONS, SIZE, draw_latents, draw_prompt, tiny_refiner

TINY_GEMMA = {
    "head_dim": 8, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_hidden_layers": 2, "vocab_size": 30, "query_pre_attn_scalar": 8, "sliding_window": 8,
}  # fmt: skip
TINY_SIGLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def store(tmp_path, monkeypatch) -> ExecutableStore:
    found = ExecutableStore(tmp_path / "executables")
    monkeypatch.setattr(executables._process, "store", found)
    monkeypatch.setattr(compilation, "SHORTEST_COMPILING", 0.0)
    return found


def draw(shapes: Any, seed: int = 0) -> Any:
    """Parameters of these shapes, all random."""
    params = tiny_long_model.random_like(shapes, seed)
    return jax.tree.map(jnp.asarray, params)


def drawn(module: Any, network: Any) -> Any:
    return draw(jax.eval_shape(lambda: module.init_params(network, jax.random.key(0))))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


# -- networks: (whether it is another one with parameters of the same shapes) -> what it computes ---------------------


def dc_ae_round_trip(changed: bool) -> Any:
    stages = {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
    stages |= {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
    stages |= {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    config = DCAEConfig(latent_channels=4, scaling_factor=0.9 if changed else 0.5, **stages)
    params = draw(jax.eval_shape(lambda: dc_ae.init_params(config, jax.random.key(0))))
    autoencoder = DCAutoencoder.from_params(config, params)
    return autoencoder.encode(random(1, 8, 12, 3)), autoencoder.decode(random(1, 4, 6, 4))


def ltx2_in_blocks(changed: bool) -> Any:
    """A picture encoded, and a video decoded in two blocks with a state."""
    autoencoder = tiny_world.tiny_autoencoder()
    autoencoder._say = print
    if changed:
        autoencoder.dtype = jnp.dtype("bfloat16")
    latents = random(1, 3, *SIZE, CHANNELS)
    first, state = autoencoder.decode_frames(latents[:, :2])
    later, _ = autoencoder.decode_frames(latents[:, 2:], state)
    return autoencoder.encode(random(1, 1, 8, 12, 3)), first, later


def gemma_2(changed: bool) -> Any:
    config = GemmaConfig(**TINY_GEMMA, attn_logit_softcapping=2.0 if changed else 50.0)
    params = drawn(gemma_model, Gemma(config))
    encoder = gemma.GemmaTextEncoder(config, None, Resident.of("text encoder", params), "float32")
    return encoder._hidden_states([[2, 5, 7, 9], [2, 3]])


def gemma_3(changed: bool) -> Any:
    """The other one is padded to another number of tokens, which none of its inputs' shapes says."""
    config = Gemma3Config(**TINY_GEMMA)
    params = drawn(gemma_model, Gemma(config))
    length = 128 if changed else 100
    encoder = gemma3.Gemma3TextEncoder(config, None, Resident.of("text encoder", params), "float32", length)
    ids = np.arange(64, dtype=np.int32)[None] % 30
    return encoder._program(1, 64)(params, ids, np.ones_like(ids))


def siglip_image(changed: bool) -> Any:
    config = SiglipVisionConfig(**TINY_SIGLIP, image_size=8, patch_size=4)
    params = drawn(siglip_model, SiglipVision(config))
    encoder = SiglipImageEncoder(config, None, Resident.of("image encoder", params), "id", normalize=changed)
    return encoder._program((2, 8, 8, 3))(params, random(2, 8, 8, 3))


def siglip_text(changed: bool) -> Any:
    config = SiglipTextConfig(**TINY_SIGLIP, vocab_size=30, max_position_embeddings=6)
    config = dataclasses.replace(config, layer_norm_eps=0.5 if changed else 1e-6)
    weights = Resident.of("text tower", {"text": drawn(siglip_text_model, SiglipTextModel(config))})
    encoder = SiglipTextEncoder(config, lambda texts: np.arange(6, dtype=np.int32)[None], weights, "id")
    return encoder.encode(["a"])


def long_video(changed: bool) -> Any:
    pipeline = tiny_long_model.tiny_pipeline()
    if changed:
        config = dataclasses.replace(pipeline.transformer.config, norm_eps=0.5)
        pipeline.transformer = pipeline.transformer.clone(config=config)
    return pipeline(tiny_long_model.PROMPT, frames=10, output_type="latent").frames


def streamed_world(changed: bool) -> Any:
    """The other one makes its first chunk alone."""
    pipeline = tiny_world.tiny_world({**tiny_world.PLAIN, "revision": "current" if changed else "legacy"})
    pipeline.autoencoder._say = print
    return pipeline(**tiny_world.arguments(2 if changed else 4), output_type="latent").frames


def refiner(changed: bool) -> Any:
    """The other one has blocks of another size."""
    options = {**OPTIONS, "block_size": 2} if changed else OPTIONS
    return tiny_refiner()(draw_latents(3), prompt_embeds=draw_prompt(), **options).frames


NETWORKS: dict[str, Callable[[bool], Any]] = {
    function.__name__: function
    for function in (
        dc_ae_round_trip, ltx2_in_blocks, gemma_2, gemma_3, siglip_image, siglip_text, long_video,
        streamed_world, refiner,
    )
}  # fmt: skip


def check(compute: Callable[[bool], Any], store: ExecutableStore, capsys) -> None:
    made = compute(False)
    said = capsys.readouterr().out
    assert "is not kept" not in said
    kept, _ = store.total()
    assert kept == said.count("kept the compiled program on disk") == said.count("compiling ") > 0
    jax.clear_caches()
    again = compute(False)
    said = capsys.readouterr().out
    assert said.count("read the compiled program of") == kept
    assert "compiling" not in said
    jax.tree.map(np.testing.assert_array_equal, again, made)
    other = compute(True)
    assert "compiling " in capsys.readouterr().out
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(other)]
    if shapes == [np.shape(leaf) for leaf in jax.tree.leaves(made)]:
        assert all(
            np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(made))
        )


@pytest.mark.parametrize("name", NETWORKS)
def test_a_second_one_reads_the_programs_of_the_first(store, capsys, name):
    """Neither traced nor compiled, the same result to the bit; one that differs gets programs of its own."""
    check(NETWORKS[name], store, capsys)


@pytest.mark.parametrize("name", ["gemma_2", "gemma_3"])
def test_text_encoders_in_one_program(store, capsys, monkeypatch, name):
    for module in (gemma, gemma3):
        monkeypatch.setattr(module, "is_on_one_cpu", lambda params: False)
    check(NETWORKS[name], store, capsys)
