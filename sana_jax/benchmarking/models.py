"""Pipelines with random weights: the published shapes, and tiny ones of the same kinds for tests and trials."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.benchmarking.timing import random_like
from kernels.typing import PyTree
from sana_jax.autoencoders import dc_ae, ltx2, wan
from sana_jax.autoencoders.dc_ae_config import DCAEConfig
from sana_jax.autoencoders.dc_autoencoder import DCAutoencoder
from sana_jax.autoencoders.ltx2_autoencoder import LTX2VideoAutoencoder
from sana_jax.autoencoders.ltx2_config import LTX2AutoencoderConfig
from sana_jax.autoencoders.wan_autoencoder import WanAutoencoder
from sana_jax.autoencoders.wan_config import WanConfig
from sana_jax.diffusion.samplers import SCM, DPMSolver, LongSanaSampler, WorldStreamSampler
from sana_jax.diffusion.samplers.world_model import STREAMING_STEPS
from sana_jax.models.gemma import Gemma, GemmaConfig
from sana_jax.models.gemma import init_params as gemma_params
from sana_jax.models.sana import SanaConfig, SanaTransformer
from sana_jax.models.sana_video import SanaVideoConfig, SanaVideoTransformer
from sana_jax.models.sana_wm import SanaWMConfig, SanaWMTransformer
from sana_jax.pipelines.families import Transformer, abstract_params
from sana_jax.pipelines.image_to_video import SanaImageToVideoPipeline
from sana_jax.pipelines.long_video import ATTENTION_EPSILON, LongSanaVideoPipeline
from sana_jax.pipelines.model_directory import SamplingDefaults
from sana_jax.pipelines.sprint import SanaSprintPipeline
from sana_jax.pipelines.text_to_image import SanaPipeline
from sana_jax.pipelines.text_to_video import SanaVideoPipeline
from sana_jax.pipelines.world_stream import SanaWMStreamingPipeline
from sana_jax.text_encoders.gemma import GemmaTextEncoder
from sana_jax.text_encoders.instructions import IMAGE_INSTRUCTION
from sana_jax.text_encoders.tokenizer import PromptTokenizer
from sana_jax.text_encoders.words import WordEncoder
from sana_jax.weights.components import Resident

VIDEO_FLOW_SHIFT, VIDEO_GUIDANCE = 8.0, 6.0

_TINY_WIDTHS = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "sample_size": 8,
}
_TINY_GEMMA = GemmaConfig(
    vocab_size=512, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
)  # fmt: skip
_TINY_DC_AE = DCAEConfig(
    latent_channels=4,
    **{
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in (
            ("block_out_channels", (8, 16)),
            ("layers_per_block", (1, 1)),
            ("qkv_multiscales", ((), ())),
        )
    },
)
_TINY_WAN = WanConfig(base_dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
_TINY_LTX2 = LTX2AutoencoderConfig(
    latent_channels=4, block_out_channels=(8,), down_block_types=("LTX2VideoDownBlock3D",),
    decoder_block_out_channels=(8,), layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
    spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
    downsample_type=("spatiotemporal",), upsample_type=("spatiotemporal",), upsample_residual=(True,),
    upsample_factor=(2,), patch_size=2, decoder_causal=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ImageModel:
    """An image model's shapes and how it is sampled; ``guidance_embeds`` of the transformer says whether it is Sprint.

    Attributes:
        name: for people.
        transformer: its shape.
        text_encoder: its shape.
        autoencoder: its shape.
        pixels: height and width.
        steps: of sampling.
    """

    name: str
    transformer: SanaConfig
    text_encoder: GemmaConfig
    autoencoder: DCAEConfig
    pixels: int
    steps: int
    guidance_scale: float = 4.5
    flow_shift: float = 3.0

    @property
    def latent_side(self) -> int:
        """Latent pixels per side."""
        return self.pixels // self.autoencoder.spatial_factor

    @property
    def guided_batch(self) -> int:
        """Examples that the network sees per picture: two where guidance takes a second pass."""
        return 1 if self.transformer.guidance_embeds else 2


def image_model(name: str, size: str) -> ImageModel:
    """``sana``, ``sana_600m`` or ``sprint``, of ``full`` size or ``tiny``."""
    if size == "tiny":
        sprint = {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"} if name == "sprint" else {}
        shape = SanaConfig(in_channels=4, out_channels=4, **_TINY_WIDTHS, **sprint)
        return ImageModel(f"tiny {name}", shape, _TINY_GEMMA, _TINY_DC_AE, 32, 2)
    full = (GemmaConfig(), DCAEConfig.f32c32_sana())
    return {
        "sana": ImageModel("SANA 1.6B 1024 px", SanaConfig.sana_1600m(), *full, 1024, 20),
        "sana_600m": ImageModel("SANA 0.6B 512 px", SanaConfig.sana_600m(sample_size=16), *full, 512, 20),
        "sprint": ImageModel("SANA-Sprint 1.6B 1024 px", SanaConfig.sprint_1600m(), *full, 1024, 2),
    }[name]


def random_params(abstract: PyTree, dtype: Any) -> PyTree:
    """Random weights of these shapes in ``dtype``, N(0, 0.02²)."""
    return random_like(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract))


def transformer_params(transformer: Transformer) -> PyTree:
    """Random weights of a transformer in the dtype that it computes in."""
    return random_params(abstract_params(transformer), transformer.dtype)


def image_pipeline(
    model: ImageModel, dtype: Any, tokenizer: pathlib.Path, steps: int
) -> SanaPipeline | SanaSprintPipeline:
    """The whole pipeline with random weights.

    Args:
        model: its shapes.
        dtype: of weights and computation, of all three networks.
        tokenizer: a directory of ``word_tokenizer``.
        steps: of sampling.
    """
    transformer = SanaTransformer(model.transformer, dtype=dtype)
    text = random_params(jax.eval_shape(lambda: gemma_params(Gemma(model.text_encoder), jax.random.key(0))), dtype)
    sprint = model.transformer.guidance_embeds
    vae = random_params(jax.eval_shape(lambda: dc_ae.init_params(model.autoencoder, jax.random.key(0))), dtype)
    encoder = GemmaTextEncoder(
        model.text_encoder, PromptTokenizer.from_directory(tokenizer), Resident.of("text", text), dtype=dtype
    )
    return (SanaSprintPipeline if sprint else SanaPipeline)(
        transformer,
        transformer_params(transformer),
        SCM() if sprint else DPMSolver(model.flow_shift),
        encoder,
        DCAutoencoder.from_params(model.autoencoder, vae, dtype),
        SamplingDefaults(model.guidance_scale, steps, model.pixels, model.pixels),
        residency="all",
    )


def prompt(number: int) -> str:
    """One of many texts of the same length, so that none is known from the call before."""
    ordinals = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"a red panda reading book number {ordinals[number // 10 % 10]} {ordinals[number % 10]} under a tree at dusk"


def word_tokenizer(directory: pathlib.Path) -> pathlib.Path:
    """Writes a tokenizer of whole words, with which the instruction has about as many tokens as with Gemma's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    text = " ".join((*IMAGE_INSTRUCTION, *(prompt(number) for number in range(100))))
    splitter = pre_tokenizers.Whitespace()
    words = [word for word, _ in splitter.pre_tokenize_str(text)]
    names = dict.fromkeys(["<pad>", "<eos>", "<bos>", "<unk>", *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


# -- videos: prompts come as embeddings, the text encoder being that of the image models -------------------------------


def _no_text_encoder(channels: int) -> WordEncoder:
    return WordEncoder(("a",), embedding_dim=channels, max_length=2)


def video_config(size: str) -> SanaVideoConfig:
    """SANA-Video 2B at 480p, or a tiny one."""
    if size == "full":
        return SanaVideoConfig.sana_video_2b_480p()
    return SanaVideoConfig(in_channels=4, out_channels=4, rope_max_seq_len=1024, **_TINY_WIDTHS)


def video_parts(size: str) -> tuple[SanaVideoConfig, WanConfig, tuple[int, int, int]]:
    """Of SANA-Video: the transformer, the autoencoder, and height, width and frames of its videos."""
    full = size == "full"
    return video_config(size), WanConfig() if full else _TINY_WAN, (480, 832, 81) if full else (32, 32, 9)


def _wan(size: str, dtype: Any, say: Callable[[str], None]) -> WanAutoencoder:
    config = video_parts(size)[1]
    params = random_params(jax.eval_shape(lambda: wan.init_params(config, jax.random.key(0))), dtype)
    return WanAutoencoder.from_params(config, params, dtype, say=say)


def video_pipeline(
    size: str, dtype: Any, steps: int, say: Callable[[str], None] = print, image: bool = False
) -> SanaVideoPipeline | SanaImageToVideoPipeline:
    """SANA-Video 480p, 81 frames; a tiny one of 9. With ``image`` it begins with a picture."""
    config, _, shape = video_parts(size)
    transformer = SanaVideoTransformer(config, dtype=dtype)
    return (SanaImageToVideoPipeline if image else SanaVideoPipeline)(
        transformer,
        transformer_params(transformer),
        DPMSolver(VIDEO_FLOW_SHIFT),
        _no_text_encoder(transformer.config.caption_channels),
        _wan(size, dtype, say),
        SamplingDefaults(VIDEO_GUIDANCE, steps, *shape[:2], frames=shape[2], fps=16.0),
        residency="all",
    )


def long_video_pipeline(size: str, dtype: Any, say: Callable[[str], None] = print) -> LongSanaVideoPipeline:
    """LongSANA at 480p in blocks of 10 latent frames; a tiny one in blocks of 2."""
    transformer = SanaVideoTransformer(video_config(size), dtype=dtype, attention_epsilon=ATTENTION_EPSILON)
    sampler = LongSanaSampler() if size == "full" else LongSanaSampler(block_frames=2)
    sides = (480, 832) if size == "full" else (32, 32)
    return LongSanaVideoPipeline(
        transformer,
        transformer_params(transformer),
        sampler,
        _no_text_encoder(transformer.config.caption_channels),
        _wan(size, dtype, say),
        SamplingDefaults(1.0, len(sampler.schedule(None).timesteps), *sides, frames=81, fps=16.0),
        residency="all",
    )


def world_pipeline(size: str, dtype: Any, say: Callable[[str], None] = print) -> SanaWMStreamingPipeline:
    """SANA-WM as it is streamed at 704 x 1280, without the refiner; a tiny one of 8 x 12 pixels."""
    if size == "full":
        config, autoencoder, sides = SanaWMConfig(), LTX2AutoencoderConfig.published(), (704, 1280)
    else:
        autoencoder, sides = _TINY_LTX2, (8, 12)
        config = SanaWMConfig(
            in_channels=4, num_layers=2, hidden_size=16, num_attention_heads=2, softmax_every_n=2, linear_head_dim=8,
            caption_channels=16, mlp_ratio=2.0, conv_kernel_size=0, chunk_plucker_post_attn_blocks=2,
            chunk_plucker_channels=6 * autoencoder.temporal_factor,
        )  # fmt: skip
    transformer = SanaWMTransformer(config, dtype=dtype)
    vae = random_params(jax.eval_shape(lambda: ltx2.init_params(autoencoder, jax.random.key(0))), dtype)
    vae["statistics"]["std"] = jnp.abs(vae["statistics"]["std"]) + 1  # it divides the encoder's latents
    context = {} if autoencoder.decoder_causal else {"streaming_context": 1}
    return SanaWMStreamingPipeline(
        transformer,
        transformer_params(transformer),
        WorldStreamSampler(timesteps=STREAMING_STEPS),
        _no_text_encoder(config.caption_channels),
        LTX2VideoAutoencoder.from_params(autoencoder, vae, dtype, say=say, **context),
        SamplingDefaults(1.0, len(STREAMING_STEPS), *sides, fps=16.0),
        residency="all",
    )
