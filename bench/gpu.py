"""`python -m bench.gpu` (`make gpu`): GPU tests, compute-sanitizer, every question of the bench, and the report.

Needs no network and nothing but torch, triton and pytest; peers, pytest-benchmark, matplotlib and compute-sanitizer are
used where they are, and named where they are not. It stops by itself after --minutes and says what is left: the same
command goes on from there. Results of a card, its driver, the versions and pear_kernels' source belong together; with
any of these changed it starts anew, beside what was there.

Exit codes: 0, all is measured; 1, a test, the sanitizer or a cell failed; 75, run me again.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from bench import machine, report, runner
from bench.cells import Cell
from bench.machine import ROOT
from bench.store import Store

RUN_ME_AGAIN = 75
MARGIN = 15  # seconds kept for the report
TEST_SECONDS, SANITIZER_SECONDS = 300.0, 120.0  # at most, so that the bench has its turn
SANITIZERS = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long (default 9)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="what is resumed (default runs/gpu)")
    parser.add_argument("--results", type=Path, help="folder for the report (default bench/results)")
    parser.add_argument("--device", choices=("cuda", "tiny"), default="cuda", help="tiny: try the machinery on a CPU")
    parser.add_argument("--only", default="", metavar="EXPRESSION", help='cells to measure, as for pytest -k: "sweeps"')
    parser.add_argument("--retry", action="store_true", help="measure again what ended in an error")
    parser.add_argument("--skip-checks", action="store_true", help="neither GPU tests nor compute-sanitizer")
    arguments = parser.parse_args()
    runner.end_children_when_ended()
    deadline = time.time() + 60 * arguments.minutes - MARGIN
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. On a CPU: `make bench`; to try this command there: --device tiny")
    results = arguments.results or (ROOT / "bench" / "results" if arguments.device == "cuda" else arguments.out)
    os.environ["PEAR_BENCH_COMMAND"] = "python -m bench.gpu " + " ".join(sys.argv[1:])

    failed = []

    def run_checks(*names: str) -> None:
        if not arguments.skip_checks:
            failed.extend(name for name in names if not check(name, arguments.device, arguments.out, deadline))

    run_checks("tests", "memcheck")
    done = runner.measure_all(
        arguments.device, arguments.out, deadline=deadline, retry=arguments.retry, only=arguments.only
    )
    if not done.left:
        run_checks("racecheck")  # the longest, and the figures do not wait for it
    store = Store(arguments.out, done.store.facts)
    folder = report.write(store, results.resolve(), done.left)
    print(f"\n{(folder / 'report.md').read_text()}\nwritten to {folder}")
    for problem in [*(f"failed: {name}" for name in failed), *(f"error: {error}" for error in done.errors)]:
        print(problem)
    if done.left:
        of = ", ".join(f"{count} of {question}" for question, count in Counter(c.question for c in done.left).items())
        print(f"{len(done.left)} cells are left ({of}), the next is {done.left[0]}: run me again")
        sys.exit(RUN_ME_AGAIN)
    sys.exit(1 if failed or done.errors else 0)


# ---- beside the bench


def check(name: str, device: str, out: Path, deadline: float) -> bool:
    """GPU tests or a tool of compute-sanitizer, until it has passed once; what it says is kept beside the figures."""
    store = Store(out, machine.facts(device))
    cell = Cell("checks", device, name)
    row = store.rows.get(str(cell), {})
    if not (row.get("passed") or "skipped" in row):
        seconds = max(deadline - time.time(), 1)
        row = gpu_tests(device, seconds) if name == "tests" else sanitize(name, seconds)
        store.finish(cell, row)
    print(f"{name}: {row.get('skipped') or row['said']}", flush=True)
    return row.get("passed", True)


def gpu_tests(device: str, seconds: float) -> dict:
    code, said = run(tests_command(device), min(seconds, TEST_SECONDS))
    print(said, flush=True)
    if code is None:
        said = f"stopped after {min(seconds, TEST_SECONDS):.0f} s; kernels compiled so far are kept for the next run"
        return {"passed": False, "said": said}
    summary = next((line for line in reversed(said.splitlines()) if " passed" in line or " failed" in line), "")
    return {"passed": code == 0, "said": summary.strip("= ") or f"pytest ended with exit code {code}"}


def tests_command(device: str) -> list[str]:
    """Of the one file of GPU tests; the project's own options are left out, as they want plugins of pytest."""
    where = (
        ["-m", "gpu", "tests/pear_kernels/test_gpu.py"]
        if device == "cuda"
        else ["-k", "test_packing", "tests/pear_kernels"]
    )
    return [sys.executable, "-m", "pytest", "-o", "addopts=", *where, "-q", "-p", "no:cacheprovider"]


def sanitize(tool: str, seconds: float) -> dict:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if sanitizer is None:
        return {"skipped": "compute-sanitizer is not installed"}
    command = [sanitizer, "--tool", tool, sys.executable, "-m", "bench.small"]
    code, said = run(command, min(seconds, SANITIZER_SECONDS))
    if "Device not supported" in said:
        return {"skipped": f"compute-sanitizer cannot watch this device: {said.strip().splitlines()[0]}"}
    if code is None:
        return {"passed": False, "said": f"stopped after {min(seconds, SANITIZER_SECONDS):.0f} s"}
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY.*", said)
    clean = code == 0 and SANITIZERS[tool] in said
    return {"passed": clean, "said": summary[-1] if summary else (said.strip().splitlines() or [f"exit {code}"])[-1]}


def run(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: stopped after so many seconds, children too) and everything that was printed."""
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipe) as process:
        try:
            said, _ = process.communicate(timeout=seconds)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            code = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return code, said


if __name__ == "__main__":
    main()
