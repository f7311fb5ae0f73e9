"""`pear_weights`: the weights without a loss."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.losses.shared import flat
from pear_kernels.ops.call import spec_and_numbers
from pear_kernels.ops.weights import pear_weights as op
from pear_kernels.options import HeadOptions, Options, PEAROptions, WeightsKeywords, gather, takes


@takes(PEAROptions)
def pear_weights(
    logprobs: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # like logprobs
    mask: Tensor | None = None,  # like logprobs, bool
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,)
    block_ids: Tensor | None = None,  # like logprobs
    backend: str | None = None,
    options: Options | Sequence[Options] = (),
    **keywords: Unpack[WeightsKeywords],
) -> Tensor:
    """PEAR weights G (arXiv 2602.01058) from log-probs that a trainer already has. No gradient flows through G.

    Args:
        logprobs: (N,) a pack, or (B, T) one sequence a row; float32 or float64; log pi of each token under the model in
            training.
        behavior_logprobs: same shape; log pi_b of each token under the policy that wrote it.
        mask: same shape, bool; True at response tokens. Others carry no ratio and no position, and get weight 0. None
            means all of them count.
        cu_seqlens: (S+1,) int32 or int64, ascending from 0 to N: the sequences of a pack. None with (N,) means one
            sequence.
        block_ids: like logprobs, int32 or int64, in place of block_size at level "block" (at level "sequence" only
            their -1 matter, but for clip_blocks): the block of each response token, in [0, 2**31). Equal neighbours
            are one block; ids never descend within a sequence. -1: a token without a log-ratio, which carries no delta
            and no position, and has the weight of its place: the sum from the first block that starts after it. What
            behavior_logprobs hold there does not matter. In a sequence of -1 alone all weights are 1.
        options: an object of `PEAROptions`. Its fields, where their meanings stand, are keywords of this function too.
        backend: "triton", "torch" or None, as in `linear_pear_loss`.

    Returns:
        Weights of the shape and dtype of `logprobs`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it should be.
    """
    (pear,) = gather("pear_weights", (PEAROptions,), options, keywords)
    checks.check_weight_arguments(logprobs, behavior_logprobs, mask, cu_seqlens)
    checks.check_block_ids_kind(logprobs, "logprobs' shape", block_ids, pear.level)
    head = HeadOptions(backend=backend)
    if mask is None:
        mask = torch.ones_like(logprobs, dtype=torch.bool)
    columns = {
        "behavior_logprobs": flat(behavior_logprobs), "block_ids": flat(block_ids),
        "cu_seqlens": checks.sequence_bounds(logprobs.shape, cu_seqlens, logprobs.device),
    }  # fmt: skip
    given = {name: column for name, column in columns.items() if column is not None}
    spec, numbers = spec_and_numbers("pear_weights", given, logprobs.dtype, (pear, head))
    found: Tensor = op(logprobs.detach().reshape(-1), mask.reshape(-1), list(given.values()), numbers, spec)
    return found.view(logprobs.shape)
