"""The cases: shapes that somebody trains or has published figures for, and inputs that look like a training step's."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pear_kernels import Teacher, TopKTeacher


class Shape(NamedTuple):
    """N tokens, hidden size D, vocabulary V."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    sequences: int | None = None  # so many of equal length; None: of 128 to 1536 tokens
    inputs: str = "random"  # or SmolLM2's hidden states and head on a text ("code", "samples"), or "fitted-" to those

    def gradient_bytes(self, gradients: str) -> int:
        """What every method has to return, in the inputs' dtype: dX and dW ("both"), dX ("hidden"), or nothing ("")."""
        rows = {"both": self.tokens + self.vocabulary, "hidden": self.tokens, "": 0}[gradients]
        return rows * self.hidden * self.dtype.itemsize

    def __str__(self) -> str:
        packed = f", {self.sequences} sequences" if self.sequences else ""
        dtype = str(self.dtype).removeprefix("torch.")
        of = "" if self.inputs == "random" else f", {self.inputs if self.fitted else f'SmolLM2, {self.inputs}'}"
        return f"N={self.tokens}, D={self.hidden}, V={self.vocabulary}, {dtype}{packed}{of}"

    @property
    def fitted(self) -> bool:
        return self.inputs.startswith("fitted-")

    @property
    def real(self) -> bool:
        return self.inputs != "random" and not self.fitted


def smollm2(text: str, **more) -> Shape:
    return Shape(2048, 576, 49152, inputs=text, **more)


def gpu(tokens: int, hidden: int, vocabulary: int, **more) -> Shape:
    return Shape(tokens, hidden, vocabulary, torch.bfloat16, "cuda", **more)


PACKS = (1, 10, 100, 1000)
GPU_BASE, CPU_BASE = "8k-4k-152k", "cpu-4k"
TEXTS = ("code", "samples")  # that SmolLM2 read or wrote
BEHAVIOR_TEMPERATURE = 1.3  # of the policy that wrote them: the same model, less sure
SHAPES = {
    GPU_BASE: gpu(8192, 4096, 151936),  # published, on H100; the targets' shape
    "128k-4k-152k": gpu(131072, 4096, 151936),
    "16k-2k-248k": gpu(16384, 2048, 248320),  # published, on H100
    "8k-4k-128k": gpu(8192, 4096, 128256),  # published, on H200
    # over N, V and D around the base
    **{f"{n}k-4k-152k": gpu(1024 * n, 4096, 151936) for n in (1, 2, 4, 16, 32, 64)},
    **{f"8k-4k-{v // 1000}k": gpu(8192, 4096, v) for v in (32000, 248320)},
    **{f"8k-{d}k-152k": gpu(8192, 1024 * d, 151936) for d in (1, 2)},
    **{f"pack-{s}": gpu(8192, 4096, 151936, sequences=s) for s in PACKS},
    # on a CPU
    CPU_BASE: Shape(4096, 512, 32000),
    "cpu-16k": Shape(16384, 512, 32000),
    "cpu-small": Shape(1024, 256, 8192),
    "cpu-small-4n": Shape(4096, 256, 8192),
    "cpu-small-4v": Shape(1024, 256, 32768),
    "cpu-small-4d": Shape(1024, 1024, 8192),
    **{f"cpu-pack-{s}": Shape(4096, 256, 8192, sequences=s) for s in PACKS},
    # with SmolLM2's logits, or such as resemble them
    **{f"real-{text}": smollm2(text) for text in TEXTS},
    "real-code-bf16": smollm2("code", dtype=torch.bfloat16),  # errors alone: no time of a CPU without such products
    **{f"real-{text}-cuda": smollm2(text, dtype=torch.bfloat16, device="cuda") for text in TEXTS},
    "fitted-8k-4k-152k": gpu(8192, 4096, 151936, inputs="fitted-code"),
    "fitted-16k-2k-248k": gpu(16384, 2048, 248320, inputs="fitted-code"),
    "fitted-8k-4k-128k": gpu(8192, 4096, 128256, inputs="fitted-code"),
    "fitted-samples-8k-4k-152k": gpu(8192, 4096, 151936, inputs="fitted-samples"),
    "fitted-tiny": Shape(256, 64, 1000, inputs="fitted-code"),
    # to try the machinery, and to warm up libraries: no figure is taken from these
    "tiny": Shape(256, 64, 1000),
    "tiny-2n": Shape(512, 64, 1000),
    **{f"tiny-pack-{s}": Shape(256, 64, 1000, sequences=s) for s in (1, 10)},
}
ROWS_AT_A_TIME = 16384  # inputs are made in slices, so that making them takes no more memory than holding them
L2_BYTES, MOST_SETS = 64 << 20, 8
TOP_K, TEACHER_ROWS = 32, 1024  # of a teacher; its logits are made so many rows at a time


