"""Everything again on a GPU, and what only a GPU can show. Run with `pytest -m gpu` on a machine that has one."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from problems import (
    Problem,
    gradients,
    make_distill_problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
    random_blocks,
    relative_error,
    workspace,
)

from pear_kernels import linear_logprobs, linear_pear_loss, pear_weights
from pear_kernels.backends import choice as backend
from pear_kernels.objectives.weighted import WEIGHTINGS
from pear_kernels.options import DIVERGENCES
from pear_kernels.reference import naive_logprobs, naive_pear_loss

GPU = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch.cuda.is_available() is False"),
]
LEVELS = ["token", "block", "sequence"]
LENGTHS = (40, 1, 0, 90, 30)


def kernels_run() -> bool:
    return torch.cuda.is_available() and backend.triton_obstacle(torch.device("cuda", 0)) is None


BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not kernels_run(), reason="the kernels do not run on this GPU")),
]
only_kernels = pytest.mark.skipif(not kernels_run(), reason="the kernels do not run on this GPU")


@pytest.fixture(autouse=True)
def exact_float32():
    """No tf32 in float32 products; and no memory of earlier tests held."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(precision)
    torch.cuda.empty_cache()


def on_gpu(problem: Problem) -> Problem:
    def moved(value):
        if isinstance(value, tuple):  # a teacher, or two numbers
            parts = [moved(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
        return value.to(GPU) if isinstance(value, torch.Tensor) else value

    tensors = (problem.hidden, problem.weight, problem.target, problem.behavior_logprobs, problem.cu_seqlens)
    options = {name: moved(value) for name, value in problem.options.items()}
    return type(problem)(*map(moved, tensors), options)


def random_problem(N: int, V: int, D: int, dtype=torch.bfloat16, ignored: float = 0.0) -> Problem:
    """One made on the GPU, too large for a float64 answer. Logits of a few units, p_y of about 1 / V."""
    rng = torch.Generator(GPU).manual_seed(0)
    hidden = torch.randn(N, D, generator=rng, device=GPU, dtype=dtype)
    weight = torch.randn(V, D, generator=rng, device=GPU, dtype=dtype).div_(D**0.5)
    target = torch.randint(V, (N,), generator=rng, device=GPU)
    target[torch.rand(N, generator=rng, device=GPU) < ignored] = -100
    behavior = -torch.full((N,), float(V), device=GPU).log()
    return Problem(hidden, weight, target, behavior, torch.tensor([0, N // 3, N], dtype=torch.int32, device=GPU))


def naive_error(problem: Problem) -> list[float]:
    """Relative errors of log-probs, dX, dW of the naive loss on full logits in the problem's own dtype."""
    (exact, exact_logprobs, _), exact_leaves = problem.naive()
    leaves = problem.leaves()
    options = {**problem.options, "cu_seqlens": problem.cu_seqlens}
    if "bias" in options:
        options["bias"] = leaves[2]
    loss, logprobs, _ = naive_pear_loss(*leaves[:2], problem.target, problem.behavior_logprobs, **options)
    errors = [relative_error(logprobs, exact_logprobs)]
    pairs = zip(gradients(loss, leaves), gradients(exact, exact_leaves), strict=True)
    return errors + [relative_error(ours, theirs) for ours, theirs in pairs]


# ---- values and gradients


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 8.0, "temperature": 0.7}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_matches_the_naive_loss(which, level, head, dtype, tolerance):
    problem = on_gpu(make_problem(LENGTHS, V=301, D=64, dtype=dtype, level=level, **head))
    for rows in (33, None):
        out, leaves = problem.ours(backend=which, workspace_bytes=rows and workspace(rows, 301))
        (loss, logprobs, weights), exact_leaves = problem.naive()
        assert relative_error(out.loss, loss) < tolerance
        assert relative_error(out.logprobs, logprobs) < tolerance
        assert relative_error(out.weights, weights) < 10 * tolerance
        for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
            assert relative_error(ours, exact) < tolerance


OF_BLOCKS = {
    "blocks": {},
    "blocks, clipped and centred": {"clip_blocks": True, "center": True, "clip_length": 30},
    "blocks, normalised by sequence": {"normalize": "sequence"},
    "blocks, normalised": {"clip_blocks": True, "normalize": "batch"},
}
OBJECTIVES = {
    **{
        name: lambda options=options, **more: make_problem(
            LENGTHS, level="block", block_ids=random_blocks(LENGTHS), **options, **more
        )
        for name, options in OF_BLOCKS.items()
    },
    **{name: lambda name=name, **more: make_weighted_problem(LENGTHS, weighting=name, **more) for name in WEIGHTINGS},
    "weights": lambda **more: make_weighted_problem(LENGTHS, **more),
    **{
        f"{kind}, {top_k or 'in memory'}": lambda kind=kind, top_k=top_k, **more: make_distill_problem(
            LENGTHS, divergence=kind, top_k=top_k, distill_temperature=1.5, nll_coef=0.3, **more
        )
        for kind in DIVERGENCES
        for top_k in (None, 5)
    },
    "wrong": lambda **more: make_problem(
        LENGTHS, sequence_label=torch.tensor([False, True, False, True, False]), logprob_floor=-8.0, **more
    ),
    **{
        f"{name}, entropy": lambda name=name, **more: make_policy_problem(
            LENGTHS, objective=name, entropy_coef=0.1, **more
        )
        for name in ("grpo", "gspo")
    },
}


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_objective_matches_its_naive_loss(which, objective, dtype, tolerance):
    problem = on_gpu(OBJECTIVES[objective](V=301, D=64, dtype=dtype, bias=True, softcap=8.0, temperature=0.7))
    for rows in (33, None):
        out, leaves = problem.ours(backend=which, workspace_bytes=rows and workspace(rows, 301))
        (loss, logprobs, *_), exact_leaves = problem.naive()
        assert abs(out.loss.item() - loss.item()) < tolerance * max(abs(loss.item()), 0.1)
        assert relative_error(out.logprobs, logprobs) < tolerance
        for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
            assert relative_error(ours, exact) < tolerance


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_the_naive_error(which, level, dtype):
    problem = on_gpu(make_problem(LENGTHS, V=1003, D=128, dtype=dtype, level=level, bias=True))
    problem.weight.mul_(0.1)  # logits of a size that half precision can tell apart
    problem.behavior_logprobs = naive_logprobs(
        problem.hidden.double(), problem.weight.double(), problem.target, bias=problem.options["bias"].double()
    ).float() - 0.05  # fmt: skip
    limits = naive_error(problem)
    (loss, logprobs, _), exact_leaves = problem.naive()
    out, leaves = problem.ours(backend=which, workspace_bytes=workspace(33, 1003))
    errors = [relative_error(out.logprobs, logprobs)]
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert ours.dtype == dtype
        errors.append(relative_error(ours, exact))
    for error, limit in zip(errors, limits, strict=True):
        assert error <= 2 * limit


@only_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_the_backends_agree(level, dtype, tolerance):
    problem = on_gpu(make_problem((700, 3, 1500), V=5003, D=256, dtype=dtype, level=level))
    problem.weight.mul_(0.1)
    problem.behavior_logprobs.fill_(-5.0)
    results = []
    for which in ("torch", "triton"):
        out, leaves = problem.ours(backend=which, workspace_bytes=workspace(512, 5003, 4))
        results.append([out.loss, out.logprobs, out.weights, *gradients(out.loss, leaves)])
    for ours, other in zip(*results, strict=True):
        assert relative_error(ours, other) < tolerance


@pytest.mark.parametrize("which", BACKENDS)
def test_log_probs_and_entropy_with_gradients(which):
    problem = on_gpu(make_problem(LENGTHS, V=301, D=64, dtype=torch.float32, bias=True))
    leaves, exact_leaves = problem.leaves(), problem.leaves(torch.float64)
    ours = linear_logprobs(*leaves[:2], problem.target, bias=leaves[2], return_entropy=True, backend=which)
    counts = problem.target >= 0
    distribution = torch.distributions.Categorical(logits=torch.nn.functional.linear(*exact_leaves))
    exact = [distribution.log_prob(problem.target.where(counts, 0)), distribution.entropy()]
    exact = [values.where(counts, 0.0) for values in exact]
    upstream = torch.randn(2, len(counts), device=GPU, generator=torch.Generator(GPU).manual_seed(0))
    for ours_of, exact_of in zip(ours, exact, strict=True):
        assert relative_error(ours_of, exact_of) < 5e-6
    grads = torch.autograd.grad(ours, leaves, tuple(upstream))
    expected = torch.autograd.grad(exact, exact_leaves, tuple(upstream.double()))
    for grad, exact_grad in zip(grads, expected, strict=True):
        assert relative_error(grad, exact_grad) < 2e-5


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_weights_of_long_and_short_sequences(which, level):
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 70_000, 0, 3, 4096, 4097, 1])
    N = int(lengths.sum())
    logprobs, behavior = (-torch.rand(2, N, generator=rng)).unbind()
    mask = torch.rand(N, generator=rng) < 0.8
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    # sums of a long sequence leave the clip of log G unless ratios nearly cancel
    options = dict(level=level, gamma=0.9999, log_ratio_clip=(-0.02, 0.02), log_weight_clip=(-30.0, 30.0))
    exact = pear_weights(logprobs.double(), behavior.double(), mask, cu_seqlens=bounds, **options)
    moved = (tensor.to(GPU) for tensor in (logprobs, behavior, mask))
    ours = pear_weights(*moved, cu_seqlens=bounds.to(GPU), backend=which, **options)
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=2e-5, atol=0)


# ---- shapes


@only_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [2, 3, 17, 127, 128, 129, 255, 257, 1000, 4099])
@pytest.mark.parametrize("D", [8, 24, 72, 136])
def test_vocabularies_and_hidden_sizes_of_any_remainder(V, D, dtype):
    problem = on_gpu(make_problem((37, 100), V=V, D=D, dtype=dtype))
    problem.weight.mul_(0.3)
    problem.behavior_logprobs.fill_(-1.0)
    (loss, logprobs, _), exact_leaves = problem.naive()
    out, leaves = problem.ours(backend="triton")
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    assert (out.logprobs <= 0).all()
    assert relative_error(out.logprobs, logprobs) < tolerance
    for ours, exact in zip(gradients(out.loss, leaves), gradients(loss, exact_leaves), strict=True):
        assert relative_error(ours, exact) < tolerance


