"""`python -m bench.kernels` (`make kernels`): compile every kernel ahead of time and hold its code to a budget.

Launches are recorded, not invented: the head and the weights run on tensors of device "meta" at real shapes, and each
launch that they would make is compiled for sm_80, sm_90 and sm_100. No GPU is needed. It fails, naming kernel,
configuration, architecture, figure and budget, where

- a kernel without a product spills registers,
- a block asks for more shared memory than the chip has,
- a product's code has no matrix instruction of its architecture,
- a figure is above its budget in bench/kernel_budgets.json, a kernel has none, or a budget no kernel.

`--update` writes the budgets anew, and the table to bench/results/kernels.md. Budgets are those of one version of
triton, and compared under that one alone; the other rules hold under any.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NamedTuple

if find_spec("triton") is None:
    sys.exit("bench.kernels needs triton, which has wheels for Linux alone: pip install 'pear-kernels[kernels]'")

import triton
from triton import knobs

from bench.cubin import CHIPS, TENSOR_MEMORY_LIMIT, Figures, Variant, inspect, variant
from bench.launches import launches
from bench.machine import ROOT, commit
from pear.io import write_json, write_text

BUDGETS = ROOT / "bench" / "kernel_budgets.json"
TABLE = ROOT / "bench" / "results" / "kernels.md"
PROCESSES = 2

# Figures with a budget, and what a new budget rounds them up to: registers are handed out by eights, and a hundredth
# more or fewer instructions are no news.
BUDGETED: dict[str, Callable[[int], int]] = {
    "registers": lambda found: -(-found // 8) * 8,
    "spills": lambda found: found,
    "shared": lambda found: found,
    "instructions": lambda found: math.ceil(found * 1.05 / 16) * 16,
}


class Job(NamedTuple):
    arch: int
    variant: Variant
    launch: object  # pear_kernels.backends.triton.launch.Launch


# ---- recorded


def jobs(archs: Iterable[int]) -> list[Job]:
    """One for each machine code that the package asks for."""
    found: dict[tuple[int, Variant], Job] = {}
    for arch in archs:
        for launch in launches(arch):
            of = variant(launch, arch)
            found.setdefault((arch, of), Job(arch, of, launch))
    named: dict[tuple[int, str, str], str] = {}
    for arch, of in found:
        if named.setdefault((arch, of.kernel, of.config), of.key) != of.key:
            raise AssertionError(f"bench/cubin.py describes two codes of {of.kernel} alike: {of.config} (sm_{arch})")
    return list(found.values())


# ---- compiled, in two processes

_jobs: list[Job] = []  # a forked process finds them here: kernels cannot be pickled


def _compile(number: int) -> Figures | str:
    """One kernel that does not compile must not hide the others: a string says why."""
    job = _jobs[number]
    with tempfile.TemporaryFile() as printed:
        try:
            with output_into(printed):  # the compiler prints whole programs when it gives up
                return inspect(job.launch, job.arch)
        except Exception as error:
            printed.seek(0)
            said = [line for line in printed.read().decode(errors="replace").splitlines() if "error:" in line]
            reason = " ".join(" ".join([str(error), *said]).split())
            return f"does not compile: {type(error).__name__}: {reason[:400]}"


@contextlib.contextmanager
def output_into(file: IO[bytes]) -> Iterator[None]:
    """What this process prints, compiled code included, goes to `file`."""
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        for stream, number in zip((sys.stdout, sys.stderr), (1, 2), strict=True):
            stream.flush()
            os.dup2(kept[number - 1], number)
            os.close(kept[number - 1])


def compile_all(work: list[Job]) -> list[Figures | str]:
    """The figures of each, or why there are none."""
    _jobs[:] = work
    results: list[Figures | str] = [""] * len(work)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        running = {pool.submit(_compile, number): number for number in range(len(work))}
        for done, future in enumerate(as_completed(running), start=1):
            results[running[future]] = future.result()
            if sys.stderr.isatty():
                print(f"\rcompiled {done} of {len(work)}", end="", file=sys.stderr, flush=True)
            elif done % 25 == 0:
                print(f"compiled {done} of {len(work)}", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return results


# ---- held to the rules and to the budgets


def problems(name: tuple[str, str, str], found: Figures, chip_limit: int, matrix: str) -> list[str]:
    """What no kernel may do, whatever its budget."""
    where = ", ".join(name)
    wrong = []
    if found.kind == "rows" and found.spills:
        wrong.append(f"{where}: spills {found.spills} bytes; a row or scan kernel must not")
    if found.shared > chip_limit:
        wrong.append(f"{where}: shared {found.shared} bytes, above the chip's {chip_limit}")
    if found.tensor_memory > TENSOR_MEMORY_LIMIT:
        wrong.append(f"{where}: tensor memory {found.tensor_memory} columns, above the chip's {TENSOR_MEMORY_LIMIT}")
    if found.kind == "product" and matrix not in found.matrix:
        wrong.append(f"{where}: no {matrix} in its code, found {found.matrix}")
    return wrong


def over_budget(found: dict[tuple[str, str, str], Figures], budgets: dict) -> list[str]:
    """Figures above their budget; kernels without one, and budgets without a kernel."""
    wrong, unused = [], {(k, c, a) for k, configs in budgets.items() for c, archs in configs.items() for a in archs}
    for name, figures in found.items():
        where = ", ".join(name)
        if name not in unused:
            wrong.append(f"{where}: no budget; `python -m bench.kernels --update` gives it one")
            continue
        unused.discard(name)
        kernel, config, arch = name
        for figure in BUDGETED:
            measured, budget = getattr(figures, figure), budgets[kernel][config][arch][figure]
            if measured > budget:
                wrong.append(f"{where}: {figure} {measured}, above its budget of {budget}")
    wrong += [f"{', '.join(name)}: has a budget, and is not launched any more" for name in sorted(unused)]
    return wrong


def new_budgets(found: dict[tuple[str, str, str], Figures]) -> dict:
    budgets: dict = {}
    for (kernel, config, arch), figures in sorted(found.items()):
        limits = {figure: rounded(getattr(figures, figure)) for figure, rounded in BUDGETED.items()}
        budgets.setdefault(kernel, {}).setdefault(config, {})[arch] = limits
    return budgets


# ---- shown

COLUMNS = ["kernel", "configuration", "arch", "registers", "spilled B", "shared B", "matrix", "loads", "instructions"]


def table(found: dict[tuple[str, str, str], Figures]) -> list[str]:
    """As lines of Markdown, the columns in line."""
    rows = [
        (*name, f.registers, f.spills, f.shared, f.matrix, f.loads, f.instructions) for name, f in sorted(found.items())
    ]
    cells = [COLUMNS, *([str(cell) for cell in row] for row in rows)]
    width = [max(len(row[column]) for row in cells) for column in range(len(COLUMNS))]
    numeric = [bool(rows) and isinstance(cell, int) for cell in (rows[0] if rows else COLUMNS)]
    lines = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, width, numeric, strict=True)) + " |"
        for row in cells
    ]
    rule = "| " + " | ".join("-" * (w - 1) + (":" if n else "-") for w, n in zip(width, numeric, strict=True)) + " |"
    return [lines[0], rule, *lines[1:]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--update", action="store_true", help="write the budgets and the table anew")
    parser.add_argument("--budgets", type=Path, default=BUDGETS, help="another file of budgets")
    parser.add_argument("--only", default="", help="kernels whose name contains this; the rest are not looked at")
    options = parser.parse_args(arguments)
    if options.update and options.only:
        parser.error("--update writes all budgets, and --only looks at some kernels: give one of them")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, and interpreted kernels have no code to look at: unset it")

    compiled_at = commit()  # before minutes of compiling, in which the tree may move on
    work = [job for job in jobs(CHIPS) if options.only in job.variant.kernel]
    print(f"triton {triton.__version__}, {len(work)} kernels and configurations to compile", file=sys.stderr)
    found, wrong = {}, []
    for job, figures in zip(work, compile_all(work), strict=True):
        name = (job.variant.kernel, job.variant.config, f"sm_{job.arch}")
        if isinstance(figures, str):
            wrong.append(f"{', '.join(name)}: {figures}")
            continue
        found[name] = figures
        chip = CHIPS[job.arch]
        wrong += problems(name, figures, chip.shared_limit, chip.matrix)
    print("\n".join(table(found)))

    if options.update:
        if not wrong:
            write_json(options.budgets, {"triton": triton.__version__, "kernels": new_budgets(found)})
            about = f"triton {triton.__version__}, commit {compiled_at}, `python -m bench.kernels --update`"
            lines = ["# The kernels' code, compiled ahead of time", "", about, "", *table(found), ""]
            write_text(TABLE, "\n".join(lines))
    else:
        wrong += against_file(options, triton.__version__, found)
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(f"{len(wrong)} of the above must not be" + "; nothing was written" * options.update, file=sys.stderr)
    return int(bool(wrong))


def against_file(options: argparse.Namespace, version: str, found: dict[tuple[str, str, str], Figures]) -> list[str]:
    try:
        written = json.loads(options.budgets.read_text())
    except (OSError, ValueError) as error:
        return [f"{options.budgets}: no budgets to read ({error}); `python -m bench.kernels --update` writes them"]
    if written["triton"] != version:
        print(f"budgets are those of triton {written['triton']}: not compared under {version}", file=sys.stderr)
        return []
    return over_budget(found, {k: v for k, v in written["kernels"].items() if options.only in k})


if __name__ == "__main__":
    sys.exit(main())
