"""What test_shards.py runs in the processes of a group, and once more in one process with the whole head.

A case is a `Problem`, how it is called, and what of it is trained. `everything` goes through all cases in one process
of a group, as starting processes is what takes the time, and leaves the answers in a file a rank.
"""

import datetime
import functools
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from problems import (
    UPSTREAM,
    Problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
    random_blocks,
    workspace,
)
from torch import Tensor

from pear_kernels import (
    LinearPEARLoss,
    Teacher,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
)
from pear_kernels.engine import packing

V = 37
# rows of each rank: far from equal, one of a single row among them. What DTensor makes of 37 rows is a case of its own
SIZES = {2: (30, 7), 4: (1, 20, 9, 7)}
LENGTHS = (70, 3, 0, 50, 1, 60)


@dataclass
class Case:
    problem: Problem
    options: dict = field(default_factory=dict)
    trained: tuple[str, ...] = ("hidden", "weight", "bias")
    tolerance: float | None = None  # relative; None: that of the dtype
    call: object = None  # in place of the problem's own loss: (leaves, problem, **options) -> (loss, outputs)


@functools.cache
def cases(world: int) -> dict[str, Case]:
    ranges = [0, *torch.tensor(SIZES[world]).cumsum(0).tolist()]
    found: dict[str, Case] = {}
    several = {"workspace_bytes": workspace(20, max(SIZES[world]))}  # seven chunks or more
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        small = {"workspace_bytes": workspace(20, max(SIZES[world]), dtype.itemsize)}
        for level in ("token", "block", "sequence"):
            # float32 log-probs are off by 1e-6 at logits of 30, and a suffix of 70 tokens adds that up
            found[f"pear-{level}-{name}"] = Case(
                make_problem(LENGTHS, dtype=dtype, bias=True, D=64),
                {"level": level, **small},
                tolerance=1e-5 if dtype == torch.float32 else None,
            )
        found[f"ppo-{name}"] = Case(make_policy_problem(dtype=dtype, ref=True, beta=0.1, bias=True, V=V))
        found[f"entropy-bonus-{name}"] = Case(
            make_policy_problem(dtype=dtype, bias=True), {"entropy_coef": 0.3, "softcap": 4.0, "temperature": 0.7}
        )
        found[f"own-loss-{name}"] = Case(make_problem(dtype=dtype, bias=True), call=own_loss)
    found["bfloat16"] = Case(make_problem(dtype=torch.bfloat16, bias=True, D=64), tolerance=6e-3)
    found["softcap-and-temperature"] = Case(make_problem(bias=True), {"softcap": 3.0, "temperature": 0.7})
    found["own-buffers"] = Case(make_problem(LENGTHS, D=4), {"level": "sequence", **several})
    found["centered"] = Case(make_problem(LENGTHS), {"level": "block", "center": True, **several})
    found["normalize-batch"] = Case(make_problem(LENGTHS), {"normalize": "batch", **several})
    labels = torch.tensor([True, False, True, False, True, False])
    found["labels"] = Case(make_problem(LENGTHS), {"level": "sequence", "sequence_label": labels})
    found["block-ids"] = Case(make_problem(LENGTHS), {"level": "block", "block_ids": random_blocks(LENGTHS)})
    for weighting in ("tensor", "none", "dft", "iw-sft", "psft", "asft", "idft"):
        found[f"weighted-{weighting}"] = Case(make_weighted_problem(weighting=weighting, bias=True))
    found["weighted-function"] = Case(
        make_weighted_problem(weighting="none"), {"weighting": None, "ref_logprobs": None, "weights": torch.exp}
    )
    for objective in ("dapo", "dr_grpo", "gspo", "gspo_token", "cispo", "sapo"):
        found[objective] = Case(make_policy_problem(LENGTHS, sampler=True, objective=objective), several)
    found["all-ignored"] = Case(make_problem(ignored=1.0, bias=True))
    found["one-token"] = Case(make_problem((1,), ignored=0.0, bias=True))
    found["frozen-head"] = Case(make_problem(LENGTHS), {"level": "sequence", **several}, trained=("hidden",))
    found["only-the-head"] = Case(make_problem(bias=True), trained=("weight", "bias"))
    found["only-the-bias"] = Case(make_problem(bias=True), trained=("bias",))
    found["scoring"] = Case(make_problem(LENGTHS, bias=True), several, trained=(), call=own_loss)
    found["static"] = Case(make_problem(LENGTHS, bias=True), {"level": "sequence", **several}, call=static)
    for kind in ("confident", "far", "very-far"):
        for dtype in (torch.float64, torch.float32):
            for call in (None, own_loss):
                of = extreme(kind, dtype, ranges)
                name = f"{kind}{'' if call is None else '-entropy'}-{str(dtype).removeprefix('torch.')}"
                found[name] = Case(of, call=call)
    return found


