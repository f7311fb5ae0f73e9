"""Problems small enough for the interpreter, on the device where the kernels run, and how answers are compared.

Tiles are 16 rows by 32 columns by 16 of the hidden size there, so that these have several of each, none of them full.
"""

import pytest
import torch
from problems import Problem, gradients, make_problem, relative_error
from torch import Tensor

from pear_kernels.backends import choice as backend

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not backend.interpreting() else "cpu")
OBSTACLE = backend.triton_obstacle(DEVICE)
if OBSTACLE is not None:
    pytest.skip(f"the kernels do not run here: {OBSTACLE}", allow_module_level=True)

from pear_kernels.backends.triton.head import Head  # noqa: E402  (only now that triton is known to be there)

LEVELS = ["token", "block", "sequence"]
PRODUCTS = ["fused", "plain"]
LENGTHS = (9, 1, 0, 17, 5)
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "temperature": 1.6, "softcap": 7.0},
}
TOLERANCE = 5e-6  # relative, of float32 loss, log-probs and gradients


def on_device(problem: Problem) -> Problem:
    options = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in problem.options.items()}
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    moved = (tensor if tensor is None else tensor.to(DEVICE) for tensor in tensors)
    return type(problem)(*moved, {"backend": "triton", **options})


def kernel_problem(lengths=LENGTHS, *, D: int = 24, V: int = 75, dtype=torch.float32, **options) -> Problem:
    """A random problem whose `ours` runs on the kernels."""
    return on_device(make_problem(lengths, D=D, V=V, dtype=dtype, **options))


def naive(problem: Problem, **overrides):
    """`Problem.naive` without the options that only our loss has."""
    options = {name: v for name, v in problem.options.items() if name != "backend"}
    for name in ("backend", "workspace_bytes"):
        overrides.pop(name, None)
    tensors = problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens
    return type(problem)(*tensors, options).naive(**overrides)


def chunk_bytes(problem: Problem, rows: int, gradient: bool = True) -> int:
    """The workspace_bytes of chunks of that many rows."""
    return rows * Head(problem.weight, None, 1.0, None, problem.hidden.dtype).row_bytes(gradient)


def assert_matches_naive(problem: Problem, tolerance: float = TOLERANCE, **overrides) -> None:
    """Loss, log-probs, weights and gradients under an upstream gradient that is a tensor of its own.

    The error of the loss is relative to the sum of its terms' sizes: those of wrong answers cancel those of right ones.
    """
    out, leaves = problem.ours(**overrides)
    (loss, logprobs, weights), exact_leaves = naive(problem, **overrides)
    terms = weights * logprobs
    of_loss = tolerance * max(1.0, (terms.abs().sum() / terms.sum().abs()).nan_to_num(1.0).item())
    assert relative_error(out.loss, loss) < of_loss
    assert relative_error(out.logprobs, logprobs) < tolerance
    torch.testing.assert_close(out.weights.double(), weights, rtol=20 * tolerance, atol=0)
    upstream = torch.tensor(-3.7, device=DEVICE, requires_grad=True)  # the loss is one factor of many
    exact_upstream = upstream.detach().double().requires_grad_()
    grads = gradients(out.loss * upstream, [*leaves, upstream])
    expected = gradients(loss * exact_upstream, [*exact_leaves, exact_upstream])
    *of_leaves, of_upstream = [relative_error(ours, exact) for ours, exact in zip(grads, expected, strict=True)]
    assert max(of_leaves) < tolerance and of_upstream < of_loss


def hard_problem(kind: str, level: float, *, lengths=(12, 9, 12), D: int = 40, V: int = 101, dtype=torch.float32):
    """Targets that are `peaked` (1 - p = `level`) or `unlikely` (log(p / (1 - p)) = `level`), to float64's digits.

    Log-ratios lie mostly inside their clip, so that every error of a log-prob goes on along its suffix.
    """
    rng = torch.Generator().manual_seed(0)
    N = sum(lengths)
    weight = torch.randn(V, D, generator=rng) / D**0.5
    target = torch.randint(V, (N,), generator=rng)
    toward = weight[target] / weight[target].square().sum(1, keepdim=True)  # moves z_y by 1
    wanted = -torch.logit(torch.tensor(level, dtype=torch.float64)) if kind == "peaked" else level
    hidden = torch.randn(N, D, generator=rng).double()
    for _ in range(60):  # the push moves the other logits too
        hidden = hidden + (wanted - exact_logodds(hidden, weight.double(), target))[:, None] * toward
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    logodds = exact_logodds(hidden.double(), weight.double(), target)
    behavior = -torch.logaddexp(torch.zeros_like(logodds), -logodds) + 0.05 * torch.randn(N, generator=rng) + 0.01
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return on_device(Problem(hidden, weight, target, behavior.clamp(max=0).float(), bounds))


def exact_logodds(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log(p / (1 - p)) of the targets: 1 - p by its own sum, or 8 of 16 digits would be lost at 1 - p = 1e-8."""
    logits = hidden @ weight.T
    others = torch.logsumexp(logits.scatter(1, target[:, None], -torch.inf), 1)
    return logits.gather(1, target[:, None])[:, 0] - others


def exact_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logodds = exact_logodds(hidden, weight, target)
    return -torch.logaddexp(torch.zeros_like(logodds), -logodds)
