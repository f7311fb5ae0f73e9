"""How many tokens fit in the card's memory, forward and backward, with the naive loss and with ours?

Measured: the memory of two lengths says where the limit should lie, and from there tries that end in a loss or in an
out-of-memory error close in on it, to a 16th of itself.
"""

from collections.abc import Callable

import torch

from bench.cells import Cell
from bench.conftest import Unavailable, free, out_of_memory
from bench.measure import extra_memory
from bench.peers import PEERS
from bench.shapes import GPU_BASE, SHAPES, Shape, make_inputs

MULTIPLE, RESOLUTION = 256, 16
PROBES = (2048, 4096)


def cells(device: str, turns: int) -> list[Cell]:
    return [Cell("largest", f"N-{GPU_BASE}", peer, rank=7) for peer in ("naive", "pear-token") if device != "tiny"]


def test_largest(cell, record, inputs):
    with record(cell) as row:
        inputs.clear()  # the whole card is meant
        peer, shape = PEERS[cell.peer], SHAPES[cell.case.removeprefix("N-")]
        if reason := peer.unavailable(shape):
            raise Unavailable(reason)
        probes = [total_bytes(peer, shape._replace(tokens=tokens)) for tokens in PROBES]
        a_token = (probes[1] - probes[0]) / (PROBES[1] - PROBES[0])
        free()
        there = torch.cuda.mem_get_info()[0]
        guess = PROBES[1] + int((there - probes[1]) / a_token)
        row["tokens"] = close_in(guess, lambda tokens: fits(peer, shape._replace(tokens=tokens)))
        row["card_bytes"] = torch.cuda.mem_get_info()[1]


def close_in(guess: int, fits: Callable[[int], bool]) -> int:
    """A multiple of `MULTIPLE` that fits, with one that does not within a `RESOLUTION`-th above it.

    A good guess takes two tries; from a bad one the steps grow until the limit lies between two of them.
    """
    low, high = 0, None  # fits; does not
    step = guess // (2 * RESOLUTION)
    tokens = guess
    while high is None or high - low > max(high // RESOLUTION, MULTIPLE):
        tokens = max(tokens - tokens % MULTIPLE, MULTIPLE)
        if fits(tokens):
            low = tokens
        else:
            high = tokens
        if high is None:
            tokens = low + max(step, MULTIPLE)
        elif low == 0:
            tokens = high - max(step, MULTIPLE)
        else:
            tokens = (low + high) // 2
        step *= 2
    return low


def total_bytes(peer, shape: Shape) -> int:
    """Peak of one call, inputs and gradients included."""
    x = make_inputs(shape)
    peer.run(x)
    extra = extra_memory(peer, x, shape)
    return extra + torch.cuda.memory_allocated() + peer.gradient_bytes(shape)


def fits(peer, shape: Shape) -> bool:
    free()
    try:
        x = make_inputs(shape)
        peer.run(x)
        torch.cuda.synchronize()
    except Exception as error:
        if not out_of_memory(error):
            raise
        fitted = False
    else:
        fitted = True
    x = None
    free()
    return fitted
