"""Clips with the camera's path: where it is read, how it goes with a clip's frames, and what the network is told."""
