"""SANA-WM 2.6B at 720p, stage 1, bidirectional, trained from scratch on clips of a minute with the camera's path.

    python -m train.main sana_wm_2b_bidirectional --encoders SANA_WM --data.path videos/ --data.clip-frames 961
    python -m train.main sana_wm_2b_bidirectional --encoders SANA_WM --data.path latents/ --data.format zip_latents

NVlabs/Sana, configs/sana_wm/stage1 (bidirectional): AdamW at 1e-5 with betas (0.9, 0.999), epsilon 1e-10 and without
weight decay, a constant rate, clipping at 0.5, logit-normal noise levels at shift 9.95 and sampling at 9.8, bfloat16
with sums of attention in float32, clips of 961 frames (121 latent frames of 22 x 40), the first latent frame given in
nine clips of ten. The number of steps, the batch and the warm-up are this preset's own; so are the moving average of
the weights and the tenth of captions that is dropped, which guidance needs.

For 64 x 80 GB in hosts of eight: the GPUs of a host share one copy of the model (``fsdp=8``). The original cuts each
clip over two GPUs: ``--mesh.context 2``.
"""

from __future__ import annotations

from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from configs.world_data import WorldDataConfig
from sana_jax.models.sana_wm import SanaWMConfig

CONFIG = RunConfig(
    preset="sana_wm_2b_bidirectional",
    run_dir="runs/sana_wm_2b_bidirectional",
    steps=100_000,
    transformer=SanaWMConfig(revision="current"),
    data=WorldDataConfig(clip_frames=961),
    batch_size=64,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=9.95, sampling_flow_shift=9.8, image_to_video=0.9),
    optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant", clip_norm=0.5, epsilon=1e-10),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=1000),
    preview=PreviewConfig(
        every=5000, guidance_scale=5.0, captions=1, per_caption=1, num_inference_steps=60, sampler="flow_euler"
    ),
)
