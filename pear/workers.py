"""Processes of one thread each that do jobs, one at a time, and that end when the process that started them does.

Two processes of one thread each do more on two cores than one of two threads: the tensors of small models are too small
to share out. And what a job computes is the same in whichever process it runs, since it has one thread everywhere.

Nothing heavy is imported above: a new process watches over its parent before torch is there.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

TICK = 0.1  # seconds between two ticks that are passed on, at least
GRACE = 5.0  # seconds that a process is given to end when it is told to


class Job(NamedTuple):
    function: Callable[..., Any]  # of a module's top level; called as function(tick, **arguments), tick(done, total)
    arguments: dict[str, Any]


class Outcome(NamedTuple):
    name: Hashable
    result: Any
    error: Exception | None

    def get(self) -> Any:
        """The result, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.result


class WorkerDied(RuntimeError):
    """A process ended in the middle of its job, without an exception: killed, most often for want of memory."""


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Up to `count` jobs at once in processes of their own; with `count` 1, one after the other in this process.

    Processes start when a job needs one and stay until the end of the `with` block, which ends unfinished jobs too.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"workers must be at least 1, got {count}")
        self.count = count
        self._workers: list[_Worker] = []
        self._here: tuple[Hashable, Job] | None = None  # the job to run in this process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            for worker in self._workers:
                worker.end()
            until = time.monotonic() + GRACE
            for worker in self._workers:
                worker.process.join(max(0.0, until - time.monotonic()))
        finally:
            for worker in self._workers:
                worker.process.kill()
            for worker in self._workers:
                worker.process.join()
            self._workers = []

    def run(
        self,
        take: Callable[[], tuple[Hashable, Job] | None],
        ticked: Callable[[Hashable | None, float], None],
        finished: Callable[[Outcome], None],
    ) -> dict[Hashable, Exception]:
        """Run jobs until there are none. After a first error no job starts; those that run go on to their end.

        Args:
            take: the next job and its name, or None as long as there is none to start; asked again after each finish
            ticked: told how far the job of this name is, 0 to 1 (0 when it starts); with None, that time has passed
            finished: told how a job ended; what it raises, `Outcome.get` included, is the job's error

        Returns:
            errors by name, the first one first; empty if all went well
        """
        errors: dict[Hashable, Exception] = {}
        while True:
            while not errors and self._free() and (item := take()) is not None:
                self._start(*item)
                ticked(item[0], 0.0)
            if not self._running():
                return errors
            for outcome in self._collect(ticked):
                try:
                    finished(outcome)
                except Exception as error:
                    errors[outcome.name] = error
            ticked(None, 0.0)

    def _free(self) -> bool:
        return self._running() < self.count

    def _running(self) -> int:
        return (self._here is not None) + sum(worker.busy for worker in self._workers)

    def _start(self, name: Hashable, job: Job) -> None:
        if self.count == 1:
            self._here = (name, job)
            return
        worker = next((worker for worker in self._workers if not worker.busy), None)
        if worker is None:
            self._workers.append(worker := _Worker())
        worker.start(name, job)

    def _collect(self, ticked: Callable[[Hashable, float], None]) -> list[Outcome]:
        """What ended, after a short wait at most; a job in this process is run to its end."""
        if self._here is not None:
            (name, job), self._here = self._here, None
            tick = _tick(lambda share: ticked(name, share))
            try:
                with one_thread():
                    return [Outcome(name, job.function(tick, **job.arguments), None)]
            except Exception as error:
                return [Outcome(name, None, error)]
        outcomes = [worker.refused() for worker in self._workers if worker.refusal is not None]
        busy = {worker.pipe: worker for worker in self._workers if worker.busy}
        for pipe in wait(list(busy), 0.0 if outcomes else TICK):
            worker = busy[pipe]
            name = worker.name
            message = worker.receive()
            if isinstance(message, Outcome):
                outcomes.append(message)
            else:
                ticked(name, message)
        for worker in [worker for worker in self._workers if worker.dead]:
            worker.process.kill()
            worker.process.join()
            self._workers.remove(worker)
        return outcomes


class _Worker:
    """The parent's side of a process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork of a process that has used threads may hang
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,))
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.name: Hashable = None
        self.busy, self.dead = False, False
        self.refusal: Exception | None = None

    def start(self, name: Hashable, job: Job) -> None:
        self.name, self.busy = name, True
        try:
            self.pipe.send(job)
        except Exception as error:  # it cannot be pickled, or (OSError) the process has died since its last job
            self.refusal = error

    def refused(self) -> Outcome:
        error, self.refusal, self.busy = self.refusal, None, False
        self.dead = isinstance(error, OSError)
        return Outcome(self.name, None, error)

    def receive(self) -> float | Outcome:
        """How far the job is, or how it ended."""
        try:
            message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(GRACE)
            code = self.process.exitcode
            how = f"exit code {code}" if code is None or code >= 0 else f"killed by signal {-code}"
            self.busy, self.dead = False, True
            return Outcome(self.name, None, WorkerDied(f"its process ended early ({how}); is there memory enough?"))
        except Exception as error:  # a result that cannot be read
            message = (None, error, "")
        if isinstance(message, float):
            return message
        self.busy = False
        result, error, trace = message
        if error is not None and trace:
            error.__cause__ = _Trace(trace)
        return Outcome(self.name, result, error)

    def end(self) -> None:
        """An idle process ends when its pipe does; a busy one is told to, and cleans up."""
        if self.busy:
            self.process.terminate()
        self.pipe.close()


class _Trace(Exception):
    """Where in a worker an error came from; shown above it."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


# ---------------------------------------------------------------------------------------------------------------------
# In the worker


def _serve(pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # an exception, so that jobs clean up
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
            tick = _tick(pipe.send)
            message = (job.function(tick, **job.arguments), None, "")
        except EOFError:
            return
        except Exception as error:
            message = (None, _portable(error), traceback.format_exc())
        try:
            pipe.send(message)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            pipe.send((None, TypeError(f"a job's result must be picklable: {error}"), ""))
        except OSError:  # nobody listens any more
            return


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its children to end."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """`error`, or its text if it does not survive the way to another process."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _tick(send: Callable[[float], None]) -> Callable[[int, int], None]:
    """tick(done, total) that passes on the share, not more often than anyone can see."""
    last = -TICK

    def tick(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= TICK or done >= total:
            last = now
            send(done / total if total else 1.0)

    return tick


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one thread, as in a worker."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
