"""`python -m bench`: speed, memory, accuracy, then the report. A few minutes on two cores."""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.machine import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, for every measurement (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds around the peers (default 5)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the report")
    arguments = parser.parse_args()
    os.environ.update(
        OMP_NUM_THREADS=str(arguments.threads),
        PEAR_BENCH_ROUNDS=str(arguments.rounds),
        PEAR_BENCH_COMMAND=f"python -m bench --threads {arguments.threads} --rounds {arguments.rounds}",
    )
    with tempfile.TemporaryDirectory() as raw:
        speed = f"--benchmark-json={raw}/speed.json"
        run("pytest", "bench", "-q", "-rN", "--timeout=0", "--benchmark-quiet", "-p", "no:cacheprovider", speed)
        run("bench.memory", f"--json={raw}/memory.json")
        run("bench.accuracy", f"--json={raw}/accuracy.json")
        run("bench.report", raw, f"--results={arguments.results.resolve()}")


def run(module: str, *arguments: str) -> None:
    """Each measurement in a process of its own; the first that fails ends it all."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT)
    if done.returncode:
        sys.exit(f"{module} failed with exit code {done.returncode}; no report was written")


if __name__ == "__main__":
    main()
