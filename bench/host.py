"""What a training call costs the host, without a GPU: `python -m bench.host [--trees before=PATH after=PATH]`.

A call is forward and backward of the Triton backend with a trained head; its kernels and cuBLAS products are recorded
and not launched. Counts are taken on device "meta": kernels, products and torch ops that write to the device (no views,
allocations or empty results; an op counts once, also where CUDA needs several kernels for it), how many of them come
before product 1, the first over the vocabulary, how many of those check values, and the host syncs. Times are taken on
small CPU tensors that stand for a GPU's: an op takes 1 to 10 us there, as its dispatch and launch do on a GPU (on
"meta" most ops are Python code of 60 to 900 us). `host` is the whole call, `shell` the same with an empty body of the
custom op, `op` that op alone: schema, dispatch, autograd. Triton's launcher and the wait in a host sync are not in it.
Trees take turns, in new processes that report the fastest of their repeats: median of processes (lowest to highest).
"""

import argparse
import collections
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import timeit
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pear_kernels

# names before the package had its folders (commit 82971c6), so that one run can measure both; "" for what was not there
RENAMED = {
    "backends.choice": "backend",
    "backends.triton": "triton",
    "engine.walk.Walk.may_branch": "engine.Walk.may_look",
    "ops.loss": "ops.shared",
    "ops.backends.off_cpu": "",
}
PACKAGE = Path(pear_kernels.__file__).parent
SEQUENCES, LENGTH, COUNTED, HIDDEN, VOCABULARY = 4, 32, 24, 16, 256  # the last 24 of 32 tokens of a sequence count
CHUNKS_OF_32 = {"workspace_bytes": 24_000}
GRPO = ("linear_policy_loss", "old_logprobs ref_logprobs sampler_logprobs advantages cu_seqlens")
PEAR = ("linear_pear_loss", "behavior_logprobs cu_seqlens")
CASES = {  # function, its tensors beside hidden, weight and target, and its options
    "pear token": (*PEAR, {}),
    "pear token, 3 chunks": (*PEAR, CHUNKS_OF_32),
    "pear block_ids": (PEAR[0], PEAR[1] + " block_ids", {"level": "block"}),
    "pear sequence": (*PEAR, {"level": "sequence"}),
    "weighted dft": ("linear_weighted_loss", "cu_seqlens", {"weighting": "dft"}),
    "grpo": (*GRPO, {"beta": 0.04}),
    "grpo, 3 chunks": (*GRPO, {"beta": 0.04} | CHUNKS_OF_32),
    "distill forward": ("linear_distill_loss", "teacher behavior_logprobs cu_seqlens", {"divergence": "forward"}),
    "logprobs": ("linear_logprobs", "", {}),
}


def stand_for_a_gpu(recorder) -> None:
    """From now on this process takes its tensors for those of an H100 and appends launches to `recorder`."""
    os.environ["PEAR_KERNELS_BACKEND"] = "triton"
    for name, value in {
        "backends.choice.triton_obstacle": lambda device: None,
        "backends.triton.launch.recorder": recorder,
        "backends.triton.tiles.architecture": lambda device: "sm_90",
        "backends.triton.head.multiply": lambda out, a, b, add=False: recorder.append("multiply"),
        "engine.walk.Walk.may_branch": False,
        "ops.loss.on_gpu": lambda tensor: True,
        "ops.backends.off_cpu": lambda device: True,
        "checks.require": lambda good, rule, found: torch.ops.aten._assert_async.msg(good, rule),
    }.items():
        for now, before in RENAMED.items() if (PACKAGE / "engine.py").exists() else ():
            name = name.replace(now, before)
        if name:
            mock.patch(f"pear_kernels.{name}", value).start()  # an error where there is no such name


def body(name: str) -> Callable:
    """What the op of that name does below autograd."""
    custom = torch._library.custom_ops.OPDEFS.get(f"pear_kernels::{name}")
    return sys.modules["pear_kernels.ops.loss"].compute if custom is None else custom._init_fn


