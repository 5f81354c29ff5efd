"""PyTorch's side of the benchmark commands' ``--against diffusers``: one case in a process of its own.

Reads a line of JSON from standard input and answers with one: ``{"prepare": case}`` builds the case and warms it up,
``{"run": true}`` runs it once and gives the seconds of its stages. ``sana_jax.benchmarking.other_side`` speaks with it.
Weights are random, N(0, 0.02²); ``compile`` applies ``torch.compile`` to the network and the decoder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], dict[str, float]]


def wait(device: str) -> float:
    """The time when everything that was begun is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def fields_of(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in ("_class_name", "_diffusers_version")}


def random_module(make: Callable[[], torch.nn.Module], case: dict[str, Any]) -> torch.nn.Module:
    """A module with random weights, made without drawing its own initial ones first."""
    with torch.device("meta"):
        module = make()
    module = module.to(getattr(torch, case["dtype"])).to_empty(device=case["device"]).eval()
    generator = torch.Generator(case["device"]).manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
    return module


def compiled(module: torch.nn.Module, case: dict[str, Any]) -> torch.nn.Module:
    if case["compile"]:
        module.forward = torch.compile(module.forward)
    return module


def forward_run(function: Callable[[], Any], case: dict[str, Any]) -> Run:
    def run() -> dict[str, float]:
        begin = wait(case["device"])
        with torch.inference_mode():
            function()
        return {"forward": wait(case["device"]) - begin}

    return run


def randn(case: dict[str, Any], *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=case["device"], dtype=getattr(torch, case["dtype"]))


def image_network(case: dict[str, Any]) -> Run:
    from diffusers import SanaTransformer2DModel

    fields = fields_of(case["transformer"])
    model = compiled(random_module(lambda: SanaTransformer2DModel(**fields), case), case)
    batch, side, tokens = case["batch"], case["side"], case["caption_tokens"]
    latents, caption = randn(case, batch, fields["in_channels"], side, side), randn(
        case, batch, tokens, fields["caption_channels"]
    )  # fmt: skip
    mask = torch.ones(batch, tokens, device=case["device"], dtype=torch.int32)
    timestep = torch.full((batch,), 500.0, device=case["device"])
    return forward_run(
        lambda: model(latents, caption, timestep, encoder_attention_mask=mask, return_dict=False), case
    )  # fmt: skip


def video_network(case: dict[str, Any]) -> Run:
    from diffusers import SanaVideoTransformer3DModel

    fields = fields_of(case["transformer"])
    model = compiled(with_rotation(random_module(lambda: SanaVideoTransformer3DModel(**fields), case), fields), case)
    batch, tokens = case["batch"], case["caption_tokens"]
    latents = randn(case, batch, fields["in_channels"], *case["latents"])
    caption = randn(case, batch, tokens, fields["caption_channels"])
    mask = torch.ones(batch, tokens, device=case["device"], dtype=torch.int32)
    timestep = torch.full((batch,), 500.0, device=case["device"])
    return forward_run(
        lambda: model(latents, caption, timestep=timestep, encoder_attention_mask=mask, return_dict=False), case
    )


def with_rotation(model: torch.nn.Module, fields: dict[str, Any]) -> torch.nn.Module:
    """The rotary tables are no weights: made anew, where ``random_module`` has left other numbers."""
    device = next(model.parameters()).device
    made = type(model.rope)(fields["attention_head_dim"], fields["patch_size"], fields["rope_max_seq_len"])
    model.rope = made.to(device)
    return model


def dc_ae_decode(case: dict[str, Any]) -> Run:
    from diffusers import AutoencoderDC

    fields = fields_of(case["vae"])
    decoder = compiled(random_module(lambda: AutoencoderDC(**fields), case).decoder, case)
    latents = randn(case, 1, fields["latent_channels"], case["side"], case["side"])
    return forward_run(lambda: decoder(latents), case)


