"""Vocabulary-sharded (tensor-parallel) heads: each rank of a group holds some rows of W, and all hold the same tokens.

Rank r computes the logits of its own columns. All ranks anchor them on the target's logit a, which the rank that holds
the target computes. A head's ordinary softmax of its own columns and the target is then a distribution with

    n_r = log(1 + sum_{v of r, v != y} exp(z_v - a))        H_r, its entropy

One exchange per chunk of these float64 (R,) is all that ranks need to know of each other:

    n = -log p_y = log(1 + sum_r (exp(n_r) - 1))            p_v = exp(n_r - n) p_v^r,  for v of r
    H = p_y n + sum_r exp(n_r - n) ((1 - exp(-n_r)) n - n_r + H_r)

A rank that had to move its anchor, because of a logit far above the target's, did so for itself: these lines contain no
anchor, and n_r - n is never above 0. Every rank evaluates them on the same numbers in the same order, so coefficients,
weights and the loss are bitwise the same on all ranks, and every rank takes the same decisions.

dW and db belong to a rank's own columns and stay there. dX is a sum over all columns, and therefore over ranks: it is
summed once per chunk, in float32 and in the order of ranks, before it is rounded once.
"""

import functools
import weakref
from collections.abc import MutableMapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from pear_kernels import checks
from pear_kernels.engine.head import BackendHead, BackendLogitsHead, Head, Kept, Scores, Softmax, TeacherRows
from pear_kernels.engine.packing import capturing
from pear_kernels.formulas.activation import Activation
from pear_kernels.formulas.softmax import joint_entropy, joint_nll

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Sizes of a group's shards, by the group and this rank's own size. The key is the object, since another group may later
# get its name.
_sizes: MutableMapping["ProcessGroup", dict[int, tuple[int, ...]]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """Which rows of the vocabulary this rank holds, and how ranks exchange values."""

    group: "ProcessGroup"
    rank: int  # in the group
    sizes: tuple[int, ...]  # rows of each rank, in order

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)

    @property
    def begin(self) -> int:
        return sum(self.sizes[: self.rank])

    def plan(self, head: Head) -> torch.Size:
        """Cut chunks for the largest shard, so that all ranks cut alike. Returns that shard's shape."""
        head.planned = torch.Size((max(self.sizes), head.weight.shape[1]))
        return head.planned

    def find(self, target: Tensor) -> Tensor:
        """(R,) ids of the whole vocabulary as rows of this shard; -1 for those of other ranks."""
        row = target - self.begin
        return row.masked_fill((row < 0) | (row >= self.sizes[self.rank]), -1)

    def pick(self, values: Tensor) -> Tensor:
        """(R,) each value from the one rank where it is not 0: a sum, and exact."""
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks of their `partial` (R, D), in the order of ranks, so that all have the same bits.

        Each rank sums one share and sends it to the others. An all-reduce does the same, but no backend promises its
        order.
        """
        ranks, size = len(self.sizes), partial.numel()
        flat = nn.functional.pad(partial.reshape(-1), (0, -size % ranks))
        shares = torch.empty_like(flat)
        torch.distributed.all_to_all_single(shares, flat, group=self.group)
        total = functools.reduce(torch.add, shares.view(ranks, -1))
        return gather(self.group, total).view(-1)[:size].view_as(partial)


def gather(group: "ProcessGroup", values: Tensor) -> Tensor:
    """(ranks, ...): the `values` (...) of each rank."""
    values = values.contiguous()
    found = values.new_empty(group.size(), *values.shape)
    # newer PyTorch has a new name for it, and warns about the old one
    both = torch.distributed
    all_gather = getattr(both, "all_gather_single", None) or both.all_gather_into_tensor
    all_gather(found.view(-1), values.view(-1), group=group)
    return found


# ---- before a loss runs


def local_head(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D), a DTensor of that shape, or (V_r, D)
    target: Tensor,  # (N,) or (B, T)
    bias: Tensor | None,  # like weight
    group: "ProcessGroup | None",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str | None]:
    """The four as this rank's own tensors, and the name of the group that shares the vocabulary; None without sharing.

    Raises:
        ValueError: for a DTensor with any other layout, naming the argument and what to do.
    """
    plain = all(type(tensor) in (Tensor, nn.Parameter, type(None)) for tensor in (hidden, weight, target, bias))
    if plain or not torch.distributed.is_available():
        return hidden, weight, target, bias, shared_name(group)
    from torch.distributed.tensor import DTensor, Replicate

    if isinstance(weight, DTensor):
        if group is not None:
            raise ValueError("group must be None beside a DTensor weight, whose mesh says who has which rows")
        mesh, placements = weight.device_mesh, weight.placements
        if mesh.ndim != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
            raise ValueError(
                f"weight must be a DTensor of placement Shard(0) or Replicate() on a mesh of one dimension, got "
                f"{placements} on one of {mesh.ndim}: pass weight.redistribute(placements=[Shard(0)]) or "
                "weight.full_tensor(), or its local rows with group=mesh.get_group(name)"
            )
        if isinstance(bias, DTensor) and bias.placements != placements:
            raise ValueError(
                f"bias must be sharded as weight is, {placements}, got {bias.placements}: pass "
                "bias.redistribute(placements=weight.placements)"
            )
        if placements[0].is_shard():
            group = mesh.get_group()
            order = [] if torch.compiler.is_compiling() else mesh.mesh.tolist()  # which cannot be traced
            if order != sorted(order):
                raise ValueError(
                    f"weight must be on a mesh that lists ranks in ascending order, as its group does, got {order}: "
                    "make such a mesh, or pass weight.full_tensor()"
                )
    elif isinstance(bias, DTensor):
        raise ValueError("bias must be a plain tensor where weight is one, got a DTensor: pass bias.to_local()")
    for name, tensor in (("hidden", hidden), ("target", target)):
        if isinstance(tensor, DTensor) and any(placement != Replicate() for placement in tensor.placements):
            raise ValueError(
                f"{name} must be the same on every rank, got a DTensor of placements {tensor.placements}: pass "
                f"{name}.full_tensor()"
            )

    def local(tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    return local(hidden), local(weight), local(target), None if bias is None else local(bias), shared_name(group)


def shared_name(group: "ProcessGroup | None") -> str | None:
    """The name by which an op finds the group; None for a group of one rank, which shares nothing."""
    if group is not None and not hasattr(group, "group_name"):  # new_group gives a number to ranks outside it
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup that this rank is in, got {group!r}: pass mesh.get_group()"
        )
    return None if group is None or group.size() == 1 else group.group_name


def meet(
    name: str | None,  # of the group
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V_r, D)
    target: Tensor,  # (N,)
    wanted: Sequence[bool] = (),
    workspace_bytes: int | None = None,
    leaves_out: bool = False,
) -> Shard | None:
    """Exchange the ranks' sizes, and check that all ranks make the same call; None without a group.

    On a GPU the sizes are read back once. From then on the device checks that they are still the same.

    Raises:
        ValueError: on every rank, if calls differ (on a GPU: a device-side assert) or a shard is empty.
    """
    if name is None:
        return None
    group = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type] # a str, typed anew
    flags = sum(flag << i for i, flag in enumerate(wanted))
    same: dict[str, Sequence[int]] = {"hidden's shape": hidden.shape, "workspace_bytes": (workspace_bytes or 0,)}
    same |= {"requires_grad": (flags,), "gradient_tolerance": (leaves_out,)}
    numbers = [weight.shape[0], *(number for part in same.values() for number in part)]
    row = [torch.full((), number, dtype=torch.int64, device=target.device) for number in numbers]
    place = torch.arange(1, target.numel() + 1, device=target.device)
    rows = gather(group, torch.stack([*row, (target * (place * 0x9E3779B1)).sum()]))  # int64 wraps around
    known, own = _sizes.setdefault(group, {}), weight.shape[0]
    if target.device.type == "cpu" or own not in known:
        if capturing():
            raise RuntimeError("a sharded head's sizes are not known yet: make the call once before it is captured")
        known[own] = tuple(rows[:, 0].tolist())
    shard = Shard(group, group.rank(), known[own])
    if min(shard.sizes) == 0:
        raise ValueError(
            f"weight must have rows on every rank, got shards of {list(shard.sizes)} rows: share it among fewer ranks"
        )
    check_same_call(rows, shard.sizes, ["hidden's shape", *same, "target"])
    return shard


@checks.value_check
def check_same_call(rows: Tensor, sizes: tuple[int, ...], names: list[str]) -> None:
    """Check that `rows` (ranks, numbers) are equal but for the first number, and that this one is the rank's size."""
    known = torch.stack([torch.full((), size, dtype=torch.int64, device=rows.device) for size in sizes])
    alike = rows[:, 1:] == rows[:1, 1:]
    checks.require(
        alike.all() & (rows[:, 0] == known).all(),
        "ranks that share a vocabulary must make the same call with the same tokens (an FSDP-sharded weight is no such "
        "share: read it inside its module's forward)",
        lambda: f"another {names[int((~alike.all(0)).nonzero()[0])]} on rank {int((~alike.all(1)).nonzero()[0])}",
    )


