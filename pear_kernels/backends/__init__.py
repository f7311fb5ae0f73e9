"""The arithmetic of an LM head: `torch` runs on any device, `triton` on NVIDIA GPUs; `choice` decides."""
