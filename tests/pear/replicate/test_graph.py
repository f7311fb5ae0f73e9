"""Units are done once, kept until something they rest on changes, and never half there."""

import io
import json
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from pear.replicate.graph import Unit, run_units


def total(tick, folder, needs, value, log):
    """The sum of `value` and of what is needed; each call leaves a line in `log`."""
    tick(1, 2)
    numbers = [json.loads((path / "number.json").read_text()) for path in needs.values()]
    (folder / "number.json").write_text(json.dumps(value + sum(numbers)))
    with open(log, "a") as file:
        file.write(f"{folder}\n")
    return {"number": value + sum(numbers), "noise": [torch.rand(()).item(), np.random.rand()]}


def diamond(log, **changed):
    """a -> b, c -> d"""
    needs = {"a": (), "x/b": ("a",), "x/c": ("a",), "d": ("x/b", "x/c")}
    values = {"a": 1, "x/b": 10, "x/c": 100, "d": 1000} | changed
    return [
        Unit(name, total, dict(value=values[name], log=str(log)), needs[name], name[0], {"arm": name}) for name in needs
    ]


def run(units, out, **options):
    return run_units(units, out, **{"workers": 1, "code": "1", "console": Console(file=io.StringIO())} | options)


def files(out) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


def test_units_see_what_they_need(tmp_path):
    records = run(diamond(tmp_path / "log"), tmp_path / "out")
    assert {name: record["result"]["number"] for name, record in records.items()} == {
        "a": 1, "x/b": 11, "x/c": 101, "d": 1112,
    }  # fmt: skip
    for name, record in records.items():
        assert json.loads((tmp_path / "out" / "jobs" / name / "job.json").read_text()) == record
        assert record["labels"] == {"arm": name} and record["phase"] == name[0]
