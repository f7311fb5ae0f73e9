"""Tensors as they come: transposed, strided, expanded, at odd addresses. None changes a result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Problem, gradients, make_problem

from pear_kernels import linear_logprobs, linear_pear_loss, pear_weights
from pear_kernels.backends import choice as backend
from pear_kernels.reference import naive_pear_loss

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON_RUNS = backend.triton_obstacle(HERE) is None
BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(not TRITON_RUNS, reason="needs a GPU for the kernels, or TRITON_INTERPRET=1"),
    ),
]
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of searchsorted, that a copy costs time


def transposed(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, its dimensions in memory the other way round."""
    return x.mT.contiguous().mT if x.dim() > 1 else x


def strided(x: torch.Tensor) -> torch.Tensor:
    """Every third number of a longer row, from its second on."""
    longer = x.new_empty(*x.shape[:-1], 3 * x.shape[-1] + 1)
    longer[..., 1::3] = x
    return longer[..., 1::3]


def rows_apart(x: torch.Tensor) -> torch.Tensor:
    """Rows that stand further apart than they are long, as after a slice of a wider matrix."""
    if x.dim() == 1:
        return strided(x)
    wider = x.new_empty(*x.shape[:-1], x.shape[-1] + 3)
    wider[..., 2:-1] = x
    return wider[..., 2:-1]


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but beginning one number after an address that kernels like."""
    flat = x.new_empty(x.numel() + 1)
    flat[1:] = x.reshape(-1)
    return flat[1:].view(x.shape)


def expanded(x: torch.Tensor) -> torch.Tensor:
    """One row for all, of stride 0. (Changes the numbers.)"""
    return x[:1].expand(x.shape)


KEEP = [torch.clone, transposed, strided, rows_apart, misaligned]
ANY = [*KEEP, expanded]
LAYOUTS = st.fixed_dictionaries(
    {name: st.sampled_from(ANY) for name in ("hidden", "weight", "bias", "target", "behavior", "scale")}
    | {"bounds": st.sampled_from(KEEP)}
)


def laid_out(problem: Problem, layouts: dict) -> dict:
    """linear_pear_loss's arguments, each with its layout; hidden, weight and bias are leaves."""
    leaves = dict(hidden=problem.hidden, weight=problem.weight, bias=problem.options["bias"])
    scale = torch.linspace(0.5, 2.0, problem.cu_seqlens.numel() - 1)
    others = dict(target=problem.target, behavior=problem.behavior_logprobs, bounds=problem.cu_seqlens, scale=scale)
    tensors = {name: layouts[name](tensor.to(HERE)) for name, tensor in (leaves | others).items()}
    return tensors | {name: tensors[name].detach().requires_grad_() for name in leaves}


def check(which: str, layouts: dict, level: str, dtype: torch.dtype, rtol: float) -> None:
    problem = make_problem((7, 1, 0, 12, 5), D=16, V=37, dtype=dtype, bias=True)
    tensors = laid_out(problem, layouts)
    leaves = [tensors[name] for name in ("hidden", "weight", "bias")]
    hidden, weight, bias = leaves
    target, behavior, bounds = tensors["target"], tensors["behavior"], tensors["bounds"]
    options = dict(cu_seqlens=bounds, sequence_scale=tensors["scale"], level=level)
    out = linear_pear_loss(
        hidden, weight, target, behavior, bias=bias, workspace_bytes=9 * 37 * 8, backend=which, **options
    )
    grads = gradients(out.loss, leaves)

    exact = [leaf.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_() for leaf in leaves]
    options |= dict(sequence_scale=tensors["scale"].double())
    loss, logprobs, weights = naive_pear_loss(*exact[:2], target, behavior.double(), bias=exact[2], **options)
    close = dict(rtol=rtol, atol=rtol, check_dtype=False)
    torch.testing.assert_close([out.loss, out.logprobs, out.weights], [loss, logprobs, weights], **close)
    torch.testing.assert_close(grads, gradients(loss, exact), **close)

    # log-probs and weights by themselves; the upstream gradient of a sum is expanded, too
    alone, entropy = linear_logprobs(hidden, weight, target, bias=bias, return_entropy=True, backend=which)
    torch.testing.assert_close(alone, logprobs, **close)
    ours = gradients((alone + entropy).sum(), leaves)
    logits = torch.nn.functional.linear(*exact)
    distribution = torch.distributions.Categorical(logits=logits)
    counts = target >= 0
    both = (distribution.log_prob(target.where(counts, 0)) + distribution.entropy())[counts].sum()
    torch.testing.assert_close(ours, gradients(both, exact), **close)
    scores = layouts["bounds"](alone.detach())
    g = pear_weights(scores, behavior, counts, cu_seqlens=bounds, level=level, backend=which)
    torch.testing.assert_close(g, weights, **close)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("layout", ANY)
def test_all_in_one_layout(which, layout):
    layouts = dict.fromkeys(("hidden", "weight", "bias", "target", "behavior", "scale"), layout)
    check(which, layouts | {"bounds": layout if layout in KEEP else torch.clone}, "token", torch.float32, 2e-5)


@settings(max_examples=25, deadline=None)
@given(layouts=LAYOUTS, level=st.sampled_from(["token", "block", "sequence"]))
def test_any_mixture(layouts, level):
    check("torch", layouts, level, torch.float64, 1e-11)


@pytest.mark.skipif(not TRITON_RUNS, reason="needs a GPU for the kernels, or TRITON_INTERPRET=1")
@settings(max_examples=8, deadline=None)
@given(layouts=LAYOUTS, level=st.sampled_from(["token", "block", "sequence"]))
def test_any_mixture_on_the_kernels(layouts, level):
    check("triton", layouts, level, torch.float32, 2e-5)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("layout", ANY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_any_layout_equals_contiguous_copies(which, layout, dtype):
    problem = make_problem((9, 14), D=16, V=37, dtype=dtype, bias=True)
    layouts = dict.fromkeys(("hidden", "weight", "bias", "target", "behavior", "scale"), layout)
    tensors = laid_out(problem, layouts | {"bounds": torch.clone})
    results = []
    for copy in (lambda x: x, lambda x: x.detach().clone(memory_format=torch.contiguous_format)):
        leaves = [copy(tensors[name]).detach().requires_grad_() for name in ("hidden", "weight", "bias")]
        out = linear_pear_loss(
            *leaves[:2], copy(tensors["target"]), copy(tensors["behavior"]), bias=leaves[2],
            cu_seqlens=tensors["bounds"], backend=which,
        )  # fmt: skip
        results.append([out.loss, out.logprobs, *gradients(out.loss, leaves)])
    # a product may sum in another order, after which a number may round the other way
    torch.testing.assert_close(*results, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_a_batch_that_is_transposed(which):
    """(B, T, D) out of a model that computes (T, B, D)."""
    problem = make_problem((6, 6), D=16, dtype=torch.float32)
    hidden, weight, target, behavior = (
        tensor.to(HERE) for tensor in (problem.hidden, problem.weight, problem.target, problem.behavior_logprobs)
    )
    time_first = hidden.view(2, 6, 16).transpose(0, 1).contiguous()
    out = linear_pear_loss(
        time_first.transpose(0, 1), weight, target.view(2, 6).t().contiguous().t(), behavior.view(2, 6), backend=which
    )
    (loss, logprobs, weights), _ = problem.naive()
    ours = [out.loss.cpu(), out.logprobs.flatten().cpu(), out.weights.flatten().cpu()]
    torch.testing.assert_close(ours, [loss, logprobs, weights], rtol=2e-5, atol=2e-5, check_dtype=False)