def refuse(shard: str | None, what: str) -> None:
    """Raise for a loss that does not work with a sharded head."""
    if shard is not None:
        raise ValueError(
            f"{what} does not work with a vocabulary-sharded weight: pass the whole one, weight.full_tensor() of a "
            "DTensor, or the shards gathered"
        )


# ---- the head


class ShardedHead:
    """`engine.head.Head` over a rank's own columns, with log-probs, entropy and dX of the whole vocabulary."""

    separate_target = True
    scale: Tensor | None = None  # (R,) float64: times row_scale * E in the workspace, dL/d(raw logits) for c = 1

    def __init__(self, own: BackendHead, shard: Shard, activation: Activation):
        self.own, self.shard, self.activation = own, shard, activation
        self.weight, self.dtype = own.weight, own.dtype
        self.planned = shard.plan(own)
        self.row_bytes, self.reserve, self.as_operand = own.row_bytes, own.reserve, own.as_operand
        self.compact_, self.mean_row = own.compact_, own.mean_row

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        """(R,) float64, each from the rank where `target` (R,), a row of the shard, is not -1."""
        own = self.own.target_logits(x, target.clamp(min=0))
        return self.shard.pick(own.where(target >= 0, 0.0))

    def softmax(self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False) -> Softmax:
        target = self.shard.find(target)
        logit = self.target_logits(x, target)
        own = self.own.softmax(x, target, gradient=gradient, entropy=entropy, logit=logit)
        own_nll, nll, whole_entropy, top1 = self.join(own)
        self.scale = own.row_scale * self.activation.temperature * (own_nll - nll).exp()
        slope = self.activation.slope(logit)
        missed = -torch.expm1(-nll)  # 1 - p
        target_mass = (missed if slope is None else missed * slope).where(target >= 0, 0.0)
        row_scale = torch.full_like(nll, 1 / self.activation.temperature)
        return Softmax(own.exp, row_scale, -nll, whole_entropy, target_mass, top1)

    def join(self, own: Softmax | Scores) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """(n_r, n, H if this rank has an H_r, top1) (R,) each: what the ranks' parts of a chunk come to."""
        own_nll = -own.logprobs
        assert own.top1 is not None
        known = [own_nll, own.top1.to(own_nll)]
        if own.entropy is not None:
            known.append(own.entropy)
        own_nlls, top1, *entropies = gather(self.shard.group, torch.stack(known)).unbind(1)
        nll = joint_nll(own_nlls)
        return own_nll, nll, joint_entropy(nll, own_nlls, *entropies) if entropies else None, top1.bool().all(0)

    def write_grad_hidden_(
        self,
        into: Tensor,
        index: Tensor,
        factor: Tensor,
        row_scale: Tensor,
        target: Tensor,
        target_mass: Tensor | None,
        kept: Kept | None = None,
    ) -> None:
        """The rank that holds the target adds its term, in the dtype of the sums."""
        target = self.shard.find(target).clamp(min=0)
        partial = torch.empty(len(factor), self.weight.shape[1], dtype=self.dtype, device=factor.device)
        rows = torch.arange(len(partial), device=partial.device)
        self.own.write_grad_hidden_(partial, rows, factor, self.scaled(row_scale), target, None, kept)
        if target_mass is not None:
            target_term = (row_scale * target_mass).to(self.dtype)[:, None]
            partial.addcmul_(target_term, self.own.as_operand(self.weight[target]).to(self.dtype), value=-1)
        into.index_copy_(0, index, self.shard.sum(partial).to(into.dtype))

    def add_grad_weight_(
        self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool, kept: Kept | None = None
    ) -> None:
        self.own.add_grad_weight_(grad, factor, x, self.scaled(row_scale), first, kept)

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        self.own.add_grad_bias_(grad, factor, self.scaled(row_scale))

    def subtract_targets_(
        self,
        grad_weight: Tensor | None,
        grad_bias: Tensor | None,
        hidden: Tensor,
        index: Tensor,
        target: Tensor,
        scale: Tensor,
    ) -> None:
        target = self.shard.find(target)
        # Targets of other ranks are spread over all rows with a scale of 0: on a single row they would be one long
        # queue of additions.
        spread = torch.arange(len(target), device=target.device) % self.weight.shape[0]
        here = target >= 0
        self.own.subtract_targets_(
            grad_weight, grad_bias, hidden, index, target.where(here, spread), scale.where(here, 0.0)
        )

    def scaled(self, row_scale: Tensor) -> Tensor:
        """(R,) in the products' dtype: a product in float64, in which small factors are not lost."""
        return row_scale if self.scale is None else (row_scale * self.scale).to(self.dtype)


