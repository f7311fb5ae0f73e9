"""`pear_weights`: the weights without a loss."""

from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.ops.call import spec_and_numbers
from pear_kernels.ops.pear_weights import pear_weights as op
from pear_kernels.options import CallOptions, HeadOptions, Objects, PEAROptions, WeightsKeywords, gather, takes


@takes(PEAROptions)
def pear_weights(
    logprobs: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # like logprobs
    mask: Tensor | None = None,  # like logprobs, bool
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,)
    block_ids: Tensor | None = None,  # like logprobs
    backend: str | None = HeadOptions.backend,
    valid_tokens: int | None = None,
    options: Objects = (),
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
        backend: as in `HeadOptions`.
        valid_tokens: the number of True in `mask`, if the caller knows it (all tokens, without one). It saves the one
            host sync of a call; a wrong number is an error.

    Returns:
        Weights of the shape and dtype of `logprobs`.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what it should be.
    """
    (pear,) = gather("pear_weights", (PEAROptions,), options, keywords)
    if logprobs.dim() not in (1, 2):
        raise ValueError(f"logprobs must be (N,) or (B, T), got shape {tuple(logprobs.shape)}")
    checks.check_dtype("logprobs", logprobs, checks.LOGPROB)
    checks.check_tensor("behavior_logprobs", behavior_logprobs)
    columns = {"behavior_logprobs": behavior_logprobs, "block_ids": block_ids}
    checks.check_columns({**columns, "mask": mask}, logprobs, cu_seqlens, "logprobs' shape", "logprobs is (B, T)")
    checks.check_level_of_blocks(block_ids, pear.level)
    own = HeadOptions(backend=backend), CallOptions(valid_tokens=valid_tokens)
    mask = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask
    given = {name: each.detach().reshape(-1) for name, each in columns.items() if each is not None}
    given["cu_seqlens"] = checks.sequence_bounds(logprobs, cu_seqlens)
    spec, numbers = spec_and_numbers("pear_weights", given, logprobs.dtype, (pear, *own))
    found: Tensor = op(logprobs.detach().reshape(-1), mask.reshape(-1), list(given.values()), numbers, spec)
    return found.view(logprobs.shape)
