"""Units are done once, kept until something they rest on changes, and never half there, however a run ends."""

import fcntl
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from pear.io import DataError, WriteError
from pear.replicate.graph import Unit, UnitError, left_text, run_units, seconds_left


def total(tick, folder, needs, value, log, seconds=0.0, fails=None):
    """The sum of `value` and of what is needed. Each call leaves its unit's value in `log` when it starts.

    It takes its time, writes its file in two parts, and holds a lock on `log` as long as its process lives.
    """
    with open(log, "a") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        file.write(f"{value}\n")
        file.flush()
        number = value + sum(json.loads((path / "number.json").read_text()) for path in needs.values())
        text = json.dumps(number)
        (folder / "number.json").write_text(text[:1])
        for i in range(10):
            time.sleep(seconds / 10)
            tick(i + 1, 10)
        if fails is not None and not Path(fails).exists():
            raise ERRORS[Path(fails).name]
        (folder / "number.json").write_text(text)
    return {"number": number, "noise": [torch.rand(()).item(), np.random.rand(), random.random()]}


ERRORS = {
    "bug": KeyError("a bug"),
    "data": DataError("line 3: no such thing"),
    "full": RuntimeError("I/O error: No space left on device (os error 28)"),
    "write": WriteError(13, "could not write it"),
    "interrupt": KeyboardInterrupt(),
}


def unit(name, value, log, needs=(), **arguments):
    return Unit(
        name,
        total,
        dict(value=value, log=str(log), **arguments),
        needs,
        name.split("/")[0],
        {"arm": name, "value": value},
    )


def diamond(log, **arguments):
    """base -> arm/b, arm/c -> end"""
    return [
        unit("base", 1, log, **arguments),
        unit("arm/b", 10, log, ("base",), **arguments),
        unit("arm/c", 100, log, ("base",), **arguments),
        unit("end", 1000, log, ("arm/b", "arm/c"), **arguments),
    ]


def run(units, out, workers=1, code="1", console=None):
    return run_units(units, out, workers=workers, code=code, console=console or Console(file=io.StringIO()))


def what(records):
    """Of records, what does not depend on the time that it took."""
    return {name: {**record, "seconds": None} for name, record in records.items()}


def calls(log) -> list[int]:
    return [int(line) for line in Path(log).read_text().split()] if Path(log).exists() else []


def whole(out) -> dict[str, dict]:
    """The records in `out`; checks that everything below `out/jobs` is whole."""
    records = {}
    for path in Path(out, "jobs").rglob("*"):
        if path.is_dir():
            assert not path.name.startswith("."), path
        elif path.name == "job.json":
            records[str(path.parent.relative_to(Path(out, "jobs")))] = record = json.loads(path.read_text())
            assert json.loads((path.parent / "number.json").read_text()) == record["result"]["number"]
        else:
            assert path.name == "number.json" and (path.parent / "job.json").exists(), path
    return records


def test_units_see_what_they_need_and_leave_a_record(tmp_path):
    records = run(diamond(tmp_path / "log"), tmp_path / "out")
    assert [(name, record["result"]["number"]) for name, record in records.items()] == [
        ("base", 1), ("arm/b", 11), ("arm/c", 101), ("end", 1112),
    ]  # fmt: skip
    assert whole(tmp_path / "out") == records
    assert records["arm/b"] | {"key": 0, "seconds": 0, "result": 0} == {
        "name": "arm/b", "phase": "arm", "labels": {"arm": "arm/b", "value": 10}, "needs": ["base"],
        "key": 0, "seconds": 0, "result": 0,
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"jobs"}


def test_workers_change_no_result(tmp_path):
    """Not even random numbers that a unit does not seed itself, nor in another order."""
    units = diamond(tmp_path / "log")
    one = run(units, tmp_path / "one")
    two = run([units[0], units[2], units[1], units[3]], tmp_path / "two", workers=2)
    assert what(one) == what(two)
    assert len({tuple(record["result"]["noise"]) for record in one.values()}) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


@st.composite
def changes(draw):
    """needs of each unit (earlier ones), and a unit to change, in one of several ways"""
    needs = [draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(draw(st.integers(2, 7)))]
    return needs, draw(st.integers(0, len(needs) - 1)), draw(st.sampled_from(["argument", "need", "damage", "loss"]))


