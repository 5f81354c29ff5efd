"""A small SANA-WM learns to look around a photograph as its camera's path says, on a CPU.

    python -m train.main moving_camera
    python -m train.evaluate_moving_camera --model runs/moving_camera

The network code is that of the published world model with small widths; frames are pixels. A clip begins with a given
picture, a photograph that stands before the camera, and the camera then goes where an action string says: forward,
back, sideways, turning, looking up or down, one or two of these at once. Measured is the motion that can be recovered
from the frames, for action strings that no training clip has.
"""

from __future__ import annotations

from configs.moving_camera import MovingCameraDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    EmaConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from sana_jax.models.sana_wm import SanaWMConfig

CONFIG = RunConfig(
    preset="moving_camera",
    run_dir="runs/moving_camera",
    steps=4000,
    transformer=SanaWMConfig(
        in_channels=3,
        num_layers=4,
        hidden_size=96,
        num_attention_heads=3,
        patch_size=(1, 2, 2),
        softmax_every_n=2,
        linear_head_dim=32,
        chunk_plucker_channels=6,
        chunk_plucker_post_attn_blocks=-1,
        caption_channels=16,
        mlp_ratio=2.0,
        revision="current",
    ),
    data=MovingCameraDataConfig(),
    batch_size=8,
    compute=ComputeConfig(scan_blocks=False),
    # The first frame and the camera decide nearly all of a clip: what there is to learn lies at high noise levels.
    flow=VideoFlowConfig(flow_shift=5.0, image_to_video=1.0),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=50),
    ema=EmaConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(every=1000, per_caption=2, num_inference_steps=10, guidance_scale=1.0, sampler="flow_euler"),
)
