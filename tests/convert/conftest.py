"""Tiny published pipelines, saved once."""

from __future__ import annotations

import pytest

from tests.parity import pipeline_oracle


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Directories of whole tiny pipelines by their kind, as diffusers saves them."""
    root = tmp_path_factory.mktemp("published")

    def directory(kind: str):
        if not (root / kind).is_dir():
            pipeline_oracle.save(kind, root / kind)
        return root / kind

    return directory


@pytest.fixture
def tiny_widths(monkeypatch):
    """The tiny networks' width among those whose heads are known."""
    from convert import original

    monkeypatch.setitem(original._CROSS_HEADS, 32, (2, 16))
    monkeypatch.setattr(original, "_HEAD_SIZE", 8)
