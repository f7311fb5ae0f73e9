"""`python -m bench`: every question, on a CPU, then the report. About half an hour on two cores.

On a machine with a GPU it is `python -m bench.gpu`.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from bench import report, runner
from bench.machine import ROOT


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, for every measurement (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds around the peers (default 5)")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder for the report")
    parser.add_argument("--out", type=Path, help="keep the rows here, and go on from what is there (default: neither)")
    parser.add_argument("--only", choices=runner.QUESTIONS, default="", help="one question, in a report of its own")
    parser.add_argument("--note", default="", help="what a reader of the report should know, in a line")
    arguments = parser.parse_args()
    runner.end_children_when_ended()
    torch.set_num_threads(arguments.threads)
    os.environ.update(
        OMP_NUM_THREADS=str(arguments.threads),
        PEAR_BENCH_COMMAND=f"python -m bench --threads {arguments.threads} --rounds {arguments.rounds}"
        + f" --only {arguments.only}" * bool(arguments.only),
    )
    with tempfile.TemporaryDirectory() as scratch:
        questions = (arguments.only,) if arguments.only else runner.QUESTIONS
        done = runner.measure_all("cpu", arguments.out or Path(scratch), turns=arguments.rounds, questions=questions)
        folder = report.write(done.store, arguments.results.resolve(), done.left, arguments.only, arguments.note)
    print((folder / f"{arguments.only or 'report'}.md").read_text())
    print(f"written to {folder}")
    if done.errors:
        sys.exit("\n".join(["these ended in an error:", *done.errors]))


if __name__ == "__main__":
    main()