class ShardedLogitsHead(ShardedHead):
    """`engine.head.LogitsHead` over a rank's own columns, for losses with an entropy term; without a teacher."""

    own: BackendLogitsHead

    def scores(self, x: Tensor, target: Tensor, *, entropy: bool = False, teacher: TeacherRows | None = None) -> Scores:
        target = self.shard.find(target)
        logit = self.target_logits(x, target)
        own = self.own.scores(x, target, entropy=True, logit=logit)
        assert own.entropy is not None
        # a target 700 above this rank's largest logit leaves no entropy, and exp(700) is not a number
        own_nll, nll, whole_entropy, top1 = self.join(
            own._replace(entropy=own.entropy.where(-own.logprobs > 1e-300, 0.0))
        )
        assert whole_entropy is not None
        own.logprobs.copy_(-nll)
        own.entropy.copy_(whole_entropy)
        own.log_z.copy_(logit - own.top.double() - own.logprobs)
        return own._replace(top1=top1)

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.own.gradient(scores, nll, entropy)


def sharded(head: BackendHead, shard: Shard | None, temperature: float, softcap: float | None) -> Head:
    """The head itself without a shard, otherwise a rank's part of the whole head."""
    if shard is None:
        return head
    activation = Activation(temperature, softcap)
    if isinstance(head, BackendLogitsHead):
        return ShardedLogitsHead(head, shard, activation)
    return ShardedHead(head, shard, activation)


def sharded_topk(head: BackendLogitsHead, shard: Shard, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log-probs (R, k), ids (R, k)) of the most likely tokens of the whole vocabulary, from `head`'s rows of it."""
    own_k = min(k, shard.sizes[shard.rank])
    log_p, ids = head.log_softmax(x, 1.0).topk(own_k, dim=1)
    log_p = log_p.double()
    log_z = head.target_logits(x, ids[:, 0]) - log_p[:, 0]  # of this shard alone
    log_p += (log_z - gather(shard.group, log_z).logsumexp(0))[:, None]
    log_p = nn.functional.pad(log_p, (0, k - own_k), value=-torch.inf)
    ids = nn.functional.pad(ids + shard.begin, (0, k - own_k))
    all_p, all_ids = (gather(shard.group, part).transpose(0, 1).flatten(1) for part in (log_p, ids))  # (R, ranks k)
    top, place = all_p.topk(k, dim=1)
    return top.to(head.dtype), all_ids.gather(1, place)
