"""Each file of examples/ in a process of its own, as its reader runs it: by its name, without arguments.

An example compares what it computed with something that can disagree (full logits in float64, one process, TRL's own
trainer) and ends with an error where they differ. Here its exit code is read, and what it printed of those comparisons.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
CPU_SECONDS = 60  # of each process: they need 3 to 20 in all. Not of the clock, which a busy machine stretches
WALL_SECONDS = 280
COMPARED = re.compile(r"^(.+): relative difference (\S+)$", re.MULTILINE)
TRAINS = re.compile(r"\.step\(\)|\.train\(\)|\.fit\(")
TRAINED = re.compile(r"^(\w+): (\S+) at first, (\S+) at last$", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_example(path, tmp_path):
    # In a folder of its own: it is to leave nothing, and to need nothing that lies beside it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    run = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=WALL_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS)),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    compared = {what: float(difference) for what, difference in COMPARED.findall(run.stdout)}
    assert compared, f"nothing was compared:\n{run.stdout}"
    assert max(compared.values()) <= 1e-4, compared
    trained = TRAINED.findall(run.stdout)
    assert len(trained) == bool(TRAINS.search(path.read_text())), run.stdout
    for what, first, last in trained:
        better = float(last) > float(first) if what == "reward" else float(last) < float(first)
        assert better, f"{what} went from {first} to {last}"
    assert not list(tmp_path.iterdir()), "an example leaves no files behind"


def test_readme_names_every_example():
    named = re.findall(r"^\| \[`(\w+\.py)`\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert all(shown == link for shown, link in named)
    assert sorted(link for _, link in named) == [path.name for path in FILES]


def test_an_example_that_fails_is_seen(tmp_path):
    """The comparisons above would notice: one example, its loss spoiled."""
    spoiled = (EXAMPLES / "pytorch_loop.py").read_text().replace("denominator=tokens", "denominator=tokens + 1")
    (tmp_path / "spoiled.py").write_text(spoiled)
    run = subprocess.run(
        [sys.executable, tmp_path / "spoiled.py"], capture_output=True, text=True, timeout=WALL_SECONDS
    )
    assert run.returncode == 1 and "differ by" in run.stderr, run.stderr
