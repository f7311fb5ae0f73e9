"""Log-probs for a loss of the caller's, and those of the most likely tokens."""

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.distill import TopKTeacher
from pear_kernels.losses.shared import checked_head
from pear_kernels.scalars import call
from pear_kernels.shards import local_head


def linear_logprobs(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi of each target under an LM head, without ever holding the (N, V) logits; any loss may be built on top.

    One matrix product where no gradient is asked for, and nothing kept; otherwise four in all, since the backward pass
    makes the logits again. Arguments as in `linear_pear_loss`.

    A z-loss, the square of log-sum-exp, can be made as (target's logit - log-prob)^2. Its gradient is then a difference
    of two that are rounded to the inputs' dtype, in which the target's row of the head cancels: in bfloat16, against
    float64, dX was off by 3.5 % and dW by 8 % where the distribution is near uniform (256 random tokens, D = 256,
    V = 4,096; full bfloat16 logits: 0.2 % and 0.4 %), and by 0.5 % where it is peaked (full logits: 1.2 %). A
    log-sum-exp as an output of the pass is planned; until then, use float32 inputs for a z-loss.

    Returns:
        Log-probs of target's shape, float32 (float64 for float64 inputs), 0 at ignored tokens; with `return_entropy`
        also the entropy of each token's distribution in nats, likewise. Both are differentiable, once.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do.
        RuntimeError: for a double backward.
    """
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    logprobs, entropy = call(
        ops.linear_logprobs,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        temperature,
        softcap,
        ignore_index,
        return_entropy,
        workspace_bytes,
        backend,
        shared,
        compute_dtype,
    )
    if return_entropy:
        return logprobs.view(target.shape), entropy.view(target.shape)
    return logprobs.view(target.shape)


def linear_topk_logprobs(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    k: int,
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> TopKTeacher:
    """The k most likely tokens of an LM head and their log-probs, without ever holding the (N, V) logits.

    One matrix product, no gradient: what an offline teacher writes for `linear_distill_loss`. `target` only says which
    tokens count; the other arguments are as in `linear_pear_loss`.

    Returns:
        TopKTeacher: `ids` (N, k) or (B, T, k) int64 and `logprobs` of that shape, float32 (float64 for float64 inputs),
        largest first. At ignored tokens they are 0..k-1 and 0.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do.
    """
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    if shared is None:  # else the op knows the vocabulary
        checks.check_k("k", k, weight.shape[0])
    ids, logprobs = call(
        ops.linear_topk_logprobs,
        hidden.detach().reshape(-1, hidden.shape[-1]),
        weight.detach(),
        None if bias is None else bias.detach(),
        target.reshape(-1),
        k,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        shared,
        compute_dtype,
    )
    return TopKTeacher(ids.view(*target.shape, k), logprobs.view(*target.shape, k))