@only_kernels
@pytest.mark.parametrize("N, V, D", [(300, 300_000, 64), (16_384, 152_064, 64)])
def test_large_vocabularies(N, V, D):
    """Against the log-probs of float32 products, taken in slices; the second's logits number more than 2^31."""
    problem = random_problem(N, V, D)
    logprobs = linear_logprobs(problem.hidden, problem.weight, problem.target, backend="triton")
    for rows in (slice(0, 100), slice(N - 100, N)):
        exact = naive_logprobs(problem.hidden[rows].double(), problem.weight.double(), problem.target[rows])
        torch.testing.assert_close(logprobs[rows].double(), exact, rtol=0, atol=5e-4)


@only_kernels
def test_a_workspace_of_more_than_two_to_the_31_elements():
    """One chunk whose offsets need int64; the same in small chunks, whose offsets do not."""
    N, V, D = 16_384, 152_064, 64
    needed = 3 * N * V * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory on the GPU")
    problem = random_problem(N, V, D)
    results = []
    for workspace_bytes in (2 * N * V * 2, 512 << 20):
        out, leaves = problem.ours(backend="triton", workspace_bytes=workspace_bytes)
        results.append([out.loss, out.logprobs, *gradients(out.loss, leaves)])
        del out, leaves
    for one, many in zip(*results, strict=True):
        assert relative_error(one, many) < 5e-3


