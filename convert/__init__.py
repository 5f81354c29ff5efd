"""PyTorch checkpoints in, PyTorch checkpoints out."""
