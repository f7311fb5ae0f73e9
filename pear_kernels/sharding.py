"""Vocabulary-sharded (tensor-parallel) heads: each rank of a group holds some rows of W, and all hold the same tokens.

Rank r makes the logits of its own columns, with the target's logit a, which its owner computes, as the anchor on all
ranks. What any head makes of its columns and the target alone is then a softmax over those outcomes, of

    n_r = log(1 + sum_{v of r, v != y} exp(z_v - a))        H_r, its entropy

and one exchange of these a chunk, of float64 (R,), is all that ranks need to know of each other:

    n = -log p_y = log(1 + sum_r (exp(n_r) - 1))            p_v = exp(n_r - n) p_v^r,  for v of r
    H = p_y n + sum_r exp(n_r - n) ((1 - exp(-n_r)) n - n_r + H_r)

Where a rank had to move its anchor, because of a logit far above the target's, it did so for itself: no anchor is in
these lines, and n_r - n is never above 0. Every rank does them on the same numbers in the same order, so coefficients,
weights and the loss are bitwise the same on all, and every rank takes the same decisions.

dW and db are made of a rank's own columns and stay there. dX is a sum over all columns, so over ranks: it is summed
once a chunk, in float32 and in the order of ranks, before its one rounding.
"""

import functools
import weakref
from collections.abc import MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pear_kernels import checks
from pear_kernels.engine.head import Head, LogitsHead, Scores, Softmax
from pear_kernels.engine.packing import capturing

# Of a group's shards, by the group and this rank's own size. By the object, as another group may come to have its name
_sizes: MutableMapping["torch.distributed.ProcessGroup", dict[int, tuple[int, ...]]] = weakref.WeakKeyDictionary()


class Shard(NamedTuple):
    """Which rows of the vocabulary are this rank's, and what ranks tell each other."""

    group: "torch.distributed.ProcessGroup"
    rank: int  # in the group
    sizes: tuple[int, ...]  # rows of each rank, in order

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)

    @property
    def begin(self) -> int:
        return sum(self.sizes[: self.rank])

    def plan(self, head: Head) -> torch.Size:
        """Has chunks cut by the largest shard, so that all ranks cut the same."""
        head.planned = torch.Size((max(self.sizes), head.weight.shape[1]))
        return head.planned

    def find(self, target: Tensor) -> Tensor:
        """(R,) ids of the whole vocabulary as rows of this shard; -1 for those of others."""
        row = target - self.begin
        return row.masked_fill((row < 0) | (row >= self.sizes[self.rank]), -1)

    def gather(self, values: Tensor) -> Tensor:
        """(ranks, ...): the `values` (...) of each."""
        return gather(self.group, values)

    def pick(self, values: Tensor) -> Tensor:
        """The values (R,) of ranks that have them; all others have 0. A sum, and exact."""
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over ranks of their `partial` (R, D), in order, so that all have the same bits.

        Each rank adds up a share of it, and hands that to the others: what an all-reduce does, whose order no backend
        promises.
        """
        ranks, size = len(self.sizes), partial.numel()
        flat = nn.functional.pad(partial.reshape(-1), (0, -size % ranks))
        shares = torch.empty_like(flat)
        torch.distributed.all_to_all_single(shares, flat, group=self.group)
        total = functools.reduce(torch.add, shares.view(ranks, -1))
        return gather(self.group, total).view(-1)[:size].view_as(partial)


def gather(group: "torch.distributed.ProcessGroup", values: Tensor) -> Tensor:
    values = values.contiguous()
    found = values.new_empty(group.size(), *values.shape)
    # the newer of its names, where there is one: the other warns
    both = torch.distributed
    all_gather = getattr(both, "all_gather_single", None) or both.all_gather_into_tensor
    all_gather(found.view(-1), values.view(-1), group=group)
    return found


# ---- what a loss asks before it runs


def local_head(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D), a DTensor of that shape, or (V_r, D)
    target: Tensor,  # (N,) or (B, T)
    bias: Tensor | None,  # like weight
    group: "torch.distributed.ProcessGroup | None",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str | None]:
    """The four as this rank's own tensors, and the name of the group that shares the vocabulary; None: nobody does.

    Raises:
        ValueError: for a DTensor that is laid out in another way, naming the argument and what to do.
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
        weight = weight.to_local()
    elif isinstance(bias, DTensor):
        raise ValueError("bias must be a plain tensor where weight is one, got a DTensor: pass bias.to_local()")
    if isinstance(bias, DTensor):
        bias = bias.to_local()
    tokens = []
    for name, tensor in (("hidden", hidden), ("target", target)):
        if isinstance(tensor, DTensor):
            if any(placement != Replicate() for placement in tensor.placements):
                raise ValueError(
                    f"{name} must be the same on every rank, got a DTensor of placements {tensor.placements}: pass "
                    f"{name}.full_tensor()"
                )
            tensor = tensor.to_local()
        tokens.append(tensor)
    return tokens[0], weight, tokens[1], bias, shared_name(group)


