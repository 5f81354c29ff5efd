"""The PyTorch side of the pipeline parity tests: tiny random diffusers pipelines, saved as they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    SanaSprintImg2ImgPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
)
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

torch.set_num_threads(1)

LATENT_CHANNELS = 8
TRANSFORMER = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "num_layers": 3,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "mlp_ratio": 2.5,
    "sample_size": 32,
}
QK_NORM = {"qk_norm": "rms_norm_across_heads"}
KINDS = {
    "sana-1.0": (SanaPipeline, {}),
    "sana-1.5": (SanaPipeline, QK_NORM),
    "2k": (SanaPipeline, {"sample_size": 64, "interpolation_scale": 1.0}),
    "scaled-time": (SanaPipeline, {**QK_NORM, "timestep_scale": 0.001}),
    "pag": (SanaPAGPipeline, {"num_layers": 12}),
    "sprint": (SanaSprintPipeline, {**QK_NORM, "guidance_embeds": True}),
    "sprint-img2img": (SanaSprintImg2ImgPipeline, {**QK_NORM, "guidance_embeds": True}),
    "controlnet": (SanaControlNetPipeline, {}),
}
PROMPTS = ["A red panda", "two small birds on a wire, reading"]
INSTRUCTION = ["make it vivid", "User Prompt: "]


def make_pipeline(kind: str):
    """A tiny pipeline of a kind, with every parameter random."""
    pipeline_class, changes = KINDS[kind]
    generator = torch.Generator().manual_seed(list(KINDS).index(kind))
    transformer = SanaTransformer2DModel(**{**TRANSFORMER, **changes})
    parts = {
        "tokenizer": make_tokenizer(),
        "text_encoder": make_text_encoder(),
        "vae": make_autoencoder(),
        "transformer": transformer,
        "scheduler": make_scheduler(kind),
    }
    if kind == "controlnet":
        parts["controlnet"] = SanaControlNetModel(**{**TRANSFORMER, "num_layers": 2})
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            randomise(part.eval(), generator)
    options = {"pag_applied_layers": "transformer_blocks.1.attn1"} if kind == "pag" else {}
    pipeline = pipeline_class(**parts, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_scheduler(kind: str):
    if kind.startswith("sprint"):
        return SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = "a red panda two small birds on wire , reading make it vivid user prompt : User Prompt blurry"
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *dict.fromkeys(words.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def make_text_encoder() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=24,
            intermediate_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=3,
            vocab_size=300,
            query_pre_attn_scalar=16,
            sliding_window=8,
            max_position_embeddings=512,
            attn_implementation="eager",
        )
    )


def make_autoencoder() -> AutoencoderDC:
    """A tiny autoencoder with the published factor of 32."""
    types = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    channels, layers, scales = (8, 8, 16, 16, 16, 32), (1,) * 6, ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        in_channels=3,
        latent_channels=LATENT_CHANNELS,
        attention_head_dim=8,
        encoder_block_types=types,
        decoder_block_types=types,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=layers,
        decoder_layers_per_block=layers,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Every parameter random, of a size that keeps activations near one."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("scale_shift_table"):
                parameter.copy_(0.5 * draw)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_((0.0 if isinstance(module, Gemma2Model) else 1.0) + 0.2 * draw)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * draw)
            else:
                parameter.copy_(draw / parameter[0].numel() ** 0.5)


def noise(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Unit normal latents (B, C, h, w) of pictures of ``height`` x ``width`` pixels."""
    shape = (count, LATENT_CHANNELS, height // 32, width // 32)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def save(kind: str, directory: Path):
    """Saves the pipeline of a kind and returns it."""
    pipeline = make_pipeline(kind)
    pipeline.save_pretrained(directory)
    return pipeline
