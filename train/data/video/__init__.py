"""Clips for training: where they are cut out of videos, how they are decoded, moving digits."""
