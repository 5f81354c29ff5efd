"""What a checkpoint looks like, by the names of its tensors: for the error when it is not what was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection

# family -> a pattern of names that it has, and no family below it in this list
_SIGNS = (
    ("a LoRA", r".*(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up).*"),
    ("a discriminator of SANA-Sprint's training", r"heads\.\d+\..*"),
    ("SANA-WM", r".*(plucker_embedder|plucker_proj|raymap_embedder|out_proj_cam).*"),
    ("LTX-2", r".*(av_cross_attn|audio_to_video_attn|video_to_audio_attn).*"),
    ("LTX-2's text connectors", r"video_connector\..*|(video_)?text_proj_in\.weight"),
    ("SANA-Video 2.0", r"attn_res\..*"),
    ("SANA-Streaming", r"blocks\.\d+\.attn\.(q|k|v)\.weight"),
    ("SANA-Video", r"patch_embedding\..*|.*\.mlp\.t_conv\.weight|.*\.ff\.conv_temp\.weight"),
    ("Wan", r"(encoder|decoder)\..*time_conv\..*|blocks\.\d+\.ffn\..*"),
    ("the LTX-2 autoencoder", r"(encoder|decoder)\.conv_(in|out)\.conv\.(weight|bias)"),
    ("FLUX", r"(model\.diffusion_model\.)?(double_blocks|single_blocks|single_transformer_blocks)\..*"),
    ("Stable Diffusion 3", r".*(joint_blocks|context_block|add_k_proj).*"),
    ("PixArt", r"adaln_single\..*"),
    ("Stable Diffusion", r"(model\.diffusion_model\.)?(down_blocks|input_blocks|mid_block|middle_block)\..*"),
    ("Gemma-3", r"(language_model\.|model\.){0,2}layers\.\d+\.self_attn\.q_norm\.weight"),
    ("Gemma", r"(language_model\.|model\.){0,2}(embed_tokens\.weight|layers\.\d+\.self_attn\..*)"),
    ("SigLIP", r"(vision_model\.)?head\.probe"),
    ("a CLIP or T5 text encoder", r"(text_model|encoder\.block|shared)\..*"),
    ("a ControlNet of SANA", r"controlnet_blocks\..*|controlnet\.\d+\..*"),
    ("an original SANA of NVlabs", r"blocks\.\d+\.(cross_attn|attn\.qkv)\..*|x_embedder\..*"),
    ("a SANA transformer", r"transformer_blocks\.\d+\.ff\.conv_(inverted|depth|point)\..*"),
    ("DC-AE", r"(encoder|decoder)\.(down|up)_blocks\..*|(encoder|decoder)\.(project_in|stages)\..*"),
)


def looks_like(names: Collection[str]) -> str | None:
    """ "looks like SANA-Video: has patch_embedding.proj.weight", or None for names that nothing here has."""
    for family, pattern in _SIGNS:
        compiled = re.compile(pattern)
        for name in names:
            if compiled.fullmatch(name):
                return f"looks like {family}: has {name}"
    return None
