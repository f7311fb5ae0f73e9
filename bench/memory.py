"""Memory of forward and backward on a CPU, above inputs and gradients: each case in a process of its own.

The process makes the inputs, runs the peer once on a tiny shape (libraries load, thread pools start), hands freed
memory back to the system, and notes its resident size. Then the kernel's high-water mark (VmHWM) is reset, and read
again after the call:

    extra = high-water mark - resident size before - bytes of dX and dW in the inputs' dtype

so that logits, copies, saved activations, float32 accumulators and the products' own scratch all count, whoever
allocates them; a page that was reserved but never touched does not. On a GPU the allocator's peak is taken beside the
time (bench/measure.py).
"""

import argparse
import ctypes
import gc
import subprocess
import sys
import warnings
from pathlib import Path

from bench import machine
from bench.peers import PEERS
from bench.shapes import SHAPES, make_inputs


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel reports no {field}; memory is measured on Linux only")


def settle() -> int:
    """Hands freed memory back, starts VmHWM again from what is left, and returns that: bytes of VmRSS."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a call would reuse what the set-up has freed, and look smaller
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def measure(case: str, peer: str) -> int:
    """Extra peak bytes of one call, in this process."""
    shape = SHAPES[case]
    run, taught = PEERS[peer].run, PEERS[peer].taught
    x = make_inputs(SHAPES["tiny"]._replace(dtype=shape.dtype))
    run(x.taught() if taught else x)
    x = make_inputs(shape)
    if taught:
        x = x.taught()
    before = settle()
    run(x)
    return resident("VmHWM") - before - PEERS[peer].gradient_bytes(shape)


def measure_apart(case: str, peer: str) -> int:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", case, peer]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return int(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=SHAPES)
    parser.add_argument("peer", choices=PEERS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(measure(arguments.case, arguments.peer))
