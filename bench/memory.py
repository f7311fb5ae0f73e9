"""How much memory does forward and backward take above its inputs and gradients? Each case in a process of its own.

On a CPU: the process makes the inputs, runs the peer once on a tiny shape (libraries load, thread pools start), hands
freed memory back to the system, and notes its resident size. Then the kernel's high-water mark (VmHWM) is reset, and
read again after the call:

    extra = high-water mark - resident size before - bytes of dX and dW in the inputs' dtype

so that logits, copies, saved activations, float32 accumulators and the products' own scratch all count, whoever
allocates them; a page that was reserved but never touched does not. On a GPU: the allocator's own peak, likewise.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from bench import machine
from bench.peers import PEERS
from bench.shapes import SHAPES, make_inputs

CASES = {
    "cpu-4k": list(PEERS),
    "cpu-16k": ["bare", "pear-token", "pear-block", "pear-sequence", "unweighted", "logprobs"],  # naive: 6 GB and more
    "gpu-8k-152k": list(PEERS),
    "gpu-16k-248k": list(PEERS),
    "gpu-8k-128k": list(PEERS),
}


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most so far)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel reports no {field}; memory is measured on Linux only")


def measure(case: str, peer: str) -> int:
    """Extra peak bytes of one call, in this process."""
    shape = SHAPES[case]
    run = PEERS[peer].run
    run(make_inputs(SHAPES["tiny"]._replace(dtype=shape.dtype, device=shape.device)))
    x = make_inputs(shape)
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(x)
        return torch.cuda.max_memory_allocated() - before - shape.gradient_bytes

    ctypes.CDLL(None).malloc_trim(0)  # else the call would reuse what the set-up has freed, and look smaller
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present size
    before = resident("VmRSS")
    run(x)
    return resident("VmHWM") - before - shape.gradient_bytes


def measure_apart(case: str, peer: str) -> dict:
    """`measure` in a fresh process."""
    command = [sys.executable, "-m", "bench.memory", "--case", case, "--peer", peer]
    done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {peer} on {case} could not be measured:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--peer", choices=PEERS, help="measure this one here and now, and print it")
    parser.add_argument("--json", type=Path, help="measure all and write them here")
    arguments = parser.parse_args()
    if arguments.peer:
        warnings.simplefilter("ignore")
        print(json.dumps({**vars(arguments), "json": None, "bytes": measure(arguments.case, arguments.peer)}))
        return
    rows = []
    for case in [arguments.case] if arguments.case else CASES:
        for peer in CASES[case]:
            reason = PEERS[peer].unavailable(SHAPES[case])
            row = {"case": case, "peer": peer, "skipped": reason} if reason else measure_apart(case, peer)
            rows.append(row)
            print(f"{case:14} {peer:14} {reason or format(row['bytes'] / 2**20, '10.1f') + ' MiB'}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine.facts(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
