"""The tensor names of published checkpoints, one file per family, as diffusers and transformers write them."""
