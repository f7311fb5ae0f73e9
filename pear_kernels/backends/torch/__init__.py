"""Heads in plain PyTorch, on any device."""