class Inputs(NamedTuple):
    """One pack. `hidden` and `weight` want gradients; all tokens count."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    behavior_logprobs: Tensor  # (N,) float32
    cu_seqlens: Tensor  # (S+1,) int32
    teacher: Teacher | None = None  # made for those who distil
    top_k: TopKTeacher | None = None  # the same teacher's most likely tokens

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def to(self, device: str, dtype: torch.dtype) -> "Inputs":
        """The same there, hidden states and head in this dtype, without a teacher."""
        hidden, weight = (leaf.detach().to(device, dtype).requires_grad_() for leaf in (self.hidden, self.weight))
        return Inputs(hidden, weight, *(tensor.to(device) for tensor in self[2:5]))

    def frozen(self) -> "Inputs":
        """The same with a head that wants no gradient."""
        return self._replace(weight=self.weight.detach())

    @torch.no_grad()
    def taught(self, seed: int = 0) -> "Inputs":
        """The same with a random teacher of half the hidden size, and logits of variance 1 too."""
        (N, D), V = self.hidden.shape, len(self.weight)
        device, dtype = self.hidden.device, self.hidden.dtype
        rng = torch.Generator(device).manual_seed(seed + 1000)
        hidden = torch.randn(N, D // 2, dtype=dtype, device=device, generator=rng)
        weight = torch.randn(V, D // 2, dtype=dtype, device=device, generator=rng).mul_((D // 2) ** -0.5)
        logprobs = torch.empty(N, TOP_K, device=device)
        ids = torch.empty(N, TOP_K, dtype=torch.int64, device=device)
        for begin in range(0, N, TEACHER_ROWS):
            rows = slice(begin, begin + TEACHER_ROWS)
            log_q = torch.log_softmax(F.linear(hidden[rows], weight).float(), dim=-1)
            logprobs[rows], ids[rows] = log_q.topk(TOP_K)
        return self._replace(teacher=Teacher(hidden, weight), top_k=TopKTeacher(ids, logprobs))


def rotating(shape: Shape) -> list[Inputs]:
    """Input sets to take turns with, so that none is in a cache when its turn comes: 4 times the L2, and 2 at least.

    On a CPU one set, whose weight alone is larger than its caches.
    """
    if shape.device == "cpu":
        return [make_inputs(shape)]
    bytes_of_one = (shape.tokens + shape.vocabulary) * shape.hidden * shape.dtype.itemsize
    sets = min(max(2, -(-4 * L2_BYTES // bytes_of_one)), MOST_SETS)
    return [make_inputs(shape, seed) for seed in range(sets)]


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """The inputs of a shape, of which SmolLM2's are the same for every seed."""
    if shape.fitted:
        from bench import fitted

        return fitted.make_inputs(shape, seed)
    if shape.real:
        from bench.real_logits import real_inputs  # needs transformers, which may not be there

        return real_inputs(shape.inputs).to(shape.device, shape.dtype)
    return random_inputs(shape, seed)


def random_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Random inputs with logits of variance 1, sequences of 128 to 1536 tokens, and a behaviour policy near the model.

    The log-ratios have a mean near 0 and a spread of 0.1, so that both clips bite and the weights sit neither on the
    floor nor on the ceiling.
    """
    rng = torch.Generator(shape.device).manual_seed(seed)
    on_device = {"device": shape.device, "generator": rng}
    hidden = torch.randn(shape.tokens, shape.hidden, dtype=shape.dtype, **on_device)
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=shape.dtype, **on_device).mul_(shape.hidden**-0.5)
    target = torch.randint(shape.vocabulary, (shape.tokens,), **on_device)
    noise = torch.randn(shape.tokens, **on_device)

    # log p = z_y - log sum exp z, and for a sum over many logits of variance s^2 the latter is log V + s^2 / 2
    logprobs = torch.empty_like(noise)
    for begin in range(0, shape.tokens, ROWS_AT_A_TIME):
        rows = slice(begin, begin + ROWS_AT_A_TIME)
        logit = (hidden[rows] * weight[target[rows]]).sum(1, dtype=torch.float32)
        spread = torch.linalg.vector_norm(hidden[rows], dim=1, dtype=torch.float32).square() / shape.hidden
        logprobs[rows] = logit - (torch.tensor(shape.vocabulary).log().item() + spread / 2)
    behavior_logprobs = (logprobs + 0.02 + 0.1 * noise).clamp(max=0.0)

    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), target, behavior_logprobs, sequences(shape, seed))


def lengths_of(x: Inputs) -> tuple[Tensor, Tensor]:
    """(S,) tokens of each sequence, and (N,) the sequence of each token."""
    lengths = x.cu_seqlens.diff().long()
    of = torch.arange(len(lengths), device=lengths.device)
    return lengths, of.repeat_interleave(lengths, output_size=len(x.hidden))


def sequences(shape: Shape, seed: int) -> Tensor:
    """(S+1,) int32 bounds: `shape.sequences` of nearly equal length, or of 128 to 1536 tokens each."""
    if shape.sequences:
        bounds = [shape.tokens * i // shape.sequences for i in range(shape.sequences + 1)]
    else:
        rng = torch.Generator().manual_seed(seed)
        bounds = [0]
        while bounds[-1] < shape.tokens:
            bounds.append(min(bounds[-1] + int(torch.randint(128, 1537, (), generator=rng)), shape.tokens))
    return torch.tensor(bounds, dtype=torch.int32, device=shape.device)