@given(changes())
@settings(max_examples=40)
def test_a_change_redoes_a_unit_and_what_rests_on_it_alone(case):
    needs, changed, how = case
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")

        def make(needs):
            return [
                unit(f"n{i % 2}/{i}", i, log, tuple(f"n{j % 2}/{j}" for j in sorted(n))) for i, n in enumerate(needs)
            ]

        units = make(needs)
        run(units, Path(folder, "out"))
        log.unlink()
        redone = {changed}
        if how == "argument":
            units[changed] = replace(units[changed], arguments=units[changed].arguments | {"value": 50 + changed})
        elif how == "need":
            needs = [{*n, 0} if i == changed else n for i, n in enumerate(needs)] if changed else needs
            redone = redone if make(needs) != units else set()
            units = make(needs)
        elif how == "damage":
            Path(folder, "out/jobs", units[changed].name, "job.json").write_text('{"key')
        else:
            Path(folder, "out/jobs", units[changed].name, "job.json").unlink()
        if how in ("argument", "need"):  # a folder made anew from the same is the same
            for i, n in enumerate(needs):
                redone |= {i} if n & redone else set()
        records = run(units, Path(folder, "out"))
        assert sorted(value % 50 for value in calls(log)) == sorted(redone)
        assert what(records) == what(run(units, Path(folder, "fresh")))
        assert records == whole(Path(folder, "out"))


def test_other_code_redoes_everything_and_other_labels_nothing(tmp_path):
    units, log = diamond(tmp_path / "log"), tmp_path / "log"
    run(units, tmp_path)
    (tmp_path / "jobs" / "base" / "left over").write_text("by the older code")
    run(units, tmp_path, code="2")
    assert len(calls(log)) == 8 and not (tmp_path / "jobs" / "base" / "left over").exists()
    units = [replace(unit, phase="other", labels={"seed": (3,)}) for unit in units]
    records = run(units, tmp_path, code="2")
    assert len(calls(log)) == 8
    assert {record["phase"] for record in records.values()} == {"other"} and records == whole(tmp_path)


@dataclass
class Options:
    value: int
    log: str


def with_options(tick, folder, needs, options):
    assert isinstance(options, Options)
    options.value += 1  # as in a process of its own, nobody else sees it
    with open(options.log, "a") as file:
        file.write("7\n")


def test_arguments_may_be_dataclasses(tmp_path):
    options = Options(1, str(tmp_path / "log"))
    for value, times in ((1, 1), (1, 1), (2, 2)):
        options.value = value
        assert run([Unit("u", with_options, {"options": options})], tmp_path)["u"]["result"] is None
        assert len(calls(tmp_path / "log")) == times and options.value == value


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_failure_running_units_are_finished_and_the_rest_goes_on_later(tmp_path, workers):
    log, repaired = tmp_path / "log", tmp_path / "data"
    units = [
        unit("good", 1, log),
        unit("bad", 2, log, ("good",), fails=str(repaired)),
        unit("long", 3, log, ("good",), seconds=1.0),  # runs when the one above fails, if there are two workers
        unit("after bad", 4, log, ("bad",)),
        unit("never", 5, log, ("good",)),
    ]
    text = io.StringIO()
    with pytest.raises(DataError, match="^bad: line 3: no such thing. Finished jobs are kept: .* goes on from there.$"):
        run(units, tmp_path / "out", workers, console=Console(file=text))
    assert "bad failed: DataError: line 3" in text.getvalue()
    assert ("waiting for the end of long" in text.getvalue()) == (workers == 2)
    done = {"good", "long"} if workers == 2 else {"good"}
    assert set(whole(tmp_path / "out")) == done
    assert sorted(calls(log)) == ([1, 2, 3] if workers == 2 else [1, 2])
    assert not (tmp_path / "out" / ".running").exists()
    repaired.touch()
    log.unlink()
    assert set(run(units, tmp_path / "out")) == {unit.name for unit in units}
    assert calls(log) == [i for i, unit in enumerate(units, 1) if unit.name not in done]


@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("bug", UnitError, "^second: KeyError: 'a bug'. Finished"),
        ("write", WriteError, r"^\[Errno 13\] second: could not write it. Finished"),
        ("full", WriteError, r"^\[Errno 28\] second: could not write .*jobs/second: the disk is full"),
        ("interrupt", KeyboardInterrupt, None),
    ],
)
def test_an_error_names_its_unit(tmp_path, name, kind, message):
    units = [unit("first", 1, tmp_path / "log"), unit("second", 2, tmp_path / "log", fails=str(tmp_path / name))]
    with pytest.raises(kind, match=message) as raised:
        run(units, tmp_path / "out")
    if kind is not KeyboardInterrupt:
        assert raised.value.__cause__ is ERRORS[name]
    if kind is WriteError:
        assert raised.value.errno == (28 if name == "full" else 13)
    assert list(whole(tmp_path / "out")) == ["first"] and not (tmp_path / "out" / ".running").exists()


def returns(tick, folder, needs, what):
    return {"nan": float("nan"), "set": {1, 2}}[what]