def shared_name(group: "torch.distributed.ProcessGroup | None") -> str | None:
    """By which an op finds the group. One of a single rank shares nothing."""
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
    wanted: list[bool] = (),
    workspace_bytes: int | None = None,
) -> Shard | None:
    """Tells the ranks each other's sizes, and checks that all make the same call; None without a group.

    On a GPU sizes are read back once: from then on the device checks that they are still the same.

    Raises:
        ValueError: on every rank, where calls differ (on a GPU: a device-side assert), or a shard is empty.
    """
    if name is None:
        return None
    group = torch._C._distributed_c10d._resolve_process_group(name)
    flags = sum(flag << i for i, flag in enumerate(wanted))
    of_call = {"hidden's shape": hidden.shape, "workspace_bytes": (workspace_bytes or 0,), "requires_grad": (flags,)}
    numbers = [weight.shape[0], *(number for part in of_call.values() for number in part)]
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
    check_same_call(rows, shard.sizes, ["hidden's shape", *of_call, "target"])
    return shard


@checks.value_check
def check_same_call(rows: Tensor, sizes: tuple[int, ...], names: list[str]) -> None:
    """`rows` (ranks, numbers) are alike but for the first, which are the sizes."""
    known = torch.stack([torch.full((), size, dtype=torch.int64, device=rows.device) for size in sizes])
    alike = rows[:, 1:] == rows[:1, 1:]
    checks.require(
        alike.all() & (rows[:, 0] == known).all(),
        "ranks that share a vocabulary must make the same call with the same tokens (an FSDP-sharded weight is no such "
        "share: read it inside its module's forward)",
        lambda: f"another {names[int((~alike.all(0)).nonzero()[0])]} on rank {int((~alike.all(1)).nonzero()[0])}",
    )


def whole_vocabulary(weight: Tensor, shard: Shard | None) -> int:
    return weight.shape[0] if shard is None else shard.vocabulary


def refuse(shard: str | None, what: str) -> None:
    """Of a loss that a sharded head does not serve."""
    if shard is not None:
        raise ValueError(
            f"{what} does not work with a vocabulary-sharded weight: pass the whole one, weight.full_tensor() of a "
            "DTensor, or the shards gathered"
        )


# ---- the head


class ShardRows(NamedTuple):
    """`Softmax.exp` of a sharded head: a rank's E in the workspace, and (R,) float64 that make probabilities of it."""

    exp: Tensor  # (R, V_r)
    scale: Tensor  # (R,)

    def __len__(self) -> int:
        return len(self.scale)


