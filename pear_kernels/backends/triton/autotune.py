"""`python -m pear_kernels.backends.triton.autotune`: measure this GPU's entries of tiles.json anew.

For each dtype and hidden size it times product 1 as the head runs it, on random inputs: every candidate tile with and
without E, and the plain variant (cuBLAS, then the row kernel). The best few are then timed in turns, because a card
near its power limit may be slower from one second to the next. The fastest tiles become the entry; times and versions
go into its `measured`. The whole table is rewritten after each entry, so an interrupted run loses one entry at most.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton

from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.head import Head
from pear_kernels.backends.triton.tiles import Choice, Table, Tile

FINALISTS, TURNS = 4, 7  # tiles that are timed in turns, and rounds of that
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def candidates(arch: str, dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles to time: 64 x 128 to 256 x 128 logits in the accumulators of 4 or 8 warps."""
    depth = 32 if dtype == torch.float32 else 64
    shapes = [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)]
    if dtype == torch.float32:
        shapes += [(64, 128, 4), (64, 128, 8)]
    persistent = (False, True) if arch != "sm_80" else (False,)
    for (rows, vocabulary, warps), stages, parts, stays in itertools.product(shapes, (3, 4), (1, 2), persistent):
        if (rows * vocabulary <= 128 * 128) or parts == 2:  # a large tile in one part runs out of registers
            yield Tile(rows, vocabulary, depth, parts, warps, stages, stays)


class Problem:
    """One chunk of logits, as a walk computes it."""

    def __init__(self, dtype: torch.dtype, rows: int, vocabulary: int, hidden_size: int, device: torch.device):
        rng = torch.Generator(device).manual_seed(0)
        randn = functools.partial(torch.randn, dtype=dtype, device=device, generator=rng)
        weight = randn(vocabulary, hidden_size).mul_(hidden_size**-0.5)
        self.x = randn(rows, hidden_size)
        self.target = torch.randint(vocabulary, (rows,), device=device, generator=rng)
        self.head = Head(weight, None, 1.0, None, dtype)

    def milliseconds(self, choice: Choice, gradient: bool, rep: int = 50) -> float | None:
        """Median time of product 1 with its row kernels; None if the tile does not fit the chip."""
        self.head.choice = choice
        self.head.reserve(len(self.x), gradient)
        try:
            return triton.testing.do_bench(
                lambda: self.head.softmax(self.x, self.target, gradient=gradient),
                warmup=10,
                rep=rep,
                return_mode="median",
            )
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            return None


def compile_apart(dtype: str, tile: Tile) -> None:
    """Puts a tile's code into Triton's cache; a small problem needs the same code as a large one."""
    problem = Problem(DTYPES[dtype], 256, 4096, 256, torch.device("cuda", torch.cuda.current_device()))
    for gradient in (False,) if dtype == "float16" else (False, True):
        problem.milliseconds(Choice("fused", tile, tile), gradient, rep=1)


def compile_all(arch: str, dtype: str, processes: int) -> None:
    """Compiles all candidates in several processes: one by one they would take most of the tuning's time."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        list(pool.map(functools.partial(compile_apart, dtype), candidates(arch, DTYPES[dtype])))


def in_turns(problem: Problem, choices: Iterable[Choice], gradient: bool) -> dict[Choice, float]:
    """Milliseconds: the median over `TURNS` rounds, each of which times every choice once."""
    choices = list(choices)
    rounds = [[problem.milliseconds(choice, gradient) or math.inf for choice in choices] for _ in range(TURNS)]
    return {choice: statistics.median(times) for choice, times in zip(choices, zip(*rounds, strict=True), strict=True)}


def tune(problem: Problem, arch: str, dtype: torch.dtype, say: Callable[[str], None]) -> dict[str, Any]:
    """An entry of the table."""
    fused = [Choice("fused", tile, tile) for tile in candidates(arch, dtype)]
    found: dict[str, Tile] = {}
    times: dict[str, float] = {}
    for name, gradient in (("softmax", True), ("logprobs", False)):
        if gradient and dtype == torch.float16:  # always plain: E needs another anchor, see `tiles.choose`
            continue
        once = {c: time for c in fused if (time := problem.milliseconds(c, gradient)) is not None}
        if not once:
            raise RuntimeError(f"no candidate tile for {name} runs on this GPU: {arch}, {dtype}")
        ranked = sorted(once, key=once.__getitem__)
        turns = in_turns(problem, ranked[:FINALISTS], gradient)
        for c in ranked:
            again = f"{turns[c]:9.3f} ms in turns" if c in turns else ""
            say(f"{name:9} {once[c]:9.3f} ms  {again:21}  {c.softmax}")
        best = min(turns, key=turns.__getitem__)
        found[name], times[name] = best.softmax, turns[best]
    (times["plain"],) = in_turns(problem, [fused[0]._replace(product="plain")], True).values()
    say(f"plain     {times['plain']:9.3f} ms  cuBLAS and one row kernel")
    fused_wins = "softmax" in times and times["softmax"] <= times["plain"]
    return {
        "hidden_size": problem.x.shape[1],
        "product": "fused" if fused_wins else "plain",
        "measured": {
            "device": torch.cuda.get_device_name(problem.x.device),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "rows": len(problem.x),
            "vocabulary": problem.head.vocabulary,
            "milliseconds": {name: round(took, 4) for name, took in times.items()},
        },
        "softmax": found.get("softmax", found["logprobs"])._asdict(),
        "logprobs": found["logprobs"]._asdict(),
    }


def replace_entry(table: Table, arch: str, dtype: str, entry: dict[str, Any]) -> Table:
    """The table with `entry` in place of the one for its hidden size and of all entries without a measurement."""
    kept = [old for old in table[arch][dtype] if old["measured"] and old["hidden_size"] != entry["hidden_size"]]
    entries = sorted([*kept, entry], key=lambda entry: entry["hidden_size"])
    return {**table, arch: {**table[arch], dtype: entries}}


def write(table: Table, path: Path) -> None:
    """Replaces the file atomically."""
    written = path.with_suffix(".tmp")
    written.write_text(json.dumps(table, indent=1) + "\n")
    written.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pear_kernels.backends.triton.autotune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--hidden-size", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=3072, help="rows of a chunk (default 3072)")
    parser.add_argument("--table", type=Path, default=tiles.TABLE, help="where to write (default: the package's own)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: one per core)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("autotune measures on a GPU, and torch.cuda.is_available() is False: run it on the GPU to tune for")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = tiles.architecture(device)
    table = json.loads(arguments.table.read_text()) if arguments.table.exists() else tiles.table()
    for dtype in arguments.dtype:
        compile_all(arch, dtype, arguments.processes)
    for dtype, hidden_size in itertools.product(arguments.dtype, arguments.hidden_size):
        print(f"{arch}, {dtype}, hidden size {hidden_size}", flush=True)
        problem = Problem(DTYPES[dtype], arguments.rows, arguments.vocabulary, hidden_size, device)
        entry = tune(problem, arch, DTYPES[dtype], say=lambda line: print(line, flush=True))
        table = replace_entry(table, arch, dtype, entry)
        write(table, arguments.table)
    print(f"written to {arguments.table}")


if __name__ == "__main__":
    main()
