"""`python -m pear_kernels.triton.autotune`: remake this GPU's entries of tiles.json from measurements.

For a dtype and a hidden size it times product 1 as the head runs it, on random inputs: every candidate tile with E
stored and without, and the plain variant (cuBLAS, then the row kernel). The fastest of each become the entry; figures
and versions go into its `measured`. The table is rewritten whole after each entry, so that a kill loses one at most.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from pear_kernels.triton import tiles
from pear_kernels.triton.head import Head
from pear_kernels.triton.tiles import Choice, Tile

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

    def milliseconds(self, choice: Choice, gradient: bool) -> float | None:
        """Median time of product 1 with everything around it, or None where the tile does not fit the chip."""
        self.head.choice = choice
        self.head.reserve(len(self.x), gradient)
        try:
            return triton.testing.do_bench(
                lambda: self.head.softmax(self.x, self.target, gradient=gradient),
                warmup=25,
                rep=100,
                return_mode="median",
            )
        except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            return None


def tune(problem: Problem, arch: str, dtype: torch.dtype, say: Callable[[str], None]) -> dict:
    """An entry of the table."""
    found, times = {}, {}
    anything = next(candidates(arch, dtype))
    for name, gradient in (("softmax", True), ("logprobs", False)):
        if gradient and dtype == torch.float16:  # always plain: E needs another anchor, see Head
            found[name] = None
            continue
        for tile in candidates(arch, dtype):
            took = problem.milliseconds(Choice("fused", tile, tile), gradient)
            if took is None:
                continue
            say(f"{name:9} {took:9.3f} ms  {tile}")
            if name not in times or took < times[name]:
                times[name], found[name] = took, tile
        if name not in found:
            raise RuntimeError(f"no candidate tile for {name} runs on this GPU: {arch}, {dtype}")
    times["plain"] = problem.milliseconds(Choice("plain", anything, anything), True)
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
    parser = argparse.ArgumentParser(prog="python -m pear_kernels.triton.autotune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--hidden-size", nargs="+", type=int, default=[1024, 2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=3072, help="of a chunk (default 3072)")
    parser.add_argument("--table", type=Path, default=tiles.TABLE, help="where to write (default: the package's own)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("autotune measures on a GPU, and torch.cuda.is_available() is False: run it on the GPU to tune for")
    device = torch.device("cuda", torch.cuda.current_device())
    arch = tiles.architecture(device)
    table = json.loads(arguments.table.read_text()) if arguments.table.exists() else tiles.table()
    for dtype, hidden_size in itertools.product(arguments.dtype, arguments.hidden_size):
        print(f"{arch}, {dtype}, hidden size {hidden_size}", flush=True)
        problem = Problem(DTYPES[dtype], arguments.rows, arguments.vocabulary, hidden_size, device)
        entry = tune(problem, arch, DTYPES[dtype], say=lambda line: print(line, flush=True))
        table = replace_entry(table, arch, dtype, entry)
        write(table, arguments.table)
    print(f"written to {arguments.table}")


if __name__ == "__main__":
    main()
