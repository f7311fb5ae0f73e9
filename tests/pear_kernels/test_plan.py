"""pear_kernels.plan against calls that were counted: flops, visits to chunks, bytes."""

import itertools

import pytest
import torch
from problems import count_products, make_problem, pear_objective, workspace
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pear_kernels import linear_logprobs, linear_pear_loss, plan
from pear_kernels.backends.torch.head import Head
from pear_kernels.engine.head import triton_row_bytes
from pear_kernels.engine.packing import pack_tokens
from pear_kernels.engine.schedule import Wanted
from pear_kernels.engine.walk import Walk
from pear_kernels.objectives.base import FixedCoefficients
from pear_kernels.options import PEAROptions

PACKS = [(100,), (10, 100, 5), (100, 100, 100), (1,) * 60, (0, 3, 90, 0, 40, 7)]


def counted_walk(problem, level, wanted, workspace_bytes, static=False, **options):
    """(flops, chunks scored) of a walk, counted where the products are taken."""
    head = Head(problem.weight, None, 1.0, None, torch.float64)
    pack = pack_tokens(problem.target != -100, problem.cu_seqlens, static)
    behavior = pack.take(problem.behavior_logprobs)
    objective = pear_objective(behavior, pack, PEAROptions(level=level or "token", **options))
    if level is None:
        objective = FixedCoefficients(torch.ones(pack.tokens))
    scored, original = [], Walk.softmax

    class Watched(Walk):
        def softmax(self, begin, end, **options):
            scored.append((begin, end))
            return original(self, begin, end, **options)

    def in_place(into, a, b, out_shape=None, **_):  # which the counter leaves out by itself
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        Watched(problem.hidden, head, problem.target, pack, wanted, workspace_bytes).run(objective)
    return counter.get_total_flops(), tuple(scored)