def image_pipeline(case: dict[str, Any]) -> Run:
    """diffusers' pipeline; its stages begin when its components are first called."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )
    from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

    shape, gemma = fields_of(case["transformer"]), fields_of(case["text_encoder"])
    makers = {
        "text_encoder": lambda: Gemma2Model(Gemma2Config(**gemma, attn_implementation="eager")),
        "transformer": lambda: SanaTransformer2DModel(**shape),
        "vae": lambda: AutoencoderDC(**fields_of(case["vae"])),
    }
    modules = {name: random_module(make, case) for name, make in makers.items()}
    text = modules["text_encoder"]
    text.rotary_emb = type(text.rotary_emb)(text.config).to(case["device"])
    text.embed_tokens.embed_scale.fill_(gemma["hidden_size"] ** 0.5)
    compiled(modules["transformer"], case)
    compiled(modules["vae"].decoder, case)
    sprint = shape["guidance_embeds"]
    scheduler = SCMScheduler() if sprint else DPMSolverMultistepScheduler(**flow_of(case))
    tokenizer = AutoTokenizer.from_pretrained(case["tokenizer"])
    tokenizer.padding_side = "right"
    pipe = (SanaSprintPipeline if sprint else SanaPipeline)(tokenizer=tokenizer, scheduler=scheduler, **modules)
    prompts = iter(case["prompts"])
    size = {"height": case["pixels"], "width": case["pixels"]}

    def call() -> None:
        pipe(next(prompts), **sampling_of(case), **size)

    return staged_run(pipe, call, case)


def video_pipeline(case: dict[str, Any]) -> Run:
    """diffusers' SANA-Video, from embeddings of prompts, as ours; with ``image`` true it begins with a picture."""
    import PIL.Image
    from diffusers import (
        AutoencoderKLWan,
        DPMSolverMultistepScheduler,
        SanaImageToVideoPipeline,
        SanaVideoPipeline,
        SanaVideoTransformer3DModel,
    )

    shape = fields_of(case["transformer"])
    network = with_rotation(random_module(lambda: SanaVideoTransformer3DModel(**shape), case), shape)
    modules = {
        "transformer": compiled(network, case),
        "vae": random_module(lambda: AutoencoderKLWan(**fields_of(case["vae"])), case),
    }
    compiled(modules["vae"].decoder, case)
    scheduler = DPMSolverMultistepScheduler(**flow_of(case))
    pipe = (SanaImageToVideoPipeline if case["image"] else SanaVideoPipeline)(
        tokenizer=None, text_encoder=None, scheduler=scheduler, **modules
    )
    embeds = randn(case, 1, case["caption_tokens"], shape["caption_channels"])
    mask = torch.ones(1, case["caption_tokens"], device=case["device"], dtype=torch.int64)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    given |= {f"negative_{name}": value for name, value in given.items()}
    given |= {"height": case["height"], "width": case["width"], "frames": case["frames"]}
    if case["image"]:
        given["image"] = PIL.Image.new("RGB", (case["width"], case["height"]), (120, 60, 30))

    def call() -> None:
        pipe(prompt=None, negative_prompt=None, **given, **sampling_of(case))

    return staged_run(pipe, call, case, before=("encode",) if case["image"] else ())


def flow_of(case: dict[str, Any]) -> dict[str, Any]:
    """A flow scheduler's options."""
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": case["flow_shift"]}


def sampling_of(case: dict[str, Any]) -> dict[str, Any]:
    """Options of a call that all pipelines have."""
    guided = {"num_inference_steps": case["steps"], "guidance_scale": case["guidance_scale"]}
    return {**guided, "output_type": "np", "use_resolution_binning": False}


def staged_run(pipe: Any, call: Callable[[], None], case: dict[str, Any], before: tuple[str, ...] = ("text",)) -> Run:
    """``call`` with its stages' seconds: what comes before the network is ``before``, or none of the stages."""
    pipe.set_progress_bar_config(disable=True)
    moments: dict[str, float] = {}

    def note(stage: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:  # what a hook returns would take the input's place
            if stage not in moments:
                moments[stage] = wait(case["device"])

        return hook

    pipe.transformer.register_forward_pre_hook(note("denoise"))
    pipe.vae.decoder.register_forward_pre_hook(note("decode"))

    def run() -> dict[str, float]:
        moments.clear()
        begin = wait(case["device"])
        with torch.inference_mode():
            call()
        end = wait(case["device"])
        denoise, decode = moments["denoise"], moments["decode"]
        first = dict.fromkeys(before, denoise - begin)
        return {**first, "denoise": decode - denoise, "decode": end - decode}

    return run


def train_step(case: dict[str, Any]) -> Run:
    """Forward, backward, clipping and AdamW (fused) on a fixed batch, in autocast where the dtype is bfloat16."""
    from diffusers import SanaTransformer2DModel

    fields, device = fields_of(case["transformer"]), case["device"]
    wide = {**case, "dtype": "float32"}
    model = random_module(lambda: SanaTransformer2DModel(**fields), wide).train()
    if case["remat"]:
        model.enable_gradient_checkpointing()
    compiled(model, case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    batch, side, tokens = case["batch"], case["side"], case["caption_tokens"]
    latents = randn(wide, batch, fields["in_channels"], side, side)
    caption = randn(wide, batch, tokens, fields["caption_channels"])
    mask = torch.ones(batch, tokens, device=device, dtype=torch.int32)
    lower = torch.autocast(device, torch.bfloat16, enabled=case["dtype"] == "bfloat16")

    def run() -> dict[str, float]:
        begin = wait(device)
        noise, uniform = torch.randn_like(latents), torch.randn(batch, device=device).sigmoid()
        sigma = 3.0 * uniform / (1 + 2.0 * uniform)
        cut = sigma[:, None, None, None]
        with lower:
            (found,) = model(
                (1 - cut) * latents + cut * noise, caption, sigma * 1000, encoder_attention_mask=mask, return_dict=False
            )
        (found.float() - (noise - latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"step": wait(device) - begin}

    return run


KINDS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "image_network": image_network,
    "video_network": video_network,
    "dc_ae_decode": dc_ae_decode,
    "image_pipeline": image_pipeline,
    "video_pipeline": video_pipeline,
    "train_step": train_step,
}


def prepare(case: dict[str, Any]) -> Run:
    """Builds a case."""
    if case.get("threads"):
        torch.set_num_threads(case["threads"])
    return KINDS[case["kind"]](case)


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever libraries print stays out of the answers
    run: Run | None = None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if "prepare" in question:
                run = prepare(question["prepare"])
                answer: dict[str, Any] = {"torch": torch.__version__}
            else:
                answer = {"seconds": run()}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
