"""Training data."""

from __future__ import annotations

from train.data.cached import CachedData
from train.data.digits import DigitsData
from train.data.loader import Dataset, Loader

__all__ = ["CachedData", "Dataset", "DigitsData", "Loader"]
