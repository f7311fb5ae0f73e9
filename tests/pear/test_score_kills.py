"""`pear score` shared by processes and killed anywhere: no row lost, doubled or half-written, and the same bytes."""

import base64
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import score_worker
import torch
from tiny import make_model

from pear.io import read_jsonl
from pear.score import score
from pear.scoring.processes import Processes
from pear.seal import check_seal

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.skipif(sys.platform != "linux", reason="forks and kills"),
]
ROWS = 40
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def context():
    """Forks processes in which torch is loaded already."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["torch", "transformers", "pear.score", "score_worker"])
    return found


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory) -> dict:
    """Two policies and data of both, of none, and the file that an undisturbed process makes of it."""
    folder = tmp_path_factory.mktemp("kills")
    names = []
    for seed in range(2):
        names.append(str(folder / f"model-{seed}"))
        make_model(tokenizer, seed=seed).save_pretrained(names[-1])
        tokenizer.save_pretrained(names[-1])
    policies = [*names, "none", names[0], None]
    with open(folder / "data.jsonl", "w") as file:
        for n in range(ROWS):
            text = {"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}. " + "Let us think. " * (n % 7)}
            policy = policies[n % len(policies)]
            file.write(json.dumps(text | ({} if policy is None else {"behavior_policy": policy})) + "\n")
    arguments = dict(model=None, data=str(folder / "data.jsonl"), fallback=names[1], batch_tokens=120)
    torch.set_num_threads(1)
    score(**arguments, out=folder / "whole", progress=False)
    whole = (folder / "whole").read_bytes()
    assert sum(1 for _ in read_jsonl(folder / "whole")) == ROWS
    for line, row in read_jsonl(folder / "whole"):
        check_seal(row, f"whole:{line}")
    return {"arguments": arguments, "whole": whole, "scored": ROWS - ROWS // 5}


class Team:
    """Processes that share one call."""

    def __init__(self, context, folder, arguments, faults):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        self.out = folder / "out"
        arguments = arguments | {"out": str(self.out)}
        self.processes = [
            context.Process(target=score_worker.run, args=(r, len(faults), port, str(self.log), arguments, fault))
            for r, fault in enumerate(faults)
        ]
        for process in self.processes:
            process.start()

    def codes(self, limit: float = PATIENCE) -> list[int]:
        deadline = time.monotonic() + limit
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        assert None not in codes, f"hangs:\n{self.log.read_text()[-3000:]}"
        return codes

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()


def rows_kept(folder) -> list[int]:
    """Lines of the data in the side files' whole batches, each once."""
    lines = []
    for path in folder.glob("out.*.partial"):
        records = [line for line in path.read_bytes().splitlines(keepends=True)[1:]]
        batch = []
        for text in records:
            if not text.endswith(b"\n"):
                break
            record = json.loads(text)
            if "spans" in record:
                assert record["text"]
                continue
            assert len(base64.b64decode(record["logprobs"])) % 4 == 0
            batch.append(record["line"])
            if record.get("last"):
                lines += batch
                batch = []
    assert len(lines) == len(set(lines))
    return lines


def assert_finished(folder, place) -> None:
    assert (folder / "out").read_bytes() == place["whole"]
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_bytes_of_the_side_file(context, place, tmp_path, seed):
    """Again and again, in the middle of whatever is being written; each call adds what it can."""
    rng = random.Random(seed)
    kept = 0
    for call in itertools.count():
        assert call < 60
        fault = ("bytes", rng.randrange(1, 9000))
        (code,) = Team(context, tmp_path, place["arguments"], [fault]).codes()
        if code == 0:
            break
        assert code == -signal.SIGKILL and not (tmp_path / "out").exists()
        now = len(rows_kept(tmp_path))
        assert now >= kept
        kept = now
    assert call > 0
    assert_finished(tmp_path, place)


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(context, place, tmp_path, seed):
    rng = random.Random(100 + seed)
    for _ in range(4):
        team = Team(context, tmp_path, place["arguments"], [("none", 0)])
        time.sleep(rng.uniform(0.0, 1.2))
        team.kill()
        if (tmp_path / "out").exists():  # whole, whenever it is there
            assert (tmp_path / "out").read_bytes() == place["whole"]
        rows_kept(tmp_path)
    assert Team(context, tmp_path, place["arguments"], [("none", 0)]).codes() == [0]
    assert (tmp_path / "out").read_bytes() == place["whole"]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("fault", [("output", 0), ("output", 17), ("output", ROWS - 1), ("renamed", 0)])