class ShardedHead:
    """`head.Head` over a rank's own columns, with the log-probs, the entropy and the dX of the whole vocabulary."""

    def __init__(self, own: Head, shard: Shard, temperature: float, softcap: float | None):
        self.own, self.shard, self.temperature, self.softcap = own, shard, temperature, softcap
        self.weight, self.dtype = own.weight, own.dtype
        self.planned = shard.plan(own)

    def row_bytes(self, gradient: bool) -> int:
        return self.own.row_bytes(gradient)

    def reserve(self, rows: int, gradient: bool) -> None:
        self.own.reserve(rows, gradient)

    def as_operand(self, x: Tensor) -> Tensor:
        return self.own.as_operand(x)

    def target_logits(self, x: Tensor, target: Tensor) -> Tensor:
        """(R,) float64, from those ranks whose `target` is not -1."""
        own = self.own.target_logits(x, target.clamp(min=0))
        return self.shard.pick(own.where(target >= 0, 0.0))

    def softmax(self, x: Tensor, target: Tensor, *, gradient: bool, entropy: bool = False) -> Softmax:
        target = self.shard.find(target)
        here = target >= 0
        logit = self.target_logits(x, target)
        own = self.own.softmax(x, target, gradient=gradient, entropy=entropy, logit=logit)
        own_nll = -own.logprobs
        known = [own_nll, own.top1.to(own_nll), *([own.entropy] if entropy else [])]
        own_nlls, top1, *entropies = self.shard.gather(torch.stack(known)).unbind(1)
        nll = joint_nll(own_nlls)
        scale = own.row_scale * self.temperature * (own_nll - nll).exp()
        slope = 1.0 if self.softcap is None else 1 - (logit * (self.temperature / self.softcap)).square()
        target_mass = (-torch.expm1(-nll) * slope).where(here, 0.0)
        row_scale = torch.full_like(nll, 1 / self.temperature)
        whole_entropy = joint_entropy(nll, own_nlls, *entropies) if entropy else None
        return Softmax(ShardRows(own.exp, scale), row_scale, -nll, whole_entropy, target_mass, top1.bool().all(0))

    def write_grad_hidden_(
        self, into: Tensor, index: Tensor, rows: ShardRows, row_scale: Tensor, target: Tensor, target_mass: Tensor
    ) -> None:
        """The target's term is its owner's, and added in the dtype of the sums."""
        target = self.shard.find(target).clamp(min=0)
        partial = self.partial(rows.exp, self.scaled(row_scale, rows.scale), target)
        of_target = self.scaled(row_scale, target_mass)[:, None]
        partial.addcmul_(of_target, self.own.as_operand(self.weight[target]).to(self.dtype), value=-1)
        into.index_copy_(0, index, self.shard.sum(partial).to(into.dtype))

    def partial(self, factor: Tensor, row_scale: Tensor, target: Tensor) -> Tensor:
        """(R, D) this rank's share of product 2."""
        out = torch.empty(len(factor), self.weight.shape[1], dtype=self.dtype, device=factor.device)
        self.own.write_grad_hidden_(out, torch.arange(len(out), device=out.device), factor, row_scale, target, None)
        return out

    def add_grad_weight_(self, grad: Tensor, rows: ShardRows, x: Tensor, row_scale: Tensor, first: bool) -> None:
        self.own.add_grad_weight_(grad, rows.exp, x, self.scaled(row_scale, rows.scale), first)

    def add_grad_bias_(self, grad: Tensor, rows: ShardRows, row_scale: Tensor) -> None:
        self.own.add_grad_bias_(grad, rows.exp, self.scaled(row_scale, rows.scale))

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
        # what is another's goes, with a scale of 0, over all rows: on one of them it would make a long queue
        spread = torch.arange(len(target), device=target.device) % self.weight.shape[0]
        here = target >= 0
        self.own.subtract_targets_(
            grad_weight, grad_bias, hidden, index, target.where(here, spread), scale.where(here, 0.0)
        )

    def scaled(self, row_scale: Tensor, by: Tensor) -> Tensor:
        """(R,) in the products' dtype: a product of float64, in which what is small is not lost."""
        return (row_scale * by).to(self.dtype)


