"""What a LoRA run hands out with every checkpoint: the LoRA as diffusers loads it, and a model card beside it."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import jax

from kernels.typing import PyTree
from sana_jax.condition_tokens_files import TOKENS, SavedTokens, save_condition_tokens
from sana_jax.lora import save_lora_weights
from sana_jax.lora.reading import FILE_NAME
from sana_jax.nn.linear import LORA
from sana_jax.pipelines.conditions import describe_encoder
from sana_jax.pipelines.families import abstract_params, make_transformer, rules_of
from train.assembly import RunParts
from train.data.prior import WithPrior
from train.model_card import LoraCard, base_name, write_model_card


def publish(parts: RunParts, trained: PyTree, step: int, preview: Path | None = None) -> Path | None:
    """Writes a LoRA run's file and card into its directory, in place of older ones; other runs have none.

    Every process calls it; the first one writes.

    Args:
        parts: of the run.
        trained: its trained parameters, those that are sampled with.
        step: that they are of.
        preview: the newest picture of the run.

    Returns:
        The LoRA file; None for other runs.
    """
    if parts.recipe.kind != "lora":
        return None
    config, lora = parts.config, parts.config.lora
    tree = _on_host(trained)
    if jax.process_index() != 0:
        return None
    abstract = abstract_params(make_transformer(config.transformer))
    run_dir = Path(config.run_dir)
    notes = {
        "base_model": base_name(config.model),
        "steps": step,
        "targets": list(lora.targets),
        "dropout": lora.dropout,
    }
    save_lora_weights(
        run_dir,
        tree[LORA],
        rules_of(config.transformer),
        abstract,
        alpha=lora.alpha,
        notes=notes,
    )
    facts = {
        "learning rate": config.optimizer.learning_rate,
        "batch size": config.batch_size,
        "optimizer": config.optimizer.name,
        "flow shift": config.flow.flow_shift,
        "seed": config.seed,
    }
    if parts.frames is not None:
        facts["clips"] = f"{parts.frames} frames of {'x'.join(map(str, parts.size))} pixels, {parts.fps:g} per second"
        facts["flow shift in sampling"] = config.flow.sampling_shift
    if parts.recipe.encoders is not None:
        saved = SavedTokens(parts.recipe.encoders, tree[TOKENS], parts.recipe.image_encoders)
        save_condition_tokens(run_dir, saved)
        described = "; ".join(describe_encoder(name, saved) for name in saved.encoders.encoders)
        facts["condition tokens"] = f"{described}; for sana_jax, from the condition_tokens files beside the LoRA"
    prompt, template = _prompt_and_template(_caption_given(config.data))
    if template is not None:
        facts["captions"] = f"each sample's own, by the template `{template}`"
    card = LoraCard(
        base_model=config.model,
        lora=lora,
        steps=step,
        data=_describe_data(parts),
        prompt=prompt,
        example=next(iter(parts.dataset.captions), None),
        license=parts.base.parts.defaults.license,
        pipeline=parts.pipeline,
        for_diffusers=not (parts.base.parts.path / "checkpoints").is_dir(),
        preview=None if preview is None else str(preview.relative_to(run_dir)),
        facts=facts,
    )
    write_model_card(run_dir, card)
    return run_dir / FILE_NAME


def _describe_data(parts: RunParts) -> str:
    """How much a run was trained on; of DreamBooth subject and class apart."""
    kind, dataset = "pictures" if parts.frames is None else "clips", parts.dataset
    if isinstance(dataset, WithPrior):
        return f"{len(dataset.subject):,} {kind}, and {len(dataset.prior):,} of their class"
    return f"{len(dataset):,} {kind}"


def _caption_given(data: Any) -> str | None:
    """``--data.caption``; None where nothing read it: a finished cache has captions of its own."""
    return None if getattr(data, "finished_cache", False) else getattr(data, "caption", None)


def _prompt_and_template(caption: str | None) -> tuple[str | None, str | None]:
    """The one prompt of all samples, or what makes each its own, with names in braces; None for what there is not."""
    if caption is None:
        return None, None
    names = [name for _, name, _, _ in string.Formatter().parse(caption) if name is not None]
    return (None, caption) if names else (caption.format(), None)


def _on_host(tree: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
