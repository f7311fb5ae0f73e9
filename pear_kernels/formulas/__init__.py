"""Formulas in PyTorch, on per-token tensors: no loss, no head, no schedule."""
