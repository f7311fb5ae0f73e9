"""How exact are log-probs, loss, dX and dW, for float32 and bf16 inputs, against float64?"""

import functools

import torch

from bench.accuracy import KINDS, SHAPE, Exact, make_inputs, relative, rms
from bench.cells import Cell
from bench.conftest import Unavailable
from bench.peers import FULL_PASS, PEERS
from bench.shapes import SHAPES

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def cells(device: str, turns: int) -> list[Cell]:
    peers = ["naive", "pear-token", "liger"] if device == "tiny" else [name for name in FULL_PASS if name != "bare"]
    where = "" if device == "cpu" else f"-{device}"
    cases = [(f"{dtype}-{kind}{where}", 2 if dtype == "bf16" else 3) for dtype in DTYPES for kind in KINDS]
    return [Cell("accuracy", case, peer, rank=rank) for case, rank in cases for peer in peers]


@functools.lru_cache(maxsize=1)
def problem(case: str):
    """Inputs of a case, what is exact for them, and a place for what that is at each level."""
    dtype, kind, *where = case.split("-")
    shape = {"tiny": SHAPES["tiny"], "cuda": SHAPE._replace(device="cuda")}[where[0]] if where else SHAPE
    x = make_inputs(kind, shape._replace(dtype=DTYPES[dtype]))
    exact = Exact(x)
    return x, exact, functools.cache(exact.at), shape._replace(dtype=DTYPES[dtype])


def test_errors(cell, record):
    with record(cell) as row:
        x, exact, exact_at, shape = problem(cell.case)
        peer = PEERS[cell.peer]
        if reason := peer.unavailable(shape):
            raise Unavailable(reason)
        x.clear()
        loss = peer.run(x)
        found = loss, x.hidden.grad, x.weight.grad
        row.update(zip(("loss", "dX", "dW"), map(relative, found, exact_at(peer.level)), strict=True))
        if peer.nll is not None:
            # as in training: without gradients some would compile once more
            row["logprobs"] = rms(-peer.nll(x.hidden, x.weight, x.target).detach(), exact.logprobs)
        one_minus_p = torch.expm1(exact.logprobs).neg()
        row["span"] = [exact.logprobs.min().item(), exact.logprobs.max().item()]
        row["one_minus_p"] = [one_minus_p.min().item(), one_minus_p.max().item()]
        x.clear()
