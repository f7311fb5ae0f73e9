"""Time and memory of one peer on one case. The only timing there is, for every device and question."""

import gc
import itertools
import time
from collections.abc import Callable

import torch

from bench.peers import Peer
from bench.shapes import Inputs, Shape

# A round is one call, or as many as last this long, so that the clock's own cost (one wait for the device) is under
# a thousandth of it. A turn is so many rounds as fit its seconds, within the bounds.
ROUND_SECONDS, TURN_SECONDS = 0.03, 1.5
FEWEST_ROUNDS, MOST_ROUNDS = 3, 20


def clock(device: str) -> Callable[[], float]:
    """Seconds, once everything that was launched is done."""
    if device != "cuda":
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


class Benchmark:
    """As much of pytest-benchmark's fixture as is used here, for where that is not installed."""

    def __init__(self, timer: Callable[[], float]):
        self.timer = timer
        self.stats = self  # benchmark.stats.stats.data, as there
        self.data: list[float] = []

    def pedantic(self, target: Callable[[], None], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            begin = self.timer()
            for _ in range(iterations):
                target()
            self.data.append((self.timer() - begin) / iterations)


def rotate(peer: Peer, sets: list[Inputs]) -> Callable[[], None]:
    """A call that takes the next set of inputs each time, without the gradients of before."""
    turn = itertools.cycle(sets)

    def call() -> None:
        x = next(turn)
        x.clear()
        peer.run(x)

    return call


def warm_up(call: Callable[[], None], device: str) -> float:
    """Seconds of a call once libraries are loaded and kernels compiled; on a CPU of the first one, which is near."""
    now = clock(device)
    seconds = 0.0
    for i in range(1 if device == "cpu" else 3):
        if i == 2 and seconds > 0.5:
            break
        begin = now()
        call()
        seconds = now() - begin
    return seconds


def plan(seconds: float, device: str) -> dict[str, int]:
    """Rounds and calls a round of one turn. On a CPU one: its turns are many, and what is around it is noise too."""
    if device == "cpu":
        return {"rounds": 1, "iterations": 1}
    iterations = max(1, round(ROUND_SECONDS / seconds))
    rounds = int(TURN_SECONDS / (iterations * seconds))
    return {"rounds": min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS), "iterations": iterations}


def time_turn(benchmark, call: Callable[[], None], seconds: float, device: str) -> dict[str, list[float]]:
    """Seconds a call, a figure for each round. On a CPU also those of the process, all threads together.

    The latter do not count what a virtual machine's host takes away.
    """
    if device != "cpu":
        call()  # memory that was handed back after the last cell is taken again
    gc.collect()
    begin = time.process_time()
    benchmark.pedantic(call, **plan(seconds, device))
    row = {"seconds": [float(f"{seconds:.6g}") for seconds in benchmark.stats.stats.data]}
    if device == "cpu":
        row["cpu_seconds"] = [round(time.process_time() - begin, 4)]
    return row


def extra_memory(peer: Peer, x: Inputs, shape: Shape) -> int:
    """Peak bytes of the CUDA allocator in a warm call, above the inputs and the gradients in the inputs' dtype."""
    x.clear()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    peer.run(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    x.clear()
    return peak - before - peer.gradient_bytes(shape)