def extreme(kind: str, dtype: torch.dtype, ranges: list[int]) -> Problem:
    """Logits of W = 1, D = V: log p of -1e-9 or of -60 (exp of more overflows) or -800, each with any rank as owner.

    "far": the token that has all of the mass is the owner's own in half of the rows, else another rank's.
    """
    rng = torch.Generator().manual_seed(3)
    target = torch.tensor([*range(0, V, 2), *ranges[:-1]])
    logits = torch.rand(len(target), V, generator=rng, dtype=torch.float64)
    height = {"confident": 20.0, "far": 60.0, "very-far": 800.0}[kind]
    if kind == "confident":
        logits[torch.arange(len(target)), target] += height
    else:
        others = (target + torch.where(torch.arange(len(target)) % 2 == 0, 1, V // 2)) % V
        logits[torch.arange(len(target)), others] += height
    behavior = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    columns = logits.to(dtype), torch.eye(V, dtype=dtype), target, behavior.to(dtype)
    return Problem(*columns, torch.tensor([0, len(target)], dtype=torch.int32), {"log_ratio_clip": (-1.0, 1.0)})


def own_loss(leaves: dict[str, Tensor], problem: Problem, **options):
    """`linear_logprobs` under a loss of the test's own."""
    options = {
        name: value for name, value in options.items() if name in ("bias", "group", "workspace_bytes", "backend")
    }
    logprobs, entropy = linear_logprobs(
        leaves["hidden"], leaves["weight"], problem.target, return_entropy=True, **options
    )
    return -(logprobs * torch.linspace(-1, 2, len(logprobs))).sum() - 0.1 * entropy.square().sum(), (logprobs, entropy)


def static(leaves: dict[str, Tensor], problem: Problem, **options):
    """As while a CUDA graph is captured."""
    before, packing.capturing = packing.capturing, lambda: True
    try:
        out = linear_pear_loss(
            leaves["hidden"], leaves["weight"], problem.target, problem.behavior_logprobs,
            cu_seqlens=problem.cu_seqlens, **options,
        )  # fmt: skip
    finally:
        packing.capturing = before
    return out.loss, (out.logprobs, out.weights)


def answer(case: Case, rows: slice = slice(None), **group) -> dict[str, Tensor]:
    """Loss, outputs and gradients, of the head's `rows`."""
    problem = case.problem
    leaves = {"hidden": problem.hidden, "weight": problem.weight[rows]}
    if "bias" in problem.options:
        leaves["bias"] = problem.options["bias"][rows]
    leaves = {name: leaf.clone().requires_grad_(name in case.trained) for name, leaf in leaves.items()}
    options = {**problem.options, **case.options, **{name: leaves[name] for name in ("bias",) if name in leaves}}
    if case.call is not None:
        loss, outputs = case.call(leaves, problem, **options, **group)
    else:
        out = problem.loss(
            leaves["hidden"], leaves["weight"], problem.target, problem.behavior_logprobs,
            cu_seqlens=problem.cu_seqlens, **options, **group,
        )  # fmt: skip
        loss, outputs = out.loss, (out.logprobs, out.weights, torch.stack(list(out.stats.values())))
    if case.trained:
        (UPSTREAM * loss).backward()
    named = dict(zip(("loss", "logprobs", "second", "stats"), (loss, *outputs), strict=False))
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: value.detach() for name, value in {**named, **grads}.items()}


# ---- in a process of a group


def everything(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    begin = sum(SIZES[world][:rank])
    rows, group = slice(begin, begin + SIZES[world][rank]), dist.group.WORLD
    found = {}
    for name, case in cases(world).items():
        found[name] = attempt(lambda case=case: answer(case, rows, group=group))
    again = cases(world)["pear-sequence-float32"]
    found["again"] = attempt(lambda: answer(again, rows, group=group))
    functions = top_k, dtensors, loss_parallel, module, errors, subgroups, leaving_out
    for function in (*functions, *([compiled] if world == 2 else [])):
        found[function.__name__] = attempt(functools.partial(function, rank, world, rows))
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def attempt(function):
    """What it returns, or its traceback as a string."""
    try:
        return function()
    except Exception:
        return traceback.format_exc()


def top_k(rank: int, world: int, rows: slice):
    problem = make_problem(bias=True)
    bias = problem.options["bias"]
    found = {}
    for k in (1, 5, 33):  # more than a shard has
        out = linear_topk_logprobs(
            problem.hidden, problem.weight[rows], problem.target, k, bias=bias[rows], group=dist.group.WORLD,
            workspace_bytes=workspace(9, V),
        )  # fmt: skip
        found[f"ids{k}"], found[f"logprobs{k}"] = out
    return found


def dtensors(rank: int, world: int, rows: slice):
    """Loss and whole gradients, of a head that DTensor shards and of one that it repeats."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, problem, found = init_device_mesh("cpu", (world,)), make_problem(bias=True), {}
    for placement in (Shard(0), Replicate()):
        hidden = distribute_tensor(problem.hidden, mesh, [Replicate()]).requires_grad_()
        weight, bias = (
            distribute_tensor(tensor, mesh, [placement]).requires_grad_()
            for tensor in (problem.weight, problem.options["bias"])
        )
        out = linear_pear_loss(
            hidden, weight, problem.target, problem.behavior_logprobs, bias=bias, cu_seqlens=problem.cu_seqlens
        )
        (UPSTREAM * out.loss).backward()
        assert weight.grad.placements == bias.grad.placements == (placement,)
        key = "shard" if placement.is_shard() else "replicate"
        leaves = {"hidden": hidden, "weight": weight, "bias": bias}
        grads = {f"grad_{name}": leaf.grad.full_tensor() for name, leaf in leaves.items()}
        found[key] = {"loss": out.loss.detach(), "logprobs": out.logprobs, **grads}
    return found


def loss_parallel(rank: int, world: int, rows: slice):
    """PyTorch's own vocabulary-parallel cross-entropy, and ours: loss, dX, and dW of this rank."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
    from torch.distributed.tensor.parallel import loss_parallel

    mesh, problem, found = init_device_mesh("cpu", (world,)), make_problem(LENGTHS), {}
    for name in ("ours", "theirs"):
        hidden = distribute_tensor(problem.hidden, mesh, [Replicate()]).requires_grad_()
        weight = distribute_tensor(problem.weight, mesh, [Shard(0)]).requires_grad_()
        if name == "ours":
            loss = linear_weighted_loss(hidden, weight, problem.target, weighting="none").loss
            loss.backward()
        else:
            with loss_parallel():
                logits = (hidden @ weight.t()).redistribute(placements=[Shard(1)])
                loss = torch.nn.functional.cross_entropy(logits, problem.target)
                loss.backward()
            loss = loss.full_tensor()
        found[name] = [loss.detach(), hidden.grad.full_tensor(), weight.grad.to_local()]
    return found


def module(rank: int, world: int, rows: slice):
    problem = make_problem()
    loss = LinearPEARLoss(level="block")
    columns = problem.target, problem.behavior_logprobs
    return {
        "loss": loss(
            problem.hidden, problem.weight[rows], *columns, cu_seqlens=problem.cu_seqlens, group=dist.group.WORLD
        ).loss,
        "whole": loss(problem.hidden, problem.weight, *columns, cu_seqlens=problem.cu_seqlens).loss,
    }


def leaving_out(rank: int, world: int, rows: slice):
    """Each rank chooses among its own columns what a tenth of the gradient leaves out."""
    case = Case(make_problem(LENGTHS, seed=2), {"gradient_tolerance": 0.1, "workspace_bytes": workspace(40, V)})
    case.problem.hidden.mul_(3)
    return {"found": answer(case, rows, group=dist.group.WORLD), "exact": answer(Case(case.problem))}


def subgroups(rank: int, world: int, rows: slice):
    """Two ways of data parallelism over heads of two shards, each with its own tokens; one group of a single rank."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "vocabulary"))
    group = mesh["vocabulary"].get_group()
    problem = make_problem(seed=mesh.get_local_rank("data"))
    begin = 19 * mesh.get_local_rank("vocabulary")
    found = answer(Case(problem), slice(begin, begin + 19), group=group)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    assert torch.equal(answer(Case(problem), group=alone)["grad_hidden"], answer(Case(problem))["grad_hidden"])
    return {"seed": mesh.get_local_rank("data"), "begin": begin, **found}


def compiled(rank: int, world: int, rows: slice):
    """In one graph, with a group and with a DTensor: the same bits as without."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    problem, group = make_problem(dtype=torch.float32), dist.group.WORLD
    sharded = distribute_tensor(problem.weight, init_device_mesh("cpu", (world,)), [Shard(0)])
    for weight, options in ((problem.weight[rows], {"group": group}), (sharded, {})):

        def loss(hidden, weight, options=options):
            logprobs = linear_logprobs(hidden, weight, problem.target, **options)
            return (
                2 * logprobs.sum()
                + linear_pear_loss(
                    hidden, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, **options
                ).loss
            )

        found = []
        for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            hidden, leaf = problem.hidden.clone().requires_grad_(), weight.detach().clone().requires_grad_()
            value = call(hidden, leaf)
            value.backward()
            found.append([value.detach(), hidden.grad, leaf.grad.to_local() if weight is sharded else leaf.grad])
        for eager, traced in zip(*found, strict=True):
            torch.testing.assert_close(traced, eager, rtol=1e-6, atol=1e-7)
    return True


def errors(rank: int, world: int, rows: slice):
    """The message of each; every rank must raise, or the others would wait for it."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh, problem = init_device_mesh("cpu", (world,)), make_problem(bias=True)
    backwards = DeviceMesh("cpu", list(range(world))[::-1])
    plane = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "vocabulary"))
    hidden, target, group = problem.hidden, problem.target, dist.group.WORLD
    weight, bias = problem.weight, problem.options["bias"]
    of_rows = functools.partial(linear_weighted_loss, weighting="none", group=group)
    outside = target.clone()
    outside[4] = V
    whole = distribute_tensor(weight, mesh, [Shard(0)])
    teacher = Teacher(hidden, weight)

    def message(call) -> str:
        try:
            call()
        except (ValueError, TypeError) as error:
            return str(error)
        return "no error"

    calls = {
        "columns": lambda: of_rows(hidden, distribute_tensor(weight, mesh, [Shard(1)]), target, group=None),
        "plane": lambda: of_rows(hidden, distribute_tensor(weight, plane, [Replicate(), Shard(0)]), target, group=None),
        "backwards": lambda: of_rows(hidden, distribute_tensor(weight, backwards, [Shard(0)]), target, group=None),
        "both": lambda: of_rows(hidden, whole, target),
        "bias": lambda: of_rows(
            hidden, whole, target, bias=distribute_tensor(bias, mesh, [Replicate()]), group=None
        ),
        "bias of a plain weight": lambda: of_rows(
            hidden, weight[rows], target, bias=distribute_tensor(bias, mesh, [Shard(0)])
        ),
        "whole bias": lambda: of_rows(hidden, weight[rows], target, bias=bias),
        "hidden": lambda: of_rows(distribute_tensor(hidden, mesh, [Shard(0)]), weight[rows], target),
        "tokens": lambda: of_rows(hidden, weight[rows], (target + rank).where(target >= 0, -100) % V),
        "length": lambda: of_rows(hidden[rank:], weight[rows], target[rank:]),
        "training": lambda: of_rows(hidden, weight[rows].clone().requires_grad_(rank == 1), target),
        "workspace": lambda: of_rows(hidden, weight[rows], target, workspace_bytes=1000 + rank),
        "tolerance": lambda: of_rows(hidden, weight[rows], target, gradient_tolerance=0.1 * (rank == 1)),
        "outside": lambda: of_rows(hidden, weight[rows], outside),
        "empty": lambda: of_rows(hidden, weight if rank == 0 else weight[:0], target),
        "k": lambda: linear_topk_logprobs(hidden, weight[rows], target, V, group=group),
        "distill": lambda: linear_distill_loss(hidden, weight[rows], teacher, target, group=group),
        "reference": lambda: of_rows(hidden, weight[rows], target, weighting="asft", reference=teacher),
        "no group": lambda: of_rows(hidden, weight[rows], target, group="tp"),
    }  # fmt: skip
    return {name: message(call) for name, call in calls.items()}
