"""The custom ops: what autograd and `torch.compile` see of the engine."""
