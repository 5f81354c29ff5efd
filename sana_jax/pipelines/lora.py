"""LoRA on a pipeline's transformer; methods are called as diffusers calls them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels.typing import PyTree
from sana_jax.errors import UserError
from sana_jax.lora import Lora, lora_from_tree, lora_tree, merge_lora, read_lora
from sana_jax.nn.linear import LORA
from sana_jax.pipelines.families import abstract_params, rules_of
from sana_jax.pipelines.resumed_folder import digest
from sana_jax.quantization.trees import stored_formats
from sana_jax.weights.components import Resident


class _Adapter(NamedTuple):
    lora: Lora
    weight: float
    merged_at: float = 1.0  # what the weight is multiplied with while it is merged

    @property
    def acting(self) -> float:
        """The weight with which it acts."""
        return self.weight * self.merged_at


class LoraPipeline:
    """What a pipeline does with LoRA files: load them, weigh them, merge them, and be rid of them.

    A LoRA is computed beside the transformer's own products (the default), or merged into its weights. Several add up.
    One of weight 0 is left out, and with none left everything is as it was, bit for bit. Other changes of weights
    compile nothing anew.
    """

    transformer: Any
    transformer_weights: Resident

    # replaced, never changed in place, so that they may stand on the class
    _adapters: dict[str, _Adapter] = {}  # noqa: RUF012
    _runtime_lora: PyTree | None = None
    _weights_without_lora: Resident | None = None  # while merged

    def load_lora_weights(
        self,
        path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        adapter_name: str | Sequence[str] | None = None,
        *,
        weights: float | Sequence[float] = 1.0,
        weight_name: str | None = None,
        merge: bool = False,
    ) -> None:
        """Loads one or several LoRA files for the transformer, beside those that are loaded, and prints what they do.

        All loaded ones act at once, each with its weight; in diffusers a second one waits for ``set_adapters``.

        Args:
            path: a safetensors file, or a directory with ``pytorch_lora_weights.safetensors``; or several of them.
            adapter_name: what ``set_adapters`` will call it, or them; ``default_0``, ``default_1``, ... if not given.
            weights: how much of it acts, for all or for each; 1 is as it was trained.
            weight_name: the file's name in the directory.
            merge: changes the transformer's weights instead of computing the LoRA beside them: the fastest and the
                most exact in float32; in bfloat16 small changes are lost in rounding.

        Raises:
            FileNotFoundError: no such file.
            CheckpointError: a damaged file, one for another network, or one of which nothing fits.
            UserError: no file, a weight that is not finite, or names that are taken.
        """
        if self._weights_without_lora is not None and not merge:
            raise UserError(
                "a LoRA is merged into the weights; give merge=True for this one too, or unfuse_lora() first"
            )
        paths = [path] if isinstance(path, str | os.PathLike) else list(path)
        if not paths:
            raise UserError(f"path {path!r} names no LoRA file; give one or several")
        names = self._new_names(adapter_name, len(paths))
        given = _weights(weights, len(paths), "LoRA files")
        rules, abstract = rules_of(self.transformer.config), abstract_params(self.transformer)
        new = {
            name: _Adapter(read_lora(one, rules, abstract, weight_name=weight_name), weight)
            for one, name, weight in zip(paths, names, given)
        }
        for name, adapter in new.items():
            for line in adapter.lora.summary():
                print(line)
            print(f"LoRA {adapter.lora.location}: acts as {name!r} with weight {adapter.weight:g}")
        self._set({**self._adapters, **new}, merged=merge)

    def add_trained_lora(self, model: Any) -> None:
        """Lets the LoRA of an opened training run act, under the name ``trained``."""
        settings = model.trained_from.settings["lora"]
        abstract = abstract_params(self.transformer)
        lora = lora_from_tree(model.trained[LORA], rules_of(self.transformer.config), abstract, alpha=settings["alpha"])
        location = f"step {model.checkpoint_step} ({model.weights}) beside {model.trained_from.model}"
        self._set(
            {**self._adapters, "trained": _Adapter(dataclasses.replace(lora, location=location), 1.0)}, merged=False
        )

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Lets these LoRAs act with these weights (one for all or one each; 1 if not given), and no others.

        Raises:
            UserError: a name that is not loaded, a weight that is not finite, or LoRAs that are merged.
        """
        self._refuse_merged("set_adapters")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if unknown := [name for name in names if name not in self._adapters]:
            raise UserError(f"no LoRA is loaded as {unknown}; loaded are {list(self._adapters)}: choose from those")
        given = dict(zip(names, _weights(1.0 if adapter_weights is None else adapter_weights, len(names), "names")))
        self._set(
            {name: adapter._replace(weight=given.get(name, 0.0)) for name, adapter in self._adapters.items()},
            merged=False,
        )

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that act: those of another weight than 0."""
        return [name for name, adapter in self._adapters.items() if adapter.acting]

    def describe_lora(self) -> str:
        """``file:weight`` of the LoRAs that act, separated by commas; empty without any."""
        active = [adapter for adapter in self._adapters.values() if adapter.acting]
        return ", ".join(f"{os.path.basename(adapter.lora.location)}:{adapter.acting:g}" for adapter in active)

    def lora_settings(self) -> dict[str, str | None]:
        """Which LoRAs act, for telling runs apart: as ``describe_lora`` says, and a short name for what they add.

        Files of all trainings are called alike, so that the name alone would let a run go on with another one.
        """
        acting = [adapter.lora for adapter in self._adapters.values() if adapter.acting]
        layers = [layer for lora in acting for layer in lora.layers]
        arrays = [array for layer in layers for array in (layer.module, layer.scale, layer.down, layer.up)]
        return {"lora": self.describe_lora(), "lora weights": digest(*arrays) if arrays else None}

    def lora_table(self) -> str:
        """Every layer that the loaded files change, with rank, alpha, scale and size, and what of them is not used."""
        return "\n\n".join(
            f"{name}: {adapter.lora.location}, weight {adapter.acting:g}\n{adapter.lora.table()}"
            for name, adapter in self._adapters.items()
        )

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Merges the loaded LoRAs, with their weights times ``lora_scale``, into the transformer's weights.

        One that is loaded later with ``merge=True`` is merged with its own weight, beside these.

        Raises:
            UserError: none is loaded, they are merged already, or the scale is not finite.
        """
        self._refuse_merged("fuse_lora")
        if not self._adapters:
            raise UserError("fuse_lora: no LoRA is loaded; call load_lora_weights first")
        (scale,) = _weights(lora_scale, 1, "lora_scale")
        adapters = {name: adapter._replace(merged_at=scale) for name, adapter in self._adapters.items()}
        self._set(adapters, merged=True)

    def unfuse_lora(self) -> None:
        """Takes merged LoRAs out again, to the bit, and computes them beside the weights.

        Raises:
            UserError: none is merged.
        """
        if self._weights_without_lora is None:
            raise UserError("unfuse_lora: no LoRA is merged")
        self._set(self._adapters, merged=False)

    def unload_lora_weights(self) -> None:
        """Forgets all LoRAs; the transformer is as it was before, to the bit."""
        self._set({}, merged=False)

    def check_no_unmerged_lora(self) -> None:
        """Raises ``UserError`` where a LoRA acts that is no part of the weights."""
        if self._runtime_lora is not None:
            raise UserError(
                f"the LoRA {self.describe_lora()} is not merged into the weights and would not be saved; call "
                "fuse_lora() or unload_lora_weights() first"
            )

    def _set(self, adapters: dict[str, _Adapter], *, merged: bool) -> None:
        """Lets these act: beside the weights with their weights, or merged, each as ``merged_at`` says."""
        if not merged:
            adapters = {name: adapter._replace(merged_at=1.0) for name, adapter in adapters.items()}
        if merged:
            self._check_mergeable()
        active = [(adapter.lora, adapter.acting) for adapter in adapters.values() if adapter.acting]
        tree = lora_tree(active, abstract_params(self.transformer)) if active else None
        if self._weights_without_lora is not None:
            self.transformer_weights.free()
            self.transformer_weights, self._weights_without_lora = self._weights_without_lora, None
        self._adapters, self._runtime_lora = adapters, None
        if not merged:
            if tree is not None:
                self._runtime_lora = jax.tree.map(jnp.asarray, tree)
            return
        base = self._weights_without_lora = self.transformer_weights

        def read() -> PyTree:
            return base.take() if tree is None else merge_lora(base.take(), tree)

        self.transformer_weights = Resident(base.name, base.num_bytes, read)

    def _check_mergeable(self) -> None:
        """Raises ``UserError`` where the weights are quantised: what a LoRA adds is smaller than their steps."""
        weights = self.transformer_weights if self._weights_without_lora is None else self._weights_without_lora
        if formats := set(stored_formats({} if weights.abstract is None else weights.abstract).values()):
            raise UserError(
                f"a LoRA cannot be merged into weights in {', '.join(sorted(formats))}, whose steps are larger than "
                "most of what it adds; leave merge out: it is then computed beside them"
            )

    def _refuse_merged(self, method: str) -> None:
        if self._weights_without_lora is not None:
            raise UserError(f"{method}: the LoRAs are merged into the weights; call unfuse_lora() first")

    def _new_names(self, given: str | Sequence[str] | None, count: int) -> list[str]:
        if given is None:
            free = (f"default_{i}" for i in range(len(self._adapters) + count) if f"default_{i}" not in self._adapters)
            return [next(free) for _ in range(count)]
        names = [given] if isinstance(given, str) else list(given)
        if len(names) != count or len(set(names)) != count or any(name in self._adapters for name in names):
            raise UserError(
                f"adapter_name {given!r} for {count} LoRA files beside {list(self._adapters)}; allowed is one new name "
                "for each"
            )
        return names


def _weights(given: Any, count: int, what: str) -> list[float]:
    """One finite number each; raises ``UserError`` otherwise."""
    try:
        numbers = np.asarray(given, np.float64)
        weights = np.broadcast_to(numbers, (count,)) if numbers.ndim == 0 else numbers
    except (TypeError, ValueError):
        weights = np.empty(0)
    if weights.shape != (count,) or not np.isfinite(weights).all():
        raise UserError(f"LoRA weights {given!r} for {count} {what}; allowed are one finite number for all or one each")
    return [float(weight) for weight in weights]
