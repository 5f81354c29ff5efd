"""Teaches a SANA-1.5 to draw an object at a given distance: a LoRA, and two token encoders beside the caption.

    python -m train.main siglip_zoom_lora --model MODEL --data.path triples.jsonl \
        --data.conditions object=siglip:SIGLIP zoom=scalar

Each line of the manifest is one picture: ``{"image": "chair/7.png", "text": "a chair", "object": "chair/0.png",
"zoom": 0.7, "group": "chair"}``. ``object`` is a picture of the same object as seen from afar, of which SigLIP makes a
vector; ``zoom`` is a number from 0 to 1; pictures of one ``group`` never fall on both sides of the split. Then

    python -m sana_jax.generate --model runs/siglip_zoom_lora --prompt "a chair" --condition object=chair.png \
        --sweep zoom=0:1:9 --output sweep.gif
"""

from __future__ import annotations

from configs.data import ImageDataConfig
from configs.lora import LoraConfig
from configs.optimizer import OptimizerConfig
from configs.schema import CheckpointConfig, ComputeConfig, EmaConfig, FlowConfig, PreviewConfig, RunConfig
from configs.tokens import TokenEncoderConfig, condition_tokens

# Of SigLIP so400m, 384 px in patches of 14; SigLIP base has 768, large 1024.
SIGLIP_WIDTH = 1152

TOKENS = condition_tokens(
    object=TokenEncoderConfig(kind="vector", width=SIGLIP_WIDTH, normalize=True),
    zoom=TokenEncoderConfig(kind="scalar", frequencies=6),
)

# The encoders start from nothing, unlike the layers that the LoRA changes. How much their tokens count starts at 0, and
# its gradient is mostly noise until they hold something, so that at the LoRA's rate it would stay there for long.
TOKEN_RATES = (r"tokens/\w+/(linear_\d+/.*|null)=1e-3", r"tokens/\w+/attention_weight=4e-3")

CONFIG = RunConfig(
    preset="siglip_zoom_lora",
    run_dir="runs/siglip_zoom_lora",
    steps=5_000,
    transformer=None,
    data=ImageDataConfig(group_column="group", validation_share=0.05),
    lora=LoraConfig(rank=16, targets=("attention",)),
    tokens=TOKENS,
    batch_size=8,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=FlowConfig(flow_shift=None),
    optimizer=OptimizerConfig(learning_rate=2e-4, learning_rates=TOKEN_RATES, warmup_steps=100),
    ema=EmaConfig(enabled=False),
    checkpoint=CheckpointConfig(every=500),
    preview=PreviewConfig(every=500, at=(100,), guidance_scale=None),
)
