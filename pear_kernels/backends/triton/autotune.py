"""`python -m pear_kernels.backends.triton.autotune`: remake this GPU's entries of tiles.json from measurements.

For a dtype and a hidden size it times product 1 as the head runs it, on random inputs: every candidate tile with E
stored and without, and the plain variant (cuBLAS, then the row kernel). The best few take turns then, since a card that
is near its power limit is slower from one second to the next. The fastest of each become the entry; figures and
versions go into its `measured`. The table is rewritten whole after each entry, so that a kill loses one at most.
"""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.head import Head
from pear_kernels.backends.triton.tiles import Choice, Tile

FINALISTS, TURNS = 4, 7
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def candidates(arch: str, dtype: torch.dtype) -> Iterator[Tile]:
    """Tiles worth a try: 64 x 128 to 256 x 128 logits in the accumulators of 4 or 8 warps."""
    depth = 32 if dtype == torch.float32 else 64
    shapes = [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8)]
    if dtype == torch.float32:
        shapes += [(64, 128, 4), (64, 128, 8)]
    persistent = (False, True) if arch != "sm_80" else (False,)
    for (rows, vocabulary, warps), stages, parts, stays in itertools.product(shapes, (3, 4), (1, 2), persistent):
        if (rows * vocabulary <= 128 * 128) or parts == 2:  # a large tile in one part has no registers left
            yield Tile(rows, vocabulary, depth, parts, warps, stages, stays)


class Problem:
    """One chunk of logits, as a walk would make it."""

    def __init__(self, dtype: torch.dtype, rows: int, vocabulary: int, hidden_size: int, device: torch.device):
        rng = torch.Generator(device).manual_seed(0)
        options = {"dtype": dtype, "device": device, "generator": rng}
        weight = torch.randn(vocabulary, hidden_size, **options).mul_(hidden_size**-0.5)
        self.x = torch.randn(rows, hidden_size, **options)
        self.target = torch.randint(vocabulary, (rows,), device=device, generator=rng)
        self.head = Head(weight, None, 1.0, None, dtype)

    def milliseconds(self, choice: Choice, gradient: bool, rep: int = 50) -> float | None:
        """Median time of product 1 with everything around it, or None where the tile does not fit the chip."""
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
    """Leaves a tile's code in Triton's cache: a small problem has the same as a large one."""
    problem = Problem(DTYPES[dtype], 256, 4096, 256, torch.device("cuda", torch.cuda.current_device()))
    for gradient in (False,) if dtype == "float16" else (False, True):
        problem.milliseconds(Choice("fused", tile, tile), gradient, rep=1)


def compile_all(arch: str, dtype: str, processes: int) -> None:
    """All candidates, several at a time: one by one they would take most of the tuning's time."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        list(pool.map(functools.partial(compile_apart, dtype), candidates(arch, DTYPES[dtype])))


def in_turns(measure: Callable[[Tile], float], tiles: Sequence[Tile]) -> dict[Tile, float]:
    """The median over `TURNS` rounds around the tiles."""
    rounds = [{tile: measure(tile) for tile in tiles} for _ in range(TURNS)]
    return {tile: statistics.median(found[tile] for found in rounds) for tile in tiles}


def tune(problem: Problem, arch: str, dtype: torch.dtype, say: Callable[[str], None]) -> dict:
    """An entry of the table."""
    found, times = {}, {}
    anything = next(candidates(arch, dtype))
    for name, gradient in (("softmax", True), ("logprobs", False)):
        if gradient and dtype == torch.float16:  # always plain: E needs another anchor, see Head
            found[name] = None
            continue

        def measure(tile: Tile, gradient: bool = gradient) -> float | None:
            return problem.milliseconds(Choice("fused", tile, tile), gradient)

        once = {tile: took for tile in candidates(arch, dtype) if (took := measure(tile)) is not None}
        if not once:
            raise RuntimeError(f"no candidate tile for {name} runs on this GPU: {arch}, {dtype}")
        took = in_turns(measure, sorted(once, key=once.get)[:FINALISTS])
        for tile in sorted(once, key=once.get):
            say(f"{name:9} {once[tile]:9.3f} ms  {f'{took[tile]:9.3f} ms in turns' if tile in took else '':21}  {tile}")
        found[name] = min(took, key=took.get)
        times[name] = took[found[name]]
    plain = Choice("plain", anything, anything)
    times["plain"] = in_turns(lambda _: problem.milliseconds(plain, True), [anything])[anything]
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
        "softmax": (found["softmax"] or found["logprobs"])._asdict(),
        "logprobs": found["logprobs"]._asdict(),
    }


def replace_entry(table: dict, arch: str, dtype: str, entry: dict) -> dict:
    """The table with this entry in place of what it had for the hidden size, and of entries nobody measured."""
    kept = [old for old in table[arch][dtype] if old["measured"] and old["hidden_size"] != entry["hidden_size"]]
    entries = sorted([*kept, entry], key=lambda entry: entry["hidden_size"])
    return {**table, arch: {**table[arch], dtype: entries}}


def write(table: dict, path: Path) -> None:
    """Whole or not at all."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(table, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pear_kernels.backends.triton.autotune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--hidden-size", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=3072, help="of a chunk (default 3072)")
    parser.add_argument("--table", type=Path, default=tiles.TABLE, help="where to write (default: the package's own)")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile (default: one a core)")
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