# ---- what a training step relies on


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitwise_repeatable(which, level, dtype):
    problem = on_gpu(make_problem((500, 1, 800), V=3001, D=128, dtype=dtype, level=level, bias=True))
    problem.target[::3] = 5  # many tokens share a row of dW, which an atomic addition would reach in any order
    runs = []
    for _ in range(3):
        out, leaves = problem.ours(backend=which, workspace_bytes=workspace(256, 3001, 4))
        runs.append([out.loss, out.logprobs, out.weights, *gradients(out.loss, leaves)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    "level, of_blocks, waits",
    [("token", None, 1), ("block", None, 1), ("sequence", None, 2)]
    + [("block", name, 1 + ("centred" in name or "by sequence" in name)) for name in OF_BLOCKS],
)
def test_the_host_waits_for_the_pack_alone(which, level, of_blocks, waits):
    """Once for the number of tokens that count; where weights wait for their sequence also for the lengths of all."""
    options = {} if of_blocks is None else dict(OF_BLOCKS[of_blocks], block_ids=random_blocks((500, 1, 800)))
    problem = on_gpu(make_problem((500, 1, 800), V=301, D=64, dtype=torch.float32, level=level, **options))

    def step():
        out, leaves = problem.ours(
            backend=which, workspace_bytes=workspace(256, 301, 4), denominator=3.0,
            sequence_scale=torch.ones(3, device=GPU),
        )  # fmt: skip
        out.loss.backward()

    step()  # kernels are loaded, which may wait
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    messages = [str(warning.message) for warning in caught if "a synchronizing" in str(warning.message)]
    assert len(messages) <= waits, messages


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(
    "level, of_blocks", [*((level, None) for level in LEVELS), *(("block", name) for name in OF_BLOCKS)]
)
def test_a_captured_cuda_graph_follows_its_inputs(which, level, of_blocks):
    first, second = (
        on_gpu(make_problem((90, 38), V=301, D=64, dtype=torch.float32, level=level, seed=seed)) for seed in (0, 1)
    )
    held = [leaf.detach().clone().requires_grad_() for leaf in first.leaves()]
    target, behavior = first.target.clone(), first.behavior_logprobs.clone()
    options = {} if of_blocks is None else dict(OF_BLOCKS[of_blocks], block_ids=random_blocks((90, 38)).to(GPU))

    def step():
        out = linear_pear_loss(
            *held, target, behavior, cu_seqlens=first.cu_seqlens, level=level, backend=which,
            workspace_bytes=workspace(64, 301, 4), **options,
        )  # fmt: skip
        return [out.loss, out.logprobs, out.weights, *out.stats.values(), *torch.autograd.grad(out.loss, held)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for problem in (second, first):  # which ignore different tokens, and different numbers of them
        with torch.no_grad():
            for kept, new in zip(held, problem.leaves(), strict=True):
                kept.copy_(new)
            target.copy_(problem.target)
            behavior.copy_(problem.behavior_logprobs)
        graph.replay()
        replayed = [result.clone() for result in results]
        for captured, eager in zip(replayed, step(), strict=True):
            torch.testing.assert_close(captured, eager, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("which", BACKENDS)
def test_compile_keeps_one_graph(which):
    problem = on_gpu(make_problem(LENGTHS, V=301, D=64, dtype=torch.float32))

    def loss(hidden, weight):
        out = linear_pear_loss(
            hidden * 1.5, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens,
            backend=which,
        )  # fmt: skip
        logprobs = linear_logprobs(hidden, weight, problem.target, backend=which)
        g = pear_weights(logprobs, problem.behavior_logprobs, problem.target >= 0, backend=which)
        return 2 * out.loss - (g * logprobs).mean()

    torch._dynamo.reset()
    leaves, compiled_leaves = problem.leaves(), problem.leaves()
    value = loss(*leaves)
    compiled = torch.compile(loss, fullgraph=True)(*compiled_leaves)
    torch.testing.assert_close(compiled, value, rtol=1e-5, atol=1e-6)
    grads = gradients(compiled, compiled_leaves), gradients(value, leaves)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


# ---- memory


@only_kernels
@pytest.mark.parametrize("level", LEVELS)
def test_peak_memory_of_a_large_pass(level):
    """16k tokens of a 152k vocabulary in bf16: the workspace, the gradients that are asked for, and little else."""
    N, V, D = 16_384, 151_936, 1024
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GiB of free memory on the GPU")
    problem = random_problem(N, V, D)
    budget = 1 << 30
    leaves = [problem.hidden.requires_grad_(), problem.weight.requires_grad_()]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_pear_loss(
        *leaves, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, level=level,
        workspace_bytes=budget, backend="triton",
    )  # fmt: skip
    torch.cuda.synchronize()
    made = torch.cuda.max_memory_allocated() - before
    allowed = budget + 4 * V * D + 2 * N * D  # dW in float32, dX in bfloat16
    if level == "sequence":  # two sequences longer than a chunk, the second with a dW of its own if it fits
        allowed += 4 * V * D
    assert made <= 1.1 * allowed
    assert out.loss.isfinite()


@pytest.mark.parametrize("which", BACKENDS)
def test_out_of_memory_says_what_to_lower(which):
    problem = random_problem(4096, 50_000, 64, dtype=torch.float32)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (256 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="workspace of up to 4096.0 MiB .lower it: workspace_bytes"):
            problem.ours(backend=which, workspace_bytes=4 << 30)
        out, _ = problem.ours(backend=which, workspace_bytes=32 << 20)
        assert out.loss.isfinite()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# ---- bad input


BAD_VALUE = """
import torch
from pear_kernels import linear_pear_loss
hidden, weight = torch.randn(6, 8, device="cuda"), torch.randn(9, 8, device="cuda")
values = dict(target=torch.arange(6, device="cuda"), behavior_logprobs=-torch.ones(6, device="cuda"))
values.update({changes})
linear_pear_loss(hidden, weight, **values, backend={which!r})
torch.cuda.synchronize()
print("went on")
"""
BAD_VALUES = {
    "target": "target=torch.full((6,), 9, device='cuda')",
    "behavior_logprobs": "behavior_logprobs=torch.full((6,), float('nan'), device='cuda')",
    "cu_seqlens": "cu_seqlens=torch.tensor([0, 4], device='cuda')",
    "denominator": "denominator=torch.zeros((), device='cuda')",
    "block_ids": "block_ids=torch.tensor([0, 1, 2, 1, 3, 4], device='cuda'), level='block'",
}


def run_apart(which: str, changes: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, whose GPU a failed assert ends."""
    code = BAD_VALUE.replace("{changes}", f"dict({changes})").replace("{which!r}", repr(which))
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", BAD_VALUES)
def test_bad_values_are_refused_on_the_device_by_name(which, name):
    run = run_apart(which, BAD_VALUES[name])
    assert run.returncode != 0 and "went on" not in run.stdout
    assert f"pear_kernels: {name} must" in run.stdout + run.stderr


@pytest.mark.parametrize("which", BACKENDS)
def test_checks_of_values_can_be_switched_off(which):
    run = run_apart(which, BAD_VALUES["behavior_logprobs"], PEAR_KERNELS_CHECK_VALUES="0")
    assert run.returncode == 0 and "went on" in run.stdout, run.stderr


def test_mixed_devices_are_refused_by_name():
    problem = on_gpu(make_problem(dtype=torch.float32))
    with pytest.raises(ValueError, match="target must be on the device of the other arguments, cuda:0, got cpu"):
        linear_pear_loss(problem.hidden, problem.weight, problem.target.cpu(), problem.behavior_logprobs)
