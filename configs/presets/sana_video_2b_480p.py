"""SANA-Video 2B at 480p on latents of Wan 2.1, trained from scratch.

    python -m train.main sana_video_2b_480p --encoders MODEL --data.path videos/ \\
        [--data.joint-interval 4 --data.joint-pictures pictures/] [--data.motion-score COLUMN]

NVlabs/Sana, configs/sana_video_config/Sana_2000M_480px_AdamW_fsdp: AdamW at 5e-5 with epsilon 1e-10 and without
weight decay, a warm-up of 500, clipping at 0.1, logit-normal noise levels at shift 3 and sampling at 8, clips of 81
frames, one per GPU. The published run began at 256 px: ``--data.resolution 256``.

Different here: a moving average of the weights, and a tenth of the clips with their first frame given
(``--flow.image-to-video``). What follows from the data is left to options. For the published choices:

* captions, 5 % the data's own and 95 % a vision model's: ``--data.caption-choice proportion --data.proportions prompt=5
  Qwen2.5-VL=95``, with the kinds as the data names them;
* clips by the strength of their motion: ``--data.filters unimatch=1:30``;
* every N steps a batch of pictures, four for every clip (never by default, there as well): ``--data.joint-interval N
  --data.joint-pictures pictures/ --data.joint-batch-size 256``;
* each clip's motion in its caption: ``--data.motion-score unimatch``; captions stay as they are without.

For 64 x 80 GB in hosts of eight: the GPUs of a host share one copy of the model (``fsdp=8``).
"""

from __future__ import annotations

from configs.data import VideoDataConfig
from configs.schema import (
    CheckpointConfig,
    ComputeConfig,
    MeshConfig,
    OptimizerConfig,
    PreviewConfig,
    RunConfig,
    VideoFlowConfig,
)
from sana_jax.models.sana_video import SanaVideoConfig

CONFIG = RunConfig(
    preset="sana_video_2b_480p",
    run_dir="runs/sana_video_2b_480p",
    steps=100_000,
    transformer=SanaVideoConfig.sana_video_2b_480p(),
    data=VideoDataConfig(),
    batch_size=64,
    compute=ComputeConfig(dtype="bfloat16", remat="full"),
    flow=VideoFlowConfig(flow_shift=3.0, sampling_flow_shift=8.0, image_to_video=0.1),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=500, clip_norm=0.1, epsilon=1e-10),
    mesh=MeshConfig(data=-1, fsdp=8),
    checkpoint=CheckpointConfig(every=2500),
    preview=PreviewConfig(every=5000, guidance_scale=6.0, captions=2, per_caption=1, num_inference_steps=50),
)
