"""What a LoRA run hands out with every checkpoint: the LoRA as diffusers loads it, and a model card beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from kernels.typing import PyTree
from sana_jax.condition_tokens_files import SavedTokens, save_condition_tokens
from sana_jax.image_encoders import SiglipImageEncoder
from sana_jax.lora import save_lora_weights
from sana_jax.lora.reading import FILE_NAME
from sana_jax.models.sana import SanaTransformer
from sana_jax.nn.linear import LORA
from sana_jax.pipelines.opening import abstract_params
from sana_jax.weights.tables.sana import transformer_rules
from train.assembly import RunParts
from train.model_card import LoraCard, write_model_card
from train.recipes.lora import TOKENS


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
    abstract = abstract_params(SanaTransformer(config.transformer))
    run_dir = Path(config.run_dir)
    notes = {"base_model": config.model, "steps": step, "targets": list(lora.targets)}
    save_lora_weights(
        run_dir,
        tree[LORA],
        transformer_rules(config.transformer),
        abstract,
        alpha=lora.alpha,
        dropout=lora.dropout,
        notes=notes,
    )
    if parts.recipe.encoders is not None:
        saved = SavedTokens(parts.recipe.encoders, tree[TOKENS], _image_encoders(config.data.conditions))
        save_condition_tokens(run_dir, saved)
    card = LoraCard(
        base_model=config.model,
        lora=lora,
        steps=step,
        data=f"{len(parts.dataset):,} pictures",
        prompt=getattr(config.data, "caption", None),
        license=parts.base.parts.defaults.license,
        pipeline=parts.pipeline,
        preview=None if preview is None else str(preview.relative_to(run_dir)),
        facts={
            "learning rate": config.optimizer.learning_rate,
            "batch size": config.batch_size,
            "optimizer": config.optimizer.name,
            "flow shift": config.flow.flow_shift,
            "seed": config.seed,
        },
    )
    write_model_card(run_dir, card)
    return run_dir / FILE_NAME


def _image_encoders(conditions: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What made the conditions that are embeddings of pictures."""
    found = {}
    for condition in conditions:
        name, _, kind = condition.partition("=")
        kind, _, directory = kind.partition(":")
        if kind == "siglip":
            encoder = SiglipImageEncoder.from_directory(directory, say=lambda line: None)
            options = {key: encoder.describe()[key] for key in ("dtype", "features", "normalize")}
            found[name] = {"directory": os.path.abspath(directory), "id": encoder.id, **options}
    return found


def _on_host(tree: PyTree) -> PyTree:
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)
