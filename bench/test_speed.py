"""How long do forward and backward take, beside the naive way, the bare products and the peers?

Rounds go around the peers (round 0 of all, then round 1 of all, ...), each round in another order, so that a slow
minute of the machine falls on everyone, and ratios are taken within a round. Round 0 warms up and counts for nothing.
CPU seconds of the process are kept beside the wall clock's: they do not count what a virtual machine's host takes away.
"""

import gc
import os
import time

import pytest
import torch

from bench.peers import PEERS
from bench.shapes import SHAPES, make_inputs

ROUNDS = 1 + int(os.environ.get("PEAR_BENCH_ROUNDS", 5))
CASES = ["cpu-4k"]
if torch.cuda.is_available():
    CASES += [name for name, shape in SHAPES.items() if shape.device == "cuda"]


def interleaved() -> list[tuple[str, int, str]]:
    names = list(PEERS)
    order = []
    for case in CASES:
        for turn in range(ROUNDS):
            shift = (5 * turn) % len(names)
            order += [(case, turn, name) for name in names[shift:] + names[:shift]]
    return order


@pytest.fixture(scope="module")
def inputs():
    """Inputs of one shape at a time; the previous ones go when the shape changes."""
    held = {}

    def of(case: str):
        if case not in held:
            held.clear()
            held[case] = make_inputs(SHAPES[case])
        return held[case]

    return of


@pytest.mark.parametrize("case, turn, peer", interleaved())
def test_forward_and_backward(benchmark, inputs, case, turn, peer):
    reason = PEERS[peer].unavailable(SHAPES[case])
    if reason:
        pytest.skip(reason)
    x = inputs(case)
    synchronize = torch.cuda.synchronize if SHAPES[case].device == "cuda" else lambda: None

    def before():
        x.clear()
        gc.collect()
        synchronize()

    def step():
        begin = time.process_time()
        PEERS[peer].run(x)
        synchronize()
        benchmark.extra_info["cpu_seconds"] = time.process_time() - begin

    benchmark.group = case
    benchmark.extra_info.update(case=case, turn=turn, peer=peer)
    benchmark.pedantic(step, setup=before, rounds=1, iterations=1)
    x.clear()
