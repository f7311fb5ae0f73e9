"""Random problems for the tests of pear_kernels, and the naive float64 answer to each."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pear_kernels import (
    Teacher,
    TopKTeacher,
    linear_distill_loss,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
)
from pear_kernels.backends.torch.head import Head
from pear_kernels.formulas.pear_weights import PEARWeights
from pear_kernels.objectives.base import token_scale
from pear_kernels.objectives.pear import PEARObjective
from pear_kernels.ops.call import spec_and_numbers
from pear_kernels.options import CallOptions
from pear_kernels.reference import (
    naive_distill_loss,
    naive_logits,
    naive_pear_loss,
    naive_policy_loss,
    naive_weighted_loss,
)

UPSTREAM = 3.7  # a loss is one term of many, so its upstream gradient is not 1


@dataclass
class Problem:
    """A pack of sequences with ignored tokens between, and a head."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    behavior_logprobs: Tensor  # (N,)
    cu_seqlens: Tensor  # (S+1,)
    options: dict = field(default_factory=dict)

    loss, reference = staticmethod(linear_pear_loss), staticmethod(naive_pear_loss)

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Fresh leaves of hidden, weight and (where there is one) bias."""
        tensors = [self.hidden, self.weight, *([self.options["bias"]] if "bias" in self.options else [])]
        return [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]

    def ours(self, **overrides):
        """The loss on fresh leaves: (LossOutput, leaves)."""
        leaves = self.leaves()
        options = {**self.options, "cu_seqlens": self.cu_seqlens, **overrides}
        if "bias" in self.options:
            options["bias"] = leaves[2]
        return self.loss(*leaves[:2], self.target, self.behavior_logprobs, **options), leaves

    def naive(self, **overrides):
        """The naive loss on the same numbers in float64: ((loss, logprobs, weights), leaves)."""
        leaves = self.leaves(torch.float64)
        options = {**self.options, "cu_seqlens": self.cu_seqlens, **overrides}
        options.pop("workspace_bytes", None)
        if "bias" in self.options:
            options["bias"] = leaves[2]
        behavior = None if self.behavior_logprobs is None else self.behavior_logprobs.double()
        return self.reference(*leaves[:2], self.target, behavior, **options), leaves


class PolicyProblem(Problem):
    """The same for policy losses: `behavior_logprobs` are the old policy's, or None, and advantages are an option."""

    loss, reference = staticmethod(linear_policy_loss), staticmethod(naive_policy_loss)


class WeightedProblem(Problem):
    """The same for weighted losses, whose `weights` or `weighting` are an option; they take no `behavior_logprobs`."""

    @staticmethod
    def loss(hidden, weight, target, behavior_logprobs, **options):
        return linear_weighted_loss(hidden, weight, target, **options)

    @staticmethod
    def reference(hidden, weight, target, behavior_logprobs, **options):
        return naive_weighted_loss(hidden, weight, target, **options)


class DistillProblem(Problem):
    """The same for distillation: the `teacher` is an option, and `behavior_logprobs` may be None."""

    @staticmethod
    def loss(hidden, weight, target, behavior_logprobs, *, teacher, **options):
        return linear_distill_loss(hidden, weight, teacher, target, behavior_logprobs, **options)

    @staticmethod
    def reference(hidden, weight, target, behavior_logprobs, *, teacher, **options):
        return naive_distill_loss(hidden, weight, teacher, target, behavior_logprobs, **options)


def make_problem(
    lengths=(7, 1, 0, 12, 5),
    *,
    D: int = 8,
    V: int = 37,
    ignored: float = 0.3,
    drift: float = 0.0,  # mean of log pi - log pi_b
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    bias: bool = False,
    **options,
) -> Problem:
    rng = torch.Generator().manual_seed(seed)
    N = sum(lengths)
    hidden = torch.randn(N, D, generator=rng, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=rng, dtype=torch.float64).to(dtype)
    target = torch.randint(V, (N,), generator=rng)
    logprobs = torch.log_softmax(hidden.double() @ weight.double().T, -1).gather(1, target[:, None])[:, 0]
    noise = 0.3 * torch.randn(N, generator=rng, dtype=torch.float64)
    behavior = (logprobs - drift + noise).clamp(max=0).to(torch.promote_types(dtype, torch.float32))
    target[torch.rand(N, generator=rng) < ignored] = -100
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    if bias:
        options["bias"] = torch.randn(V, generator=rng, dtype=torch.float64).to(dtype)
    return Problem(hidden, weight, target, behavior, cu_seqlens, options)


