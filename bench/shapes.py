"""The cases: shapes that somebody trains or has published figures for, and inputs that look like a training step's."""

from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """N tokens, hidden size D, vocabulary V."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    device: str

    @property
    def gradient_bytes(self) -> int:
        """Of dX and dW in the inputs' dtype: what every method has to return."""
        return (self.tokens + self.vocabulary) * self.hidden * self.dtype.itemsize


SHAPES = {
    "tiny": Shape(256, 64, 1000, torch.float32, "cpu"),  # warms up libraries; no figure is taken from it
    "cpu-4k": Shape(4096, 512, 32000, torch.float32, "cpu"),
    "cpu-16k": Shape(16384, 512, 32000, torch.float32, "cpu"),
    # those for which peers have published figures, on H100 and H200
    "gpu-8k-152k": Shape(8192, 4096, 151936, torch.bfloat16, "cuda"),
    "gpu-16k-248k": Shape(16384, 2048, 248320, torch.bfloat16, "cuda"),
    "gpu-8k-128k": Shape(8192, 4096, 128256, torch.bfloat16, "cuda"),
}


class Inputs(NamedTuple):
    """One pack. `hidden` and `weight` want gradients; all tokens count."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    behavior_logprobs: Tensor  # (N,) float32
    cu_seqlens: Tensor  # (S+1,) int32

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Random inputs with logits of variance 1, sequences of 128 to 1536 tokens, and a behaviour policy near the model.

    The log-ratios have a mean near 0 and a spread of 0.1, so that both clips bite and the weights sit neither on the
    floor nor on the ceiling.
    """
    rng = torch.Generator(shape.device).manual_seed(seed)
    options = {"dtype": shape.dtype, "device": shape.device, "generator": rng}
    hidden = torch.randn(shape.tokens, shape.hidden, **options)
    weight = torch.randn(shape.vocabulary, shape.hidden, **options).mul_(shape.hidden**-0.5)
    target = torch.randint(shape.vocabulary, (shape.tokens,), device=shape.device, generator=rng)

    # log p = z_y - log sum exp z, and for a sum over many logits of variance s^2 the latter is log V + s^2 / 2
    spread = hidden.float().square().mean(1)
    logprobs = (hidden * weight[target]).float().sum(1) - (torch.tensor(shape.vocabulary).log().item() + spread / 2)
    noise = torch.randn(shape.tokens, device=shape.device, generator=rng)
    behavior_logprobs = (logprobs + 0.02 + 0.1 * noise).clamp(max=0.0)

    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, behavior_logprobs, sequences(shape, seed))


def sequences(shape: Shape, seed: int) -> Tensor:
    """(S+1,) int32 bounds of sequences of 128 to 1536 tokens; the last takes what is left."""
    rng = torch.Generator().manual_seed(seed)
    bounds = [0]
    while bounds[-1] < shape.tokens:
        bounds.append(min(bounds[-1] + int(torch.randint(128, 1537, (), generator=rng)), shape.tokens))
    return torch.tensor(bounds, dtype=torch.int32, device=shape.device)