@pytest.mark.parametrize("result", ["nan", "set"])
def test_a_result_that_is_no_json_is_an_error(tmp_path, result):
    with pytest.raises(UnitError, match="u: TypeError: its result must be JSON, with finite numbers"):
        run([Unit("u", returns, {"what": result})], tmp_path)
    assert not (tmp_path / "jobs").exists()


def make(**changed):
    return Unit(**{"name": "u", "function": total, "arguments": {}} | changed)


@pytest.mark.parametrize(
    "units, message",
    [
        ([make(), make()], "unit 'u' is there twice"),
        ([make(needs=("base",))], "unit 'u' needs 'base', which is no unit"),
        (
            [make(name="a", needs=("c",)), make(name="b", needs=("a",)), make(name="c", needs=("b",))],
            "in a circle: .*a",
        ),
        ([make(), make(name="u/v")], "unit 'u/v' would be inside the folder of 'u'"),
        ([make(function=lambda tick, folder, needs: None)], "unit 'u': its function must be of a module's top level"),
        ([make(arguments={"path": Path("x")})], "unit 'u': arguments and labels must be JSON or .* PosixPath"),
        ([make(arguments={"x": float("nan")})], "unit 'u': arguments and labels must be JSON"),
        ([make(labels={"x": {1}})], "unit 'u': arguments and labels must be JSON"),
        *(
            ([make(name=name)], f"unit {name!r}: a name must be")
            for name in ("", "/u", "../u", "a//b", "a/", ".u", ".")
        ),
    ],
)
def test_units_that_make_no_sense_are_refused_before_anything_is_written(tmp_path, units, message):
    with pytest.raises(ValueError, match=message):
        run(units, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_and_workers_are_checked(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="out: .*file is a file; give a folder"):
        run([make()], tmp_path / "file")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        run([make()], tmp_path / "out", workers=0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def run_again(tick, folder, needs, out):
    try:
        run([make()], out)
    except DataError as error:
        return {"error": str(error)}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    records = run([Unit("u", run_again, {"out": str(tmp_path)})], tmp_path)
    assert records["u"]["result"]["error"].startswith(f"out: another run is at work in {tmp_path}; wait for its end")


# ---------------------------------------------------------------------------------------------------------------------
# Runs that are killed


def many(log, seconds, stuck=None):
    """Three seeds of: base and teacher, three arms from them, RL of each; one unit needs all RL. 25 units in all.

    They take about `seconds` each, those of the phase `stuck` ten minutes.
    """
    units = []
    for seed in range(3):
        units += [unit(f"{name}/{seed}", 100 * seed + i, log) for i, name in enumerate(("base", "teacher"))]
        for i in range(3):
            units.append(unit(f"sft/{i}/{seed}", 100 * seed + 10 + i, log, (f"base/{seed}", f"teacher/{seed}")))
            units.append(unit(f"rl/{i}/{seed}", 100 * seed + 20 + i, log, (f"sft/{i}/{seed}",)))
    units.append(unit("mean", 1000, log, tuple(u.name for u in units if u.phase == "rl")))
    rng = random.Random(5)
    lengths = [seconds * (0.2 + 1.6 * rng.random()) if u.phase != stuck else 600.0 for u in units]
    return [replace(u, arguments=u.arguments | {"seconds": length}) for u, length in zip(units, lengths, strict=True)]


class Child:
    """A run of `many` in a process of its own, in `folder`/out and with `folder`/log."""

    def __init__(self, folder, workers, seconds, stuck=None):
        self.log = folder / "log"
        arguments = f"many({str(self.log)!r}, {seconds}, {stuck!r}), {str(folder / 'out')!r}, workers={workers}"
        script = folder / "script.py"
        script.write_text(
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            "from test_graph import many, run_units\n"
            f"if __name__ == '__main__':\n    run_units({arguments}, code='1')\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_until(self, reached):
        """Until `reached(values of the units started)`."""
        while not reached(calls(self.log)):
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)

    def wait_for_end(self) -> str:
        """What was printed, when the process and its workers are no more: they would hold the lock on the log."""
        text, _ = self.process.communicate(timeout=60)
        with open(self.log) as file:
            until = time.monotonic() + 60
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return text
                except BlockingIOError:
                    assert time.monotonic() < until, "workers outlive their parent"
                    time.sleep(0.05)


@pytest.mark.slow
def test_killed_at_any_time_a_run_goes_on_where_it_was(tmp_path):
    log, out, units = tmp_path / "log", tmp_path / "out", many(tmp_path / "log", 0.15)
    names = {unit.arguments["value"]: unit.name for unit in units}
    rng = random.Random(1)
    before, kept = 0, set()
    for workers, count in ((2, 3), (2, 8), (1, 3)):
        child = Child(tmp_path, workers, 0.15)
        child.wait_until(lambda started, count=before + count: len(started) >= count)
        time.sleep(0.3 * rng.random())
        child.process.kill()
        text = child.wait_for_end()
        assert child.process.returncode == -signal.SIGKILL, text
        started, done = [names[value] for value in calls(log)[before:]], set(whole(out))
        assert done >= kept and not kept & set(started)
        assert len(set(started)) == len(started) and len(set(started) - done) <= workers
        before, kept = before + len(started), done
    records = run(units, out, workers=2)
    assert sorted(names[value] for value in calls(log)[before:]) == sorted(set(names.values()) - kept)
    assert {p.name for p in out.iterdir()} == {"jobs"}
    assert what(records) == what(whole(out)) == what(run(units, tmp_path / "fresh"))


def stuck(values):
    return {value for value in values if value % 100 // 10 == 1}  # those of the phase sft


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_however_a_run_is_ended_its_workers_end_in_the_middle_of_their_work(tmp_path, end):
    child = Child(tmp_path, 2, 0.1, stuck="sft")
    child.wait_until(lambda started: len(stuck(started)) == 2)
    if end == signal.SIGINT:
        os.killpg(child.process.pid, end)  # as a terminal does
    else:
        child.process.kill()
    text = child.wait_for_end()
    # Python ends an interrupted program by the signal itself, or by 1 where something else reports the interrupt
    assert child.process.returncode in ((-end, 1) if end == signal.SIGINT else (-end,)), text
    assert (end == signal.SIGKILL) == ("KeyboardInterrupt" not in text)
    started = set(calls(tmp_path / "log"))
    assert {record["labels"]["value"] for record in whole(tmp_path / "out").values()} == started - stuck(started)
    if end == signal.SIGINT:
        assert text.count("Traceback") == 1  # the parent's, and none of a worker's
        assert {p.name for p in (tmp_path / "out").iterdir()} == {"jobs"}


# ---------------------------------------------------------------------------------------------------------------------
# Progress


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=12), st.integers(1, 5))
def test_the_estimate_is_as_good_as_a_schedule_allows(lengths, workers):
    """Units that need nothing, begun in turn by whoever is free, end between the bound and twice it (Graham, 1969)."""
    phases = [str(i) for i in range(len(lengths))]
    left = seconds_left([(phase, 0.0) for phase in phases], zip(phases, lengths, strict=True), workers)
    free = [0.0] * workers
    for length in lengths:
        free[free.index(min(free))] += length
    assert left * (1 - 1e-9) <= max(free) <= left * (2 - 1 / workers) * (1 + 1e-9)


def test_the_estimate_uses_what_it_knows():
    assert seconds_left([("sft", 0.0)], [], 2) is None
    finished = [("sft", 10.0), ("sft", 20.0), ("rl", 60.0)]  # 30 s on average
    assert seconds_left([("sft", 0.0)] * 8, finished, 2) == 60
    assert seconds_left([("sft", 0.0)], finished, 2) == 15  # one unit is not shared out
    assert seconds_left([("rl", 45.0), ("sft", 99.0)], finished, 1) == 15  # late, but not less than nothing
    assert seconds_left([("eval", 0.0)] * 3, finished, 1) == 90  # a phase of which none is finished
    assert seconds_left([], finished, 2) == 0


def test_times_are_told_in_words():
    told = [left_text(seconds) for seconds in (None, 0, 59.6, 99.4, 100, 43 * 60, 99.4 * 60, 125 * 60, 26.5 * 3600)]
    assert told == ["? left", *(f"about {time} left" for time in (
        "0 s", "60 s", "99 s", "2 min", "43 min", "99 min", "2 h 05 min", "26 h 30 min"
    ))]  # fmt: skip


def test_progress_in_a_file_is_a_line_a_unit_and_on_a_terminal_bars(tmp_path):
    text = io.StringIO()
    units = diamond(tmp_path / "log", seconds=0.02)
    run(units[:1], tmp_path / "out", console=Console(file=text))
    assert re.fullmatch(r"\[1/1\] base  0 s   about 0 s left\n", text.getvalue())
    text = io.StringIO()
    run(units, tmp_path / "out", console=Console(file=text))
    lines = text.getvalue().splitlines()
    assert lines[0] == "1 of 4 jobs kept from an earlier run"
    assert [re.sub("about .*", "about", line) for line in lines[1:]] == [
        f"[{i}/4] {name}  0 s   about" for i, name in enumerate(("arm/b", "arm/c", "end"), 2)
    ]
    text = io.StringIO()
    run(diamond(tmp_path / "log", seconds=0.5), tmp_path / "out", console=Console(file=text, force_terminal=True))
    assert "arm/b" in text.getvalue() and "3 of 4 jobs" in text.getvalue() and "[2/4]" not in text.getvalue()