class ShardedLogitsHead(ShardedHead):
    """`head.LogitsHead` over a rank's own columns, for losses with an entropy in them; of no teacher."""

    own: LogitsHead

    def scores(self, x: Tensor, target: Tensor, *, entropy: bool = False, teacher: None = None) -> Scores:
        target = self.shard.find(target)
        logit = self.target_logits(x, target)
        own = self.own.scores(x, target, entropy=True, logit=logit)
        own_nll = -own.logprobs
        # a target 700 above this rank's largest logit has no entropy beside it, and exp(700) no number
        own_entropy = own.entropy.where(own_nll > 1e-300, 0.0)
        known = torch.stack([own_nll, own_entropy, own.top1.to(own_nll)])
        own_nlls, entropies, top1 = self.shard.gather(known).unbind(1)
        nll = joint_nll(own_nlls)
        return self.own.joined(own, logit, -nll, joint_entropy(nll, own_nlls, entropies), top1.bool().all(0))

    def gradient(
        self, scores: Scores, nll: Tensor | None, entropy: Tensor | None = None, divergence: None = None
    ) -> tuple[Tensor, Tensor]:
        return self.own.gradient(scores, nll, entropy)

    def write_grad_hidden_(
        self, into: Tensor, index: Tensor, factor: Tensor, row_scale: Tensor, target: Tensor, target_mass: None
    ) -> None:
        into.index_copy_(0, index, self.shard.sum(self.partial(factor, row_scale, target)).to(into.dtype))

    def add_grad_weight_(self, grad: Tensor, factor: Tensor, x: Tensor, row_scale: Tensor, first: bool) -> None:
        self.own.add_grad_weight_(grad, factor, x, row_scale, first)

    def add_grad_bias_(self, grad: Tensor, factor: Tensor, row_scale: Tensor) -> None:
        self.own.add_grad_bias_(grad, factor, row_scale)


def sharded(head: Head, shard: Shard | None, temperature: float, softcap: float | None) -> Head:
    """The head itself, or a rank's part of one."""
    if shard is None:
        return head
    kind = ShardedLogitsHead if hasattr(head, "scores") else ShardedHead
    return kind(head, shard, temperature, softcap)


def joint_nll(nll: Tensor) -> Tensor:
    """(R,) n from the ranks' n_r (ranks, R), to the last digits for p near 1 and for p near 0 alike."""
    odds = (nll + (-torch.expm1(-nll)).log()).logsumexp(0)  # log((1 - p) / p)
    return torch.logaddexp(torch.zeros_like(odds), odds)


def joint_entropy(nll: Tensor, own_nll: Tensor, own_entropy: Tensor) -> Tensor:
    """(R,) H from n, and from the ranks' n_r and H_r (ranks, R)."""
    shares = (own_nll - nll).exp() * (-torch.expm1(-own_nll) * nll - own_nll + own_entropy)
    return (-nll).exp() * nll + shares.sum(0)


def sharded_topk(head: LogitsHead, shard: Shard, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(log-probs (R, k), ids (R, k)) of the most likely tokens of the whole vocabulary, from `head`'s rows of it."""
    own_k = min(k, shard.sizes[shard.rank])
    log_p, ids = head.log_softmax(x, 1.0).topk(own_k, dim=1)
    log_p = log_p.double()
    log_z = head.target_logits(x, ids[:, 0]) - log_p[:, 0]  # of this shard alone
    log_p += (log_z - shard.gather(log_z).logsumexp(0))[:, None]
    log_p = nn.functional.pad(log_p, (0, k - own_k), value=-torch.inf)
    ids = nn.functional.pad(ids + shard.begin, (0, k - own_k))
    all_p, all_ids = (shard.gather(part).transpose(0, 1).flatten(1) for part in (log_p, ids))  # (R, ranks k)
    top, place = all_p.topk(k, dim=1)
    return top.to(head.dtype), all_ids.gather(1, place)
