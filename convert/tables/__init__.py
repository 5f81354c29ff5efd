"""The tensor names of the original NVlabs checkpoints, one file per family, beside those of the published ones."""