def empty_bodies(passed: dict) -> None:
    """From now on ops do what they do for fake tensors: allocate their results. `passed` gets their first arguments."""

    def empty(op, allocate, *given):
        passed.setdefault(op, given)
        return allocate(*given)

    for name, op in torch._library.custom_ops.OPDEFS.items():
        if name.startswith("pear_kernels::"):
            op._backend_fns[None] = functools.partial(empty, op, op._abstract_fn)
    loss = sys.modules.get("pear_kernels.ops.loss")
    if loss is not None:  # an op without torch's custom_op
        replaced = functools.partial(empty, loss.linear_loss, loss.fake)
        loss.library.impl("linear_loss", replaced, "CompositeExplicitAutograd", allow_override=True)


def training_call(case: str, device: str):
    """A function that makes one call of the case and its backward pass."""
    function, names, options = CASES[case]
    rows = [torch.zeros(n, HIDDEN, dtype=torch.bfloat16, device=device) for n in (SEQUENCES * LENGTH, VOCABULARY)]
    hidden, weight = (x.clone().requires_grad_() for x in rows)
    place, ones = torch.arange(SEQUENCES * LENGTH) % LENGTH, torch.ones(SEQUENCES * LENGTH, device=device)
    target = torch.where(place < LENGTH - COUNTED, -100, 1).to(device)
    known = {"teacher": pear_kernels.Teacher(*rows), "advantages": ones[:SEQUENCES], "block_ids": place.to(device) // 4}
    known["cu_seqlens"] = (LENGTH * torch.arange(SEQUENCES + 1, dtype=torch.int32)).to(device)
    options = options | {name: known.get(name, -ones) for name in names.split()}  # the others are log-probs

    def call() -> None:
        hidden.grad = weight.grad = None
        found = getattr(pear_kernels, function)(hidden=hidden, weight=weight, target=target, **options)
        getattr(found, "loss", found).backward(None if names else ones)

    return call


class Count(TorchDispatchMode):
    """Lists what would be launched, as (what, the function of the package that asks for it, whether for a check)."""

    def append(self, launched) -> None:  # as a recorder of launches, which else is a list
        what = launched if isinstance(launched, str) else launched.kernel.fn.__name__
        frames = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
        frames = [f for f in frames if f.filename.startswith(str(PACKAGE))]
        asks = [f"{Path(f.filename).stem}.{f.name}" for f in frames if f.name != "launch"] or ["autograd"]
        self.launches.append((what, asks[0], "check" in what or any(name.startswith("checks.") for name in asks)))

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        with self:  # ops inside an op: of the package's, else a mode does not see them, and of composite ones
            own = op.namespace == "pear_kernels"
            found = body(op._opname)(*args) if own else op.decompose(*args, **(kwargs or {}))
        if found is not NotImplemented:
            return found
        name = op.overloadpacket.__name__
        if name in ("nonzero", "_local_scalar_dense") and args[0].is_meta:
            self.syncs.append(name)
            found = args[0].new_empty(SEQUENCES * COUNTED, 1, dtype=torch.int64) if name == "nonzero" else 1
        else:
            found = op(*args, **(kwargs or {}))
        written = any(isinstance(x, torch.Tensor) and x.is_meta and x.numel() for x in tree_leaves(found))
        if name.startswith("_assert") or (written and not op.is_view and "empty" not in name):
            self.append(name)
        return found


def counts(case: str) -> dict:
    """`where` has the launches before product 1 by the function that asks for them."""
    call, count, tolist = training_call(case, "meta"), Count(), torch.Tensor.tolist
    count.launches, count.syncs = [], []
    stand_for_a_gpu(count)
    # of tensors on the device, only lengths of sequences are read
    torch.Tensor.tolist = lambda x: count.syncs.append("tolist") or [COUNTED] * len(x) if x.is_meta else tolist(x)
    with count:
        call()
    torch.Tensor.tolist = tolist
    kernels = [what for what, *_ in count.launches]
    before = count.launches[: min(kernels.index(x) for x in ("exp_product", "multiply") if x in kernels)]
    where = collections.Counter(f"{asks}: {what}" for what, asks, _ in before)
    checks = sum(check for *_, check in before)
    return dict(before=len(before), checks=checks, launches=len(kernels), syncs=count.syncs, where=where)


def fastest(calls: dict) -> dict[str, float]:
    """Microseconds of each call in its fastest repeat; the calls take turns."""
    now = time.process_time  # another process on the core counts for less than it would with a clock on the wall
    rounds = [[timeit.timeit(call, timer=now, number=10) for call in calls.values()] for _ in range(40)]
    return {case: round(1e5 * min(repeats), 1) for case, *repeats in zip(calls, *rounds, strict=True)}


def once() -> dict[str, dict]:
    """Counts and times of this process by case."""
    torch.set_num_threads(1)
    found = {case: counts(case) for case in CASES}
    stand_for_a_gpu(collections.deque(maxlen=0))
    calls = {case: training_call(case, "cpu") for case in CASES}
    times, passed, ops = {"host": fastest(calls)}, {}, {}
    empty_bodies(passed)
    for case, call in calls.items():
        passed.clear()
        call()
        op, given = next(iter(passed.items()))  # the forward pass's
        ops[case] = lambda op=op, given=given: op(*given)
    times |= {"shell": fastest(calls), "op": fastest(ops)}
    return {case: found[case] | {what: of[case] for what, of in times.items()} for case in CASES}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--trees", nargs="+", default=["here=."], help="NAME=PATH of checkouts (default: here=.)")
    parser.add_argument("--rounds", type=int, default=7, help="processes for each tree (default 7)")
    parser.add_argument("--json", type=Path, help="write every figure there too, but `where`")
    parser.add_argument("--once", action="store_true", help="measure in this process, and print JSON")
    arguments = parser.parse_args()
    if arguments.once:
        return print(json.dumps(once()))
    trees = dict(tree.split("=", 1) for tree in arguments.trees)
    result: dict = {case: {tree: [] for tree in trees} for case in CASES}  # what each process found
    for tree in [tree for turn in range(arguments.rounds) for tree in list(trees)[:: (-1) ** turn]]:
        environment = os.environ | {"PYTHONPATH": str(Path(trees[tree]).resolve()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", str(Path(__file__).resolve()), "--once"]
        for case, row in json.loads(subprocess.check_output(command, env=environment)).items():
            result[case][tree].append(row)
    if arguments.json:
        from bench import machine

        plain = {case: {tree: list(map(shown, rows)) for tree, rows in of.items()} for case, of in result.items()}
        about = {"machine": machine.facts("cpu"), "trees": {tree: commit(path) for tree, path in trees.items()}}
        arguments.json.write_text(json.dumps(about | {"cases": plain}, indent=1) + "\n")
    print("\n".join(table(result)))


def shown(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "where"}


def commit(tree: str) -> str:
    return subprocess.check_output(["git", "-C", tree, "rev-parse", "--short=10", "HEAD"], text=True).strip()


def table(result: dict) -> list[str]:
    """Markdown: of each case and tree the counts, and the median of its processes' times (lowest to highest)."""
    counted, timed = ("before", "checks", "launches", "syncs"), ("host", "shell", "op")
    head = " | ".join(("case", "tree", *counted, *(f"{key}, us" for key in timed)))
    lines = [f"| {head} |", "| --- | --- |" + " ---: |" * 7]
    for case, tree, rows in [(case, tree, rows) for case, of in result.items() for tree, rows in of.items()]:
        us = [[found[key] for found in rows] for key in timed]
        spreads = [f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in us]
        counts_of = [str(len(rows[0][key]) if key == "syncs" else rows[0][key]) for key in counted]
        lines.append(f"| {' | '.join((case, tree, *counts_of, *spreads))} |")
    return lines


if __name__ == "__main__":
    main()