def random_blocks(
    lengths,
    counts: Tensor | None = None,  # (N,) bool, tokens that count; None: all
    *,
    seed: int = 0,
    longest: int = 4,
    without: float = 0.2,  # share of tokens without a log-ratio
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """(N,) block ids of sequences of these lengths, and nonsense at tokens that do not count."""
    rng = torch.Generator().manual_seed(seed + 5)
    ids = torch.full((sum(lengths),), -12345, dtype=dtype)
    begin = 0
    for length in lengths:
        token, id_ = begin, int(torch.randint(3, (), generator=rng))
        while token < begin + length:
            size = 1 + int(torch.randint(longest, (), generator=rng))
            ids[token : min(token + size, begin + length)] = id_
            token, id_ = token + size, id_ + 1 + int(torch.randint(4, (), generator=rng))
        begin += length
    ids[torch.rand(len(ids), generator=rng) < without] = -1
    return ids if counts is None else ids.masked_fill(~counts, -12345)


def make_policy_problem(
    lengths=(7, 1, 0, 12, 5), *, by_token: bool = False, ref: bool = False, sampler: bool = False, **options
) -> PolicyProblem:
    """`make_problem` with advantages of a number a sequence or a token, and with the log-probs of more policies."""
    problem = make_problem(lengths, **options)
    rng = torch.Generator().manual_seed(options.get("seed", 0) + 1)
    N, dtype = len(problem.target), problem.behavior_logprobs.dtype

    def near(logprobs: Tensor, noise: float) -> Tensor:
        return (logprobs + noise * torch.randn(N, generator=rng, dtype=torch.float64)).clamp(max=0).to(dtype)

    count = N if by_token else len(lengths)
    columns = {"advantages": torch.randn(count, generator=rng, dtype=torch.float64).to(dtype)}
    for name, is_there, noise in (("ref_logprobs", ref, 0.5), ("sampler_logprobs", sampler, 0.2)):
        if is_there:
            columns[name] = near(problem.behavior_logprobs, noise)
    return PolicyProblem(
        problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens,
        {**problem.options, **columns},
    )  # fmt: skip


def make_weighted_problem(lengths=(7, 1, 0, 12, 5), *, weighting: str = "tensor", **options) -> WeightedProblem:
    """`make_problem` with a named weighting, or with "tensor": weights of both signs; NaN wherever no token counts.

    "anchored" is "asft" with a reference model in memory.
    """
    problem = make_problem(lengths, **options)
    rng = torch.Generator().manual_seed(options.get("seed", 0) + 2)
    column = problem.behavior_logprobs.masked_fill(problem.target < 0, math.nan)
    if weighting == "tensor":
        columns = {"weights": column + torch.randn(len(column), generator=rng, dtype=column.dtype) + 3}
    elif weighting == "anchored":
        columns = {"weighting": "asft", "reference": make_distill_problem(lengths, **options).options["teacher"]}
    else:
        columns = {"weighting": weighting, "ref_logprobs": column}
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    return WeightedProblem(*tensors, {**problem.options, **columns})


def make_distill_problem(
    lengths=(7, 1, 0, 12, 5),
    *,
    top_k: int | None = None,  # ids of each token that the teacher is known by; None: its own head
    distill_temperature: float = 1.0,
    weighted: bool = True,  # by PEAR's G
    teacher_dim: int = 6,
    teacher_dtype: torch.dtype | None = None,
    teacher_bias: bool = False,
    teacher_head: dict | None = None,  # its temperature and softcap
    **options,
) -> DistillProblem:
    """`make_problem` with a teacher; at ignored tokens stands what would be an error or NaN elsewhere."""
    problem = make_problem(lengths, **options, distill_temperature=distill_temperature)
    rng = torch.Generator().manual_seed(options.get("seed", 0) + 3)
    N, V, dtype = len(problem.target), len(problem.weight), teacher_dtype or problem.hidden.dtype
    shapes = (N, teacher_dim), (V, teacher_dim), (V,)
    hidden, weight, bias = (torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes)
    head = {"bias": bias if teacher_bias else None, **(teacher_head or {})}
    ignored = problem.target < 0
    if top_k is None:
        hidden[ignored] = math.nan
        teacher = Teacher(hidden, weight, **head)
    else:
        logits = naive_logits(hidden.double(), weight.double(), **{**head, "bias": bias.double() * teacher_bias})
        top = torch.log_softmax(logits / distill_temperature, -1).topk(top_k)
        logprobs = top.values.to(torch.promote_types(dtype, torch.float32))
        teacher = TopKTeacher(
            top.indices.masked_fill(ignored[:, None], V + 5), logprobs.masked_fill(ignored[:, None], math.nan)
        )
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    if not weighted:
        tensors = *tensors[:3], None, tensors[4]
    return DistillProblem(*tensors, {**problem.options, "teacher": teacher})


def gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def assert_matches_naive(problem: Problem, tolerance: float = 1e-12, **overrides) -> None:
    """Loss, log-probs, weights and gradients. Tolerances are relative but where terms of both signs cancel."""
    out, leaves = problem.ours(**overrides)
    (loss, logprobs, *weights), exact_leaves = problem.naive(**overrides)  # no weights of a policy loss
    assert abs(out.loss.item() - loss.item()) < tolerance * max(abs(loss.item()), 0.1)
    torch.testing.assert_close(out.logprobs.double(), logprobs, rtol=tolerance, atol=tolerance)
    for exact in weights:
        torch.testing.assert_close(out.weights.double(), exact, rtol=20 * tolerance, atol=1e-3 * tolerance)
    pairs = zip(gradients(UPSTREAM * out.loss, leaves), gradients(UPSTREAM * loss, exact_leaves), strict=True)
    for ours, exact in pairs:
        assert (ours - exact).norm() <= tolerance * exact.norm()


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||, in float64."""
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def workspace(rows: int, V: int, itemsize: int = 8) -> int:
    """Bytes of a chunk of that many rows."""
    return rows * V * itemsize


def categorical(leaves: list[Tensor], target: Tensor, temperature=1.0, softcap=None) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from full logits by torch.distributions; leaves: hidden, weight and perhaps bias."""
    logits = torch.nn.functional.linear(*leaves)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    counts = target >= 0
    logprobs = distribution.log_prob(target.where(counts, 0))
    return logprobs.where(counts, 0.0), distribution.entropy().where(counts, 0.0)


def count_products(monkeypatch) -> dict[str, int]:
    """Rows through product 1 (logits), 2 (dX) and 3 (dW) of `backends.torch.head.Head`, counted from now on."""
    rows = {"logits": 0, "hidden": 0, "weight": 0}

    def counting(name, key, argument):
        original = getattr(Head, name)

        def counted(self, *args, **kwargs):
            rows[key] += len(args[argument])
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Head, name, counted)

    counting("_product", "logits", 0)
    counting("write_grad_hidden_", "hidden", 2)
    counting("add_grad_weight_", "weight", 1)
    return rows


def pear_objective(
    behavior, pack, options, reduction="mean", sequence_scale=None, block_ids=None, *, denominator=None,
    weights=PEARWeights,
):  # fmt: skip
    """PEAR's objective of `behavior` (n,) and `block_ids` (n,), with the weights of a backend."""
    scale = token_scale(pack, reduction, denominator, sequence_scale)
    return PEARObjective(weights(behavior, pack, options, block_ids, scale))


def op_arguments(name, columns, *options, dtype=torch.float32, return_entropy=False):
    """What a custom op takes of `columns` by name and of options: the list, the numbers and the spec."""
    given = {key: column for key, column in columns.items() if column is not None}
    spec, numbers = spec_and_numbers(name, given, dtype, (*options, CallOptions()), return_entropy)
    return list(given.values()), numbers, spec
