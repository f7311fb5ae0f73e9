"""One process of a `pear score` that may be killed on the way; started by test_score_kills.py from a fork server."""

import itertools
import os
import signal
import sys
import time
from typing import Any

FAULTS = ("bytes", "time", "output", "renamed", "none")


def run(rank: int, world: int, port: int, log: str, arguments: dict[str, Any], fault: tuple[str, float]) -> None:
    """Score; `fault` is where this process kills itself: after so many bytes of its side file, say."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if world > 1:
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}

    import torch

    import pear.score
    import pear.scoring.output
    from pear.io import DataError, WriteError
    from pear.scoring.side import SideFiles

    torch.set_num_threads(1)
    _break(pear, SideFiles, *fault)
    try:
        pear.score.score(**arguments, progress=False)
    except (DataError, WriteError) as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _break(pear: Any, side: Any, kind: str, at: float) -> None:
    scored, write, left, rows = pear.score.score_batch, side._write, [at], itertools.count(1)

    def slowly(*args):
        time.sleep(0.02)  # so that what is timed falls between batches, too
        return scored(*args)

    def torn(self, data: bytes) -> None:
        part = data[: int(left[0])]
        left[0] -= len(data)
        if left[0] < 0:
            write(self, part)
            _die()
        write(self, data)

    def sealed(row):
        if next(rows) > at:
            _die()
        return seal(row)

    pear.score.score_batch = slowly
    if kind == "bytes":
        side._write = torn
    elif kind == "output":
        seal, pear.scoring.output.seal = pear.scoring.output.seal, sealed
    elif kind == "renamed":  # `out` is there, and the side files still are
        side.remove = lambda self: _die()
