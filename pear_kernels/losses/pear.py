"""PEAR: `linear_pear_loss`."""

from typing import Unpack

import torch
from torch import Tensor

from pear_kernels import checks
from pear_kernels.losses.shared import LossOutput, checked_inputs, run
from pear_kernels.options import HeadOptions, LabelOptions, Objects, PEARKeywords, PEAROptions, Reduction, gather, takes

CLASSES = PEAROptions, LabelOptions, Reduction, HeadOptions


@takes(*CLASSES)
def linear_pear_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    block_ids: Tensor | None = None,  # (N,) or (B, T)
    sequence_label: Tensor | None = None,  # (S,)
    sequence_scale: Tensor | None = None,  # (S,)
    denominator: float | Tensor | None = None,
    return_entropy: bool = False,
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[PEARKeywords],
) -> LossOutput:
    """PEAR loss of an LM head (arXiv 2602.01058), head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(G_t) * -log pi(y_t | x, y_<t) / divisor

    with G from `pear_weights` over the response tokens of each sequence, `pi` being the softmax of
    `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`. Gradients are made in the forward pass: three
    matrix products when the head is trained, two when `weight` needs no gradient, one without gradients. (At sequence
    level, with center and with normalize "sequence", sequences longer than a chunk cost up to a fourth product, after
    the first one of a call; `pear_kernels.plan` says how much. normalize "batch" rescales the gradients once more.)

    Args:
        hidden: (N, D), a pack, or (B, T, D), one sequence per row; float32, bfloat16, float16 or float64.
        weight: (V, D), the LM head, of hidden's dtype. Under autocast the two may differ, and are rounded to autocast's
            dtype as in `F.linear`.
        target: (N,) or (B, T) int64, already shifted: target[t] is what hidden[t] predicts. `ignore_index` marks
            prompt, padding and whatever else is no response token.
        behavior_logprobs: like target, float32 or float64: log pi_b of each target under the policy that wrote the
            data. Values at ignored tokens do not matter.
        bias: (V,), the head's bias.
        cu_seqlens: (S+1,) int32 or int64 on hidden's device: the sequences of a pack; None means one sequence.
        block_ids: see `pear_weights`.
        sequence_label: (S,) or (B,) bool, False where the response is wrong. Tokens of wrong sequences have, always at
            sequence level, the repulsive term of the paper's section 3.6 with a bound that is not in the paper,
            -negative_lambda G min(-log pi, -logprob_floor). Right and wrong sequences may be mixed. None: all are
            right. center and normalize "sequence" act on right ones only, and normalize "batch" is an error.
        sequence_scale: (S,) or (B,), multiplies each sequence's loss; not part of G, and not in the paper.
        denominator: a number or 0-d tensor that replaces the divisor, such as the tokens of all accumulation steps
            (for "sequence_mean": the sequences of all steps).
        return_entropy: add the mean entropy of the tokens' distributions to `stats`, as "entropy", without gradient.
        valid_tokens: the number of targets that are not `ignore_index`, if the caller knows it. It saves the one host
            sync of a call; a wrong number is an error.
        group: process group whose ranks share the vocabulary: `weight` and `bias` are then this rank's rows (V_r, D),
            in the group's order, all else is the same on every rank, and `target` holds ids of the whole vocabulary.
            Loss, log-probs and dX are those of the whole head on every rank, dW that of the rank's rows. A `weight`
            that is a DTensor of placement Shard(0) brings its group along. See docs/sharded.md.
        options: objects of `PEAROptions`, `LabelOptions`, `Reduction` and `HeadOptions`, at most one each. Their
            fields, where their meanings stand, are keywords of this function too.

    Returns:
        LossOutput. With every token ignored: loss 0 and zero gradients. `stats` are `objectives.pear.STATS`. The shares
        of tokens whose log-ratio is clipped, `ratio_clipped_low` and `ratio_clipped_high` (together near 1, a weight is
        a function of position alone), `weight_mean`, `weight_floor`, `weight_ceiling` and `effective_sample_size`, the
        share of tokens that carry the gradient, show problems early. With labels those are of right sequences, and
        `objectives.labelled.WRONG_STATS` of wrong ones, whose `weights` are -negative_lambda G, or 0. Every loss adds
        "token_accuracy", the share of tokens (with labels, of right ones) that no other token is likelier than: among
        equal logits the first one counts, and on kernels or across shards a tie counts as a miss. It costs nothing,
        since product 1 has each row's maximum.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do. Values (of target, behavior_logprobs,
            cu_seqlens, sequence_scale, denominator) are checked on their device: on a GPU by device-side asserts,
            without a host sync. PEAR_KERNELS_CHECK_VALUES=0 in the environment skips these checks on every device.
        torch.OutOfMemoryError: naming the workspace's size. (On a CPU, where torch raises that, RuntimeError.)
        RuntimeError: for a double backward.
    """
    given = gather("linear_pear_loss", CLASSES, options, keywords)
    columns = {
        "behavior_logprobs": behavior_logprobs, "block_ids": block_ids, "sequence_label": sequence_label,
        "sequence_scale": sequence_scale,
    }  # fmt: skip
    inputs = checked_inputs(
        hidden, weight, target, bias, group, valid_tokens, return_entropy, columns, cu_seqlens, denominator
    )
    pear: PEAROptions = given[0]
    checks.check_level_of_blocks(block_ids, pear.level)
    if sequence_label is not None and pear.normalize == "batch":
        raise ValueError(
            "normalize must not be 'batch' beside sequence_label, as one factor of the whole call would scale wrong "
            "sequences too: use 'sequence', which is of right ones alone"
        )
    return run("linear_pear_loss", inputs, given)
