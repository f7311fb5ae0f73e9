"""Log-probs for a loss of the caller's, and those of the most likely tokens."""

from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.losses.shared import checked_inputs
from pear_kernels.objectives.teachers import TopKTeacher
from pear_kernels.ops import logprobs as ops
from pear_kernels.options import HeadKeywords, HeadOptions, Objects, gather, takes


@takes(HeadOptions)
def linear_logprobs(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    return_entropy: bool = False,
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[HeadKeywords],
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
    given = gather("linear_logprobs", (HeadOptions,), options, keywords)
    inputs = checked_inputs(hidden, weight, target, bias, group, valid_tokens, return_entropy)
    checks.refuse_transforms("linear_logprobs", *inputs.flat)
    spec, numbers = inputs.spec_and_numbers("linear_logprobs", given)
    logprobs, entropy, _ = ops.linear_logprobs(*inputs.flat, numbers, spec, inputs.group)
    shape = inputs.target.shape
    return (logprobs.view(shape), entropy.view(shape)) if return_entropy else logprobs.view(shape)


@takes(HeadOptions)
def linear_topk_logprobs(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    k: int,
    *,
    bias: Tensor | None = None,  # (V,)
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[HeadKeywords],
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
    given = gather("linear_topk_logprobs", (HeadOptions,), options, keywords)
    inputs = checked_inputs(hidden, weight, target, bias, group, valid_tokens)
    if inputs.group is None:  # else the op knows the vocabulary
        checks.check_k("k", k, inputs.weight.shape[0])
    head = (None if tensor is None else tensor.detach() for tensor in inputs.flat)
    spec, numbers = inputs.spec_and_numbers("linear_topk_logprobs", given)
    ids, logprobs = ops.linear_topk_logprobs(*head, k, numbers, spec, inputs.group)
    shape = *inputs.target.shape, k
    return TopKTeacher(ids.view(shape), logprobs.view(shape))