@pytest.mark.parametrize("level", ["token", "block", "sequence"])
@pytest.mark.parametrize("gradient, train_head", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("D, rows", [(4, 20), (64, 20), (64, 400)])
def test_products_and_chunks_are_those_of_the_walk(level, gradient, train_head, D, rows):
    for lengths, static in itertools.product(PACKS, (False, True)):
        check_products_and_chunks(lengths, level, gradient, train_head, D, rows, static)


@pytest.mark.parametrize("options", [{"center": True}, {"normalize": "sequence"}, {"normalize": "batch"}])
@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("D, rows", [(4, 20), (64, 20)])
def test_products_and_chunks_where_weights_wait(options, train_head, D, rows):
    for lengths, static in itertools.product(PACKS, (False, True)):
        check_products_and_chunks(lengths, "token", True, train_head, D, rows, static, **options)


def check_products_and_chunks(lengths, level, gradient, train_head, D, rows, static, **options):
    problem = make_problem(lengths, D=D, V=37, ignored=0.0)
    budget = workspace(rows, 37)
    planned = plan(
        sum(lengths), 37, D, lengths=lengths, dtype=torch.float64, level=level, gradient=gradient,
        train_head=train_head, workspace_bytes=budget, static=static, device="cpu", **options,
    )  # fmt: skip
    wanted = Wanted(gradient, gradient and train_head, False)
    flops, scored = counted_walk(problem, level, wanted, budget, static, **options)
    assert planned.flops == flops == round(planned.products * 2 * sum(lengths) * 37 * D)
    assert planned.chunks == scored


def test_logprobs_are_one_product_and_four_with_a_gradient(monkeypatch):
    problem = make_problem((100,), ignored=0.0)
    rows = count_products(monkeypatch)
    options = dict(dtype=torch.float64, level=None, workspace_bytes=workspace(30, 37), device="cpu")
    linear_logprobs(problem.hidden, problem.weight, problem.target, workspace_bytes=workspace(30, 37))
    assert rows == plan(100, 37, 8, gradient=False, **options).rows == {"logits": 100, "hidden": 0, "weight": 0}
    rows.update(logits=0)
    leaves = problem.leaves()
    linear_logprobs(*leaves, problem.target, workspace_bytes=workspace(30, 37)).sum().backward()
    assert rows == plan(100, 37, 8, **options).rows == {"logits": 200, "hidden": 100, "weight": 100}


# ---- bytes


def measured(call) -> int:
    """Most bytes that tensors held at once during the call, beyond those before it, by PyTorch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "level, train_head, bias, tolerance",
    [
        ("token", True, True, 0.0), ("token", False, False, 0.0), ("sequence", True, False, 0.0),
        (None, True, False, 0.0), ("token", True, True, 0.1), (None, True, False, 0.1),
    ],
)  # fmt: skip
def test_peak_memory_on_a_cpu(level, train_head, bias, tolerance, dtype):
    lengths, V, D = (300, 900, 700, 100), 4000, 128
    problem = make_problem(lengths, V=V, D=D, dtype=dtype, ignored=0.0, bias=bias, softcap=9.0)
    workspace_bytes = workspace(512, V, 4)

    def call():
        leaves = problem.leaves()  # copies nothing
        leaves[1].requires_grad_(train_head)
        options = {"softcap": None if tolerance else 9.0, **({"bias": leaves[2]} if bias else {})}
        options["gradient_tolerance"] = tolerance
        if level is None:
            loss = linear_logprobs(*leaves[:2], problem.target, workspace_bytes=workspace_bytes, **options).sum()
        else:
            loss = linear_pear_loss(
                *leaves[:2], problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, level=level,
                workspace_bytes=workspace_bytes, **options,
            ).loss  # fmt: skip
        loss.backward()
        return leaves

    call()  # imports, and whatever is kept from the first call
    planned = plan(
        2000, V, D, lengths=lengths, dtype=dtype, level=level, train_head=train_head, bias=bias,
        workspace_bytes=workspace_bytes, device="cpu", gradient_tolerance=tolerance,
    )  # fmt: skip
    least = 0.4 if tolerance else 0.75  # the plan is for any head, and this one has no softcap
    assert least * planned.peak_bytes < (found := measured(call)) <= planned.peak_bytes, found


@pytest.mark.parametrize("gradient", [True, False])
def test_workspace_is_what_the_head_reserves(gradient):
    planned = plan(5000, 3001, 64, dtype=torch.float32, gradient=gradient, workspace_bytes=9 << 20, device="cpu")
    head = Head(torch.zeros(3001, 64), None, 1.0, None, torch.float32)
    rows = max(end - begin for begin, end in planned.chunks)
    head.reserve(rows, gradient)
    assert head.workspace.untyped_storage().nbytes() == planned.workspace_bytes <= 9 << 20
    assert head.row_bytes(gradient) * rows == planned.workspace_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(151936, 4096), (32003, 1024)])
def test_workspace_is_what_the_kernels_allocate(dtype, shape):
    triton_head = pytest.importorskip("pear_kernels.backends.triton.head", exc_type=ImportError)
    head = triton_head.Head(torch.empty(shape, dtype=dtype, device="meta"), None, 1.0, None, dtype)
    planned = plan(9000, *shape, dtype=dtype)
    rows = max(end - begin for begin, end in planned.chunks)
    if not torch.cuda.is_available():  # else the plan is for the GPU that is there
        assert head.row_bytes(True) * rows == planned.workspace_bytes
    head.reserve(rows, True)
    buffers = {id(t): t.untyped_storage().nbytes() for t in vars(head).values() if isinstance(t, torch.Tensor)}
    allocated = sum(buffers.values()) - head.weight.untyped_storage().nbytes()
    assert 0.9 * planned.workspace_bytes < allocated <= planned.workspace_bytes <= 1 << 30


@pytest.mark.skipif(torch.cuda.is_available(), reason="a plan is for the GPU that is there, the head here for an H100")
@pytest.mark.parametrize("product", [None, "fused", "plain"])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_variant_of_the_kernels_is_planned_as_the_head_runs_it(dtype, gradient, product, monkeypatch):
    """float16 has the plain variant for gradients alone, float32 for all, bfloat16 for gradients if it is asked for."""
    triton_head = pytest.importorskip("pear_kernels.backends.triton.head", reason="triton is not installed")
    if product is not None:
        monkeypatch.setenv("PEAR_KERNELS_PRODUCT", product)
    head = triton_head.Head(torch.empty(32001, 512, dtype=dtype, device="meta"), None, 1.0, None, dtype)
    planned = plan(9000, 32001, 512, dtype=dtype, gradient=gradient)
    rows = max(end - begin for begin, end in planned.chunks)
    assert head.row_bytes(gradient) * rows == planned.workspace_bytes


def test_triton_rows_hold_what_their_parts_sum_to():
    # 1000 columns: four tiles of three partial sums, 8 of padding; a row of dX in float32, x and scaled x
    assert triton_row_bytes(1000, 64, 2, gradient=True) == 1008 * 2 + 4 * 3 * 4 + 64 * (4 + 2 + 2)
    assert triton_row_bytes(1001, 64, 4, gradient=True) == 1008 * 4 + 4 * 3 * 4 + 64 * (4 + 4 + 4)
    assert triton_row_bytes(1001, 64, 2, gradient=True, plain=True) == 1008 * 4 + 4 * 3 * 4 + 64 * (4 + 2 + 2)
    assert triton_row_bytes(1001, 64, 2, gradient=False) == 4 * 3 * 4 + 64 * 2


def test_the_shape_of_the_targets():
    # 8192 tokens, V = 151936, D = 4096 in bf16 within 1.1 GiB beside the float32 dW (and dX), and 131072 likewise
    for tokens in (8192, 131072):
        planned = plan(tokens, 151936, 4096)
        assert planned.products == 3.0 and planned.flops == 3 * 2 * tokens * 151936 * 4096
        assert planned.grad_head_bytes == 4 * 151936 * 4096
        beside = planned.workspace_bytes + planned.temporary_bytes
        assert beside < 1.1 * 2**30
        grads = 4 * 151936 * 4096 + 2 * tokens * 4096  # dW waits in float32, and is rounded when the workspace is gone
        assert planned.peak_bytes == grads + max(beside, 2 * 151936 * 4096)
        rows = [end - begin for begin, end in planned.chunks]
        assert min(rows) >= 2048


def test_bytes_moved_by_hand():
    # two chunks of 128 rows, float32 on a CPU: W is read twice a chunk, E written and read twice, dW written and read
    V, D, R = 512, 16, 128
    planned = plan(2 * R, V, D, dtype=torch.float32, workspace_bytes=R * V * 4, device="cpu")
    logits = 2 * (V * D + R * D + R * V)
    of_hidden = 2 * (V * D + R * V + R * D)
    of_weight = 2 * (R * V + R * D) + V * D + 2 * V * D
    assert planned.bytes_moved == 4 * (logits + of_hidden + of_weight)


def test_the_table_shows_the_numbers():
    text = str(plan(8192, 151936, 4096, lengths=[4096, 4096], level="sequence", workspace_bytes=1 << 29))
    assert "sequence level: 8,192 tokens, vocabulary 151,936, hidden size 4,096, bfloat16, triton" in text
    assert "1 longer run scaled at its end, 1 longer run visited twice" in text
    rows = {line[:28].strip(): line[28:].split() for line in text.splitlines() if line[28:29] == " "}
    # chunks of 1408 rows: of the second sequence's 4096 all but the last chunk's 1408 have their logits made twice
    products = 3 + (4096 - 1408) / 8192
    assert rows["together"] == [f"{products:.2f}", f"{products * 2 * 8192 * 151936 * 4096 / 1e12:.3f}"]
    assert all(len(line) < 140 for line in text.splitlines())


def test_the_table_says_at_most_where_gradients_may_be_left_out():
    text = str(plan(2048, 49152, 576, gradient_tolerance=0.01, gradient_kept=0.2, device="cpu"))
    rows = {line[:28].strip(): line[28:].split() for line in text.splitlines() if line[28:29] == " "}
    assert rows["together, at most"][0] == "3.00" and rows["with 0.2 of gradients"][0] == "1.40"
    assert rows["with 0.2 of gradients"][1] == f"{1.4 * 2 * 2048 * 49152 * 576 / 1e12:.3f}"
    frozen = plan(2048, 49152, 576, level=None, train_head=False, gradient_kept=0.5)
    assert frozen.products_kept == 2.5 and "together, at most" in str(frozen)  # the logits twice, half of dX
    assert "together, at most" not in str(plan(2048, 49152, 576))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens": -1}, "tokens must be an integer of at least 0, got -1"),
        ({"tokens": 2.0}, "tokens must be an integer"),
        ({"vocabulary": 1}, "vocabulary must be an integer of at least 2, got 1"),
        ({"lengths": [3, 4]}, r"lengths must be 0 or more and sum to tokens = 8, got \[3, 4\], sum 7"),
        ({"lengths": [-1, 9]}, "lengths must be 0 or more"),
        ({"level": "document"}, "level must be None or one of 'token', 'block', 'sequence', got 'document'"),
        ({"level": "sequence", "center": True}, "center must be off at level 'sequence'"),
        ({"normalize": "mean"}, "normalize must be None or one of 'sequence', 'batch', got 'mean'"),
        ({"workspace_bytes": 0}, "workspace_bytes must be a positive integer"),
        ({"device": "tpu"}, 'device must be "cuda" or "cpu", got \'tpu\''),
        ({"backend": "jax"}, "backend must be 'triton' or 'torch'"),
        ({"gradient_kept": 1.5}, "gradient_kept must be None, or a number from 0 to 1, got 1.5"),
        ({"gradient_tolerance": 1.0}, "gradient_tolerance must be a number from 0 to below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"tokens": 8, "vocabulary": 10, "hidden_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_a_dtype_that_is_none_of_ours():
    with pytest.raises(TypeError, match="dtype must be torch.float32"):
        plan(8, 10, 4, dtype=torch.int8)
