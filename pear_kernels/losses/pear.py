"""PEAR: `linear_pear_loss`."""

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.losses.shared import LossOutput, checked_head, divisor, flat, loss_output, wanted_gradients
from pear_kernels.negatives import LOGPROB_FLOOR, NEGATIVE_LAMBDA, WRONG_STATS
from pear_kernels.objectives import STATS
from pear_kernels.scalars import call
from pear_kernels.shards import local_head
from pear_kernels.weights import DEFAULTS, PEAROptions


def linear_pear_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    level: str = DEFAULTS.level,
    block_size: int = DEFAULTS.block_size,
    gamma: float = DEFAULTS.gamma,
    log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
    log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
    block_ids: Tensor | None = None,  # (N,) or (B, T)
    clip_blocks: bool = DEFAULTS.clip_blocks,
    center: bool = DEFAULTS.center,
    clip_length: int | None = DEFAULTS.clip_length,
    normalize: str | None = DEFAULTS.normalize,
    sequence_label: Tensor | None = None,  # (S,)
    negative_lambda: float = NEGATIVE_LAMBDA,
    logprob_floor: float = LOGPROB_FLOOR,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> LossOutput:
    """PEAR loss of an LM head (arXiv 2602.01058), head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(G_t) * -log pi(y_t | x, y_<t) / divisor

    with G from `pear_weights` over the response tokens of each sequence, `pi` being the softmax of
    `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`. Gradients are made in the forward pass: three
    matrix products when the head is trained, two when `weight` needs no gradient, one without gradients. (Sequence
    level, and normalize "sequence": of several sequences longer than a chunk, those after the first cost up to a fourth
    product if the workspace has no room for a second (V, D) buffer. With center and a trained head, each of them does.
    `pear_kernels.plan` says how much. normalize "batch" passes over the gradients once more.)

    Args:
        hidden: (N, D), a pack, or (B, T, D), one sequence a row; float32, bfloat16, float16 or float64.
        weight: (V, D), the LM head, of hidden's dtype. Under autocast the two may differ, and are rounded to autocast's
            dtype as in `F.linear`.
        target: (N,) or (B, T) int64, already shifted: target[t] is what hidden[t] predicts. `ignore_index` marks
            prompt, padding and whatever else is no response token.
        behavior_logprobs: like target, float32 or float64: log pi_b of each target under the policy that wrote the
            data. What stands at ignored tokens does not matter.
        bias: (V,), the head's bias.
        cu_seqlens: (S+1,) int32 or int64 on hidden's device: the sequences of a pack; None means one sequence.
        level, block_size, gamma, log_ratio_clip, log_weight_clip, block_ids, clip_blocks, center, clip_length,
            normalize: see `pear_weights`.
        sequence_label: (S,) or (B,) bool, False where the response is wrong. Its tokens have, at sequence level alone,
            the repulsive term of the paper's section 3.6 with a bound of ours,
            -negative_lambda G min(-log pi, -logprob_floor); right and wrong ones may be mixed. None: all are right.
            center and normalize "sequence" are of right ones alone, and normalize "batch" is an error.
        negative_lambda: how strongly wrong responses are pushed away. The paper is silent; 0.1 is ours.
        logprob_floor: a wrong token whose log-prob is down to this is not pushed further; -inf: no bound. Ours.
        sequence_scale: (S,) or (B,), multiplies each sequence's loss; not part of G. Ours, not the paper's.
        reduction: the divisor, on which the paper is silent (the default is ours): "mean", the call's valid tokens;
            "sum", 1; "sequence_mean", the mean over sequences with a valid token of their token means.
        denominator: a number or 0-d tensor that replaces the divisor, such as the tokens of all accumulation steps
            (for "sequence_mean": the sequences of all steps).
        temperature: divides the logits.
        softcap: bound of the logits, for heads that have one.
        ignore_index: the target of tokens that do not count.
        return_entropy: put the mean entropy of the tokens' distributions into `stats`, as "entropy", without gradient.
        workspace_bytes: size of the chunk of logits. None: the size of a float32 gradient of the head, within 128 MiB
            and 1 GiB. It changes speed and memory, not the result.
        group: of ranks that share the vocabulary: `weight` and `bias` are then this rank's rows of it (V_r, D), in the
            group's order, all else is the same on every rank, and `target` holds ids of the whole. Loss, log-probs and
            dX are those of the whole head on every rank, dW that of the rank's rows. A `weight` that is a DTensor of
            placement Shard(0) brings its group along. docs/sharded.md has the rest.
        backend: "triton", kernels for NVIDIA GPUs of compute capability 8.0 or newer, or "torch", any device; None:
            the environment variable PEAR_KERNELS_BACKEND, or else the kernels wherever they run. float64 is always
            computed by "torch".

    Returns:
        LossOutput. With every token ignored: loss 0 and zero gradients. `stats` (`objectives.STATS`) tell of trouble:
        `ratio_clipped_low` and `ratio_clipped_high`, the shares of tokens whose log-ratio is below and above its clip
        (together near 1, a weight is a function of position alone), `weight_mean`, `weight_floor`, `weight_ceiling`,
        and `effective_sample_size`, the share of tokens that carry the gradient. With labels, the statistics of right
        sequences are `objectives.STATS`, and those of wrong ones `negatives.WRONG_STATS`; for tokens of the latter,
        `weights` hold -negative_lambda G, or 0. Every loss adds "token_accuracy" to `stats`, the share of tokens (with
        labels, of right ones) that no other token is likelier than: where logits are equal the first one counts, and on
        kernels or across shards a tie counts as a miss. It costs nothing: product 1 has the maximum of each row.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do. Values (of target, behavior_logprobs,
            cu_seqlens, sequence_scale, denominator) are checked where they are: on a GPU by device-side asserts, so
            without waiting for it. PEAR_KERNELS_CHECK_VALUES=0 in the environment leaves that out on every device.
        torch.OutOfMemoryError: naming the workspace's size. (On a CPU, where that is torch's error, RuntimeError.)
        RuntimeError: for a double backward.
    """
    options = PEAROptions(
        level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
    )
    checks.check_options(options)
    checks.check_negative_options(negative_lambda, logprob_floor)
    checks.check_reduction(reduction, denominator)
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    checks.check_loss_arguments(
        hidden, target, {"behavior_logprobs": behavior_logprobs}, cu_seqlens, sequence_scale, denominator
    )
    checks.check_block_ids_kind(target, "target's shape", block_ids, level)
    checks.check_sequence_label(hidden, target, sequence_label, cu_seqlens)
    if sequence_label is not None and normalize == "batch":
        raise ValueError(
            "normalize must not be 'batch' beside sequence_label, as one factor of the whole call would scale wrong "
            "sequences too: use 'sequence', which is of right ones alone"
        )
    found = call(
        ops.linear_pear_loss,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(sequence_label),
        flat(behavior_logprobs),
        flat(block_ids),
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(sequence_scale),
        divisor(denominator, hidden.device),
        negative_lambda,
        logprob_floor,
        *options.arguments(),
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        shared,
        return_entropy,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    return loss_output(found, target, STATS if sequence_label is None else STATS + WRONG_STATS)
