"""The question "objectives": its peers, their inputs, a whole run on a tiny shape, and its report."""

import pytest
import torch

from bench import report, runner, shapes
from bench.accuracy import make_inputs, relative
from bench.cells import Cell
from bench.conftest import HeldInputs
from bench.objectives import BESIDE, FLOOR, right_of, weights_of
from bench.peers import FULL_PASS, PEERS
from bench.shapes import CPU_BASE, SHAPES, TOP_K, Inputs, Shape
from bench.store import Store
from pear_kernels import linear_pear_loss
from pear_kernels.reference import naive_distill_loss, naive_pear_loss, naive_weighted_loss

OBJECTIVE_PEERS = [name for name, peer in PEERS.items() if peer.objective]
FACTS = {"device": "cpu", "cpu": "some CPU", "threads": 2, "versions": "torch 0", "commit": "abc", "source": "0"}


def exact_objective(name: str, hidden: torch.Tensor, weight: torch.Tensor, x: Inputs) -> torch.Tensor:
    """By the reference with full logits, in float64."""
    inputs, packed = (hidden, weight, x.target), {"cu_seqlens": x.cu_seqlens}
    ref = x.behavior_logprobs.double()
    if name == "negatives":
        options = {"sequence_label": right_of(x), "logprob_floor": FLOOR}
        return naive_pear_loss(*inputs, ref, **packed, **options)[0]
    if name == "weights":
        return naive_weighted_loss(*inputs, weights_of(x), **packed)[0]
    if name == "top-k":
        return naive_distill_loss(hidden, weight, x.top_k, x.target)[0]
    if PEERS[BESIDE[name][0]].taught:
        return naive_distill_loss(hidden, weight, x.teacher, x.target, divergence=name)[0]
    return naive_weighted_loss(*inputs, weighting=name, ref_logprobs=ref, **packed)[0]


@pytest.mark.parametrize("name", OBJECTIVE_PEERS)
def test_objective_peers_compute_what_their_row_says(name):
    """Ours, the naive ones and other libraries', each with the loss and the gradients of its row."""
    peer = PEERS[name]
    if reason := peer.unavailable(SHAPES["tiny"]):
        pytest.skip(reason)
    assert name in BESIDE[peer.objective]
    x = make_inputs("random", Shape(96, 32, 257))
    x = x._replace(cu_seqlens=torch.tensor([0, 17, 18, 64, 96], dtype=torch.int32))
    x = x.taught() if peer.taught else x
    loss = peer.run(x)
    hidden, weight = (leaf.detach().double().requires_grad_() for leaf in (x.hidden, x.weight))
    exact = exact_objective(peer.objective, hidden, weight, x)
    exact.backward()
    for found, of in zip((loss, x.hidden.grad, x.weight.grad), (exact.detach(), hidden.grad, weight.grad), strict=True):
        assert relative(found, of) < 1e-4


def test_a_teacher_is_made_for_those_who_want_one_alone():
    """Its most likely tokens are those of its full logits, and no other input changes."""
    shape = Shape(2048 + 3, 32, 257)  # more rows than are made at a time
    x = shapes.make_inputs(shape)
    assert x.teacher is None and x.top_k is None
    taught = x.taught()
    assert taught.teacher.hidden.shape == (shape.tokens, 16)
    assert all(mine is other for mine, other in zip(x[:5], taught[:5], strict=True))
    full = torch.log_softmax(taught.teacher.hidden @ taught.teacher.weight.t(), 1)
    torch.testing.assert_close(taught.top_k.logprobs, full.sort(1, descending=True).values[:, :TOP_K])
    torch.testing.assert_close(full.gather(1, taught.top_k.ids), taught.top_k.logprobs)
    held = HeldInputs()
    assert held.of("tiny", PEERS["unweighted"])[0].teacher is None
    assert held.of("tiny", PEERS["distill-js"])[0].teacher is not None


def test_no_token_of_a_wrong_sequence_is_left_out():
    """Else its products would be, and the time would be too good."""
    x = shapes.make_inputs(SHAPES["tiny-pack-10"])
    labels, floor = right_of(x), FLOOR
    found = linear_pear_loss(*x[:4], cu_seqlens=x.cu_seqlens, sequence_label=labels, logprob_floor=floor)
    assert 0 < (~labels).sum() <= len(labels) / 4
    assert found.weights.count_nonzero() == len(x.target)


def test_peers_of_an_objective_are_in_no_other_question():
    assert not {*OBJECTIVE_PEERS, "bare-teacher"} & set(FULL_PASS)


def test_a_report_holds_each_against_its_own(tmp_path):
    """Time within a round and memory: beside the naive version of the same objective, and the bare products it has."""
    store = Store(tmp_path / "out", FACTS)
    seconds = {
        "bare": 1.0,
        "bare-teacher": 2.0,
        "unweighted": 1.25,
        "distill-js": 2.5,
        "naive-js": 5.0,
        "liger-dft": 3.0,
    }
    for turn in (1, 2, 3):
        for peer, took in seconds.items():
            store.finish(Cell("objectives", CPU_BASE, peer, turn), {"seconds": [turn * took], "cpu_seconds": [took]})
    for peer, extra in (("bare-teacher", 100), ("distill-js", 150), ("naive-js", 1500)):
        store.finish(Cell("objectives-memory", CPU_BASE, peer), {"bytes": extra << 20})
    told = (report.write(store, tmp_path / "results", [], "objectives") / "objectives.md").read_text()
    line = next(line for line in told.splitlines() if line.startswith("| ours, Jensen-Shannon |"))
    assert "| 150 | 1.50 | 0.10 | 1.250 | 2.000 | 0.500 | 1.250 | 2.000 | 0.500 |" in line
    line = next(line for line in told.splitlines() if line.startswith("| Liger fused, token-scaled |"))
    assert "|  |  |  | 3.000 | 2.400 |  | 3.000 | 2.400 |  |" in line
    assert "## Targets" not in told


@pytest.mark.slow
def test_a_tiny_run(tmp_path, monkeypatch):
    """Every cell, in the processes that measure; these take the caller's number of threads, not the environment's."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads() + 1))
    done = runner.measure_all("tiny", tmp_path / "out", turns=2, questions=["objectives"])
    assert done.left == [] and done.errors == []
    measured = [row for row in done.store.rows.values() if "seconds" in row]
    assert len(measured) == 2 * len({row["peer"] for row in measured}) > 40
    assert done.store.rows["objectives-memory/tiny/distill-top-k/1"]["bytes"] > 0
    told = (report.write(done.store, tmp_path, done.left, "objectives") / "objectives.md").read_text()
    assert all(
        PEERS[name].label in told for name in OBJECTIVE_PEERS if PEERS[name].package in ("torch", "pear-kernels")
    )
