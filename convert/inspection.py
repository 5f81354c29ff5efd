"""What a checkpoint is, from headers alone: families, counts, dtypes, files, contract, and every tensor that is odd."""

from __future__ import annotations

from pathlib import Path

from convert.engine import Report
from convert.families import parameter_count
from convert.sources import Choices, Component, Model, index_of, open_model
from sana_jax.compilation import readable_bytes
from sana_jax.weights.messages import one_line

_SHOWN = 5


def inspect_model(
    source: str | Path, choices: Choices | None = None, *, every: bool = False, report: Report = print
) -> bool:
    """Describes a source and returns whether everything in it fits. No tensor is read, nothing is put on a device.

    Args:
        source: a model directory, one component's, a training run, or an original file.
        choices: what the source leaves open.
        every: names every tensor that does not fit, not the first few.
        report: takes one line after another.

    Raises:
        FileNotFoundError, UserError: there is nothing that can be described.
    """
    model = open_model(source, choices, checksums=False)
    report(f"{model.path}: {_kind(model)}")
    for component in model.components:
        _describe(component, every, report)
    for name, error in model.failures.items():
        report(f"{name}: DOES NOT FIT: {one_line(error, 2000)}")
    for note in model.notes:
        report(f"note: {note}")
    report(f"contract: {model.contract or 'none; it belongs to a transformer'}")
    fits = not model.failures and not any(component.problems for component in model.components)
    report("everything fits" if fits else "something does not fit")
    return fits


def _kind(model: Model) -> str:
    origin = ", ".join(dict.fromkeys(component.origin for component in model.components)) or "nothing readable"
    name = index_of(model).get("_class_name")
    if model.index is None:
        return f"one component ({origin}{f' of {name}' if name else ''})"
    return f"{name or 'a model'} ({origin})"


def _describe(component: Component, every: bool, report: Report) -> None:
    size = sum(size for _, size in component.files)
    name = f"{component.folder}: " if component.folder else ""
    dtypes = "unknown dtype"
    if component.source is not None:
        counts: dict[str, int] = {}
        for info in component.source.tensors.values():
            counts[info.dtype.name] = counts.get(info.dtype.name, 0) + 1
        dtypes = ", ".join(counts) if len(counts) == 1 else ", ".join(f"{d} ({n} tensors)" for d, n in counts.items())
    report(
        f"{name}{component.network.family}, {parameter_count(component.network.abstract):,} parameters, {dtypes}, "
        f"{readable_bytes(size)} in {len(component.files)} file{'s' if len(component.files) > 1 else ''}"
    )
    if len(component.files) <= _SHOWN or every:
        for file, count in component.files:
            report(f"  {count:>14,} bytes  {file}")
    problems = component.problems
    for what, names in (
        ("missing", problems.missing),
        ("unexpected", problems.unexpected),
        ("of another shape or dtype", problems.misshapen),
    ):
        shown = names if every else names[:_SHOWN]
        for tensor in shown:
            report(f"  {what}: {tensor}")
        if len(names) > len(shown):
            report(f"  {what}: and {len(names) - len(shown)} more; --all names them")
