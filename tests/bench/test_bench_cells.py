"""The plan of what is measured, and how: cases, rounds, input sets, the peers themselves."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bench import measure, runner
from bench.accuracy import Exact, make_inputs, relative
from bench.peers import FULL_PASS, PEERS, advantages_of, bare
from bench.report import OBJECTIVES_TO, OVER, POLICY_TO
from bench.shapes import GPU_BASE, SHAPES, Inputs, Shape
from bench.test_largest import MULTIPLE, RESOLUTION, close_in
from pear_kernels import Teacher
from pear_kernels.reference import naive_policy_loss

DEVICES = ("cuda", "cpu", "tiny")


@pytest.mark.parametrize("device", DEVICES)
def test_every_cell_is_there_once_and_its_ratios_have_a_denominator(device):
    cells = runner.all_cells(device, 5)
    assert Counter(map(str, cells)).most_common(1)[0][1] == 1
    assert {cell.peer for cell in cells} <= set(PEERS)
    measured = {(cell.case, cell.peer, cell.turn) for cell in cells if cell.question == "sweeps"}
    for case, _, turn in measured:
        assert SHAPES[case].device == ("cuda" if device == "cuda" else "cpu")
        assert (case, "bare", turn) in measured
    over = {(cell.case, cell.peer, cell.turn) for cell in cells if cell.question == "overheads"}
    for case, peer, turn in over:
        assert peer not in OVER or any((case, other, turn) in over for other in OVER[peer])
    policy = {(cell.case, cell.peer, cell.turn) for cell in cells if cell.question == "policy"}
    for case, _, turn in policy:
        assert device == "tiny" or {(case, other, turn) for other in POLICY_TO} <= policy
    objectives = {(cell.case, cell.peer, cell.turn) for cell in cells if cell.question == "objectives"}
    assert len(objectives) > 20
    for case, peer, turn in objectives:
        others = [other.get(peer) if isinstance(other, dict) else other for other in OBJECTIVES_TO.values()]
        assert {(case, other, turn) for other in others if other} <= objectives
    for question in ("policy", "objectives"):
        of_it = [cell for cell in cells if cell.question.startswith(question)]
        assert runner.all_cells(device, 5, [question]) == of_it


def test_what_the_targets_need_comes_first():
    """In at most a third of all cells, since a lease or a patience may end."""
    cells = runner.all_cells("cuda", 5)
    first = cells[: len(cells) // 3]
    assert {("sweeps", GPU_BASE), ("sweeps", "128k-4k-152k"), ("overheads", GPU_BASE)} <= {
        (cell.question, cell.case) for cell in first
    }
    assert {f"bf16-{kind}-cuda" for kind in ("random", "peaked", "unlikely", "far")} <= {cell.case for cell in first}


@given(st.floats(1e-5, 30.0))
def test_rounds_of_a_turn(seconds):
    """20 rounds of at least half of 30 ms, and fewer where that would take too long."""
    plan = measure.plan(seconds, "cuda")
    a_round = seconds * plan["iterations"]
    assert a_round > 0.6 * measure.ROUND_SECONDS
    assert plan["rounds"] == 20 or (3 <= plan["rounds"] and a_round * (plan["rounds"] + 1) > measure.TURN_SECONDS)


class Multiplications(TorchDispatchMode):
    """Of all matrix products; PyTorch's own counter stumbles over products with an out_dtype."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            a, b = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.total += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gradients, products", [("both", 3), ("hidden", 2), ("", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_products_are_as_many_as_they_say(gradients, products, dtype):
    """Counted on the shape of the targets, with the calls that a GPU would get."""
    N, D, V = SHAPES[GPU_BASE][:3]
    x = Inputs(
        torch.empty(N, D, dtype=dtype, device="meta"), torch.empty(V, D, dtype=dtype, device="meta"), *[None] * 3
    )
    with Multiplications() as counted:
        bare(x, gradients)
    assert counted.total == products * N * D * V
    states, head = (torch.empty(rows, D // 2, dtype=dtype, device="meta") for rows in (N, V))
    with Multiplications() as counted:
        bare(x._replace(teacher=Teacher(states, head)), gradients, taught=True)
    assert counted.total == (products + 0.5) * N * D * V


def test_own_timer_divides_a_round_by_its_calls():
    now = [0.0]

    def call():
        now[0] += 0.25

    benchmark = measure.Benchmark(lambda: now[0])
    benchmark.pedantic(call, rounds=4, iterations=8)
    assert benchmark.stats.stats.data == [0.25] * 4


@given(st.integers(0, 1 << 24), st.integers(1, 1 << 24))
def test_largest_closes_in_on_the_limit_from_any_guess(limit, guess):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= limit

    found = close_in(guess, fits)
    assert found == 0 or (found in tried and found <= limit)
    too_many = min(tokens for tokens in tried if tokens > limit)
    assert too_many - found <= max(too_many // RESOLUTION, MULTIPLE)


def test_a_good_guess_of_the_largest_takes_two_tries():
    tried = []
    assert close_in(8_000_000, lambda tokens: not tried.append(tokens) and tokens <= 8_100_000) > 7_500_000
    assert len(tried) == 2


CPU_PEERS = [name for name in FULL_PASS if name != "bare" and PEERS[name].unavailable(SHAPES["tiny"]) is None]
POLICY_PEERS = [name for name, peer in PEERS.items() if peer.policy and peer.unavailable(SHAPES["tiny"]) is None]


@pytest.mark.parametrize("name", [name for name in CPU_PEERS if name != "compiled"])  # compiling takes its time
def test_peers_compute_what_their_row_says(name):
    """The level in the list is the level that is timed: loss and gradients against float64."""
    x = make_inputs("random", Shape(96, 32, 257))
    loss = PEERS[name].run(x)
    for found, exact in zip((loss, x.hidden.grad, x.weight.grad), Exact(x).at(PEERS[name].level), strict=True):
        assert relative(found, exact) < 1e-4
    if PEERS[name].nll is not None:
        with torch.no_grad():
            losses = PEERS[name].nll(x.hidden, x.weight, x.target)
        assert relative(losses, -Exact(x).logprobs) < 1e-5


@pytest.mark.parametrize("name", POLICY_PEERS)
def test_policy_peers_compute_what_their_row_says(name):
    """Each library's loss is the one its row names, by the reference with full logits in float64."""
    x = make_inputs("random", Shape(96, 32, 257))
    bounds = torch.tensor([0, 17, 18, 64, 96], dtype=torch.int32)  # of unequal lengths: who pads must not count padding
    x = x._replace(cu_seqlens=bounds)
    loss = PEERS[name].run(x)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight))
    old, advantages = x.behavior_logprobs.double(), advantages_of(x).double()
    exact, _ = naive_policy_loss(hidden, weight, x.target, old, advantages, cu_seqlens=bounds, **PEERS[name].policy)
    exact.backward()
    for found, of in zip((loss, x.hidden.grad, x.weight.grad), (exact.detach(), hidden.grad, weight.grad), strict=True):
        assert relative(found, of) < 1e-4