def test_killed_while_the_file_is_written(context, place, tmp_path, fault):
    """Nothing is scored again; what a kill leaves of a temporary file is under another name."""
    assert Team(context, tmp_path, place["arguments"], [fault]).codes() == [-signal.SIGKILL]
    assert (tmp_path / "out").exists() is (fault[0] == "renamed")
    assert len(rows_kept(tmp_path)) == place["scored"]
    summary = score(**place["arguments"], out=tmp_path / "out", progress=False)
    assert summary["resumed"] == summary["scored"] == place["scored"]
    assert (tmp_path / "out").read_bytes() == place["whole"] and not list(tmp_path.glob("*.partial"))


def test_what_was_scored_for_another_choice_of_rows_is_left_alone(context, place, tmp_path):
    """The second policy's rows are others without its estimates."""
    assert Team(context, tmp_path, place["arguments"], [("output", 0)]).codes() == [-signal.SIGKILL]
    before = {path: path.read_bytes() for path in tmp_path.glob("*.partial")}
    summary = score(**place["arguments"] | {"fallback": "none"}, out=tmp_path / "out", progress=False)
    assert summary["resumed"] == 16 and summary["scored"] == 24  # the first policy's are the same
    left = {path: path.read_bytes() for path in tmp_path.glob("*.partial")}
    assert len(before) == 2 and len(left) == 1 and left.items() <= before.items()


def test_two_processes_make_the_file_of_one(context, place, tmp_path):
    team = Team(context, tmp_path, place["arguments"], [("none", 0)] * 2)
    assert team.codes() == [0, 0], team.log.read_text()
    assert_finished(tmp_path, place)


@pytest.mark.parametrize("seed", range(4))
def test_two_processes_killed_and_gone_on_by_any_number(context, place, tmp_path, seed):
    """Both at random bytes; then by one, two or three processes, killed once more; at last by one or two."""
    rng = random.Random(200 + seed)
    kept = 0
    for count in (2, rng.choice((1, 2, 3))):
        faults = [("bytes", rng.randrange(1, 2500)) for _ in range(count)]
        codes = Team(context, tmp_path, place["arguments"], faults).codes()
        assert -signal.SIGKILL in codes and set(codes) <= {-signal.SIGKILL, 1}
        assert not (tmp_path / "out").exists()
        now = len(rows_kept(tmp_path))
        assert now >= kept
        kept = now
    team = Team(context, tmp_path, place["arguments"], [("none", 0)] * rng.choice((1, 2)))
    assert set(team.codes()) == {0}, team.log.read_text()
    assert_finished(tmp_path, place)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_dies(context, place, tmp_path, killed):
    """The other does its own share, says what has happened, and fails; nothing it has scored is lost."""
    faults = [("none", 0), ("none", 0)]
    faults[killed] = ("bytes", 500)
    team = Team(context, tmp_path, place["arguments"], faults)
    codes = team.codes()
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1
    assert "another process of this run ended before it was done" in team.log.read_text()
    assert not (tmp_path / "out").exists()
    kept = len(rows_kept(tmp_path))
    assert kept > 0
    summary = score(**place["arguments"], out=tmp_path / "out", progress=False)
    assert summary["resumed"] == kept
    assert_finished(tmp_path, place)


def test_an_error_in_all_processes_is_told_by_all(context, place, tmp_path):
    arguments = place["arguments"] | {"fallback": None}
    team = Team(context, tmp_path, arguments, [("none", 0)] * 2)
    assert team.codes() == [1, 1]
    log = team.log.read_text()
    assert "error: " in log and "8 rows name no behaviour policy" in log and "process 1 of 2 failed: " in log
    assert not list(tmp_path.glob("out*"))


def test_a_second_run_beside_two_processes_is_refused(context, place, tmp_path):
    team = Team(context, tmp_path, place["arguments"], [("none", 0)] * 2)
    deadline = time.monotonic() + PATIENCE
    while not rows_kept(tmp_path) and time.monotonic() < deadline and not (tmp_path / "out").exists():
        time.sleep(0.01)
    second = Team(context, tmp_path, place["arguments"], [("none", 0)])
    if second.codes() == [1]:  # unless the first were through already
        assert "another process is about to write" in second.log.read_text()
    assert team.codes() == [0, 0], team.log.read_text()
    assert (tmp_path / "out").read_bytes() == place["whole"]


def test_accelerate_launches_it(place, tmp_path):
    """As a user does it; on a CPU accelerate starts several processes only when told that there are several GPUs."""
    arguments = place["arguments"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", port]
    options = ["--data", arguments["data"], "--fallback", arguments["fallback"], "--batch_tokens", "120"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, "--multi_gpu", "-m", "pear", "score", *options, "--out", str(tmp_path / "out")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("rows scored") == 1 and "process 1 of 2" in run.stderr
    assert_finished(tmp_path, place)


def test_a_launcher_that_starts_one_process_alone_is_told(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets this, starts one process, and says nothing."""
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Processes().warning is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert Processes().warning is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert "add --multi_gpu, which works on a CPU too, or start with torchrun" in Processes().warning
