"""Any weights per token: `linear_weighted_loss`."""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor

from pear_kernels.losses.shared import LossOutput, add_teacher, checked_inputs, run, run_with
from pear_kernels.objectives.teachers import Teacher
from pear_kernels.objectives.weighted import weights_by
from pear_kernels.options import (
    NEEDS_REF,
    HeadOptions,
    Objects,
    Reduction,
    WeightingKeywords,
    WeightingOptions,
    gather,
    takes,
)
from pear_kernels.sharding import refuse

CLASSES = WeightingOptions, Reduction, HeadOptions


@takes(*CLASSES)
def linear_weighted_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    weights: Tensor | Callable[..., Tensor] | str | None = None,  # (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
    reference: Teacher | None = None,
    sequence_scale: Tensor | None = None,  # (S,)
    denominator: float | Tensor | None = None,
    return_entropy: bool = False,
    valid_tokens: int | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
    options: Objects = (),
    **keywords: Unpack[WeightingKeywords],
) -> LossOutput:
    """SFT loss of an LM head with any weight per token, head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(w_t) * -log pi(y_t | x, y_<t) / divisor

    The weights are given, or made of the log-probs while the pass has them, by the caller's function or a named one:

    | weighting | w_t, with p = pi(y_t) |
    | --- | --- |
    | "none" | 1 |
    | "dft" | p |
    | "iw-sft" | clip(exp(iw_tau mean(log pi - log pi_ref)), 0, iw_max), the mean being over the sequence |
    | "psft" | r 1[r <= 1 + psft_clip], r = pi / pi_ref, pi_ref being the previous policy |
    | "asft" | p, and asft_kl KL(pi_ref, pi) is added to the loss |
    | "idft" | p^clip(exp(-(log p + H)), *idft_clip), H the entropy |

    DFT: arXiv 2508.05629; iw-SFT: 2507.12856; PSFT: 2508.17784; ASFT: 2509.23753; IDFT: 2602.12222. ASFT's KL here is
    that of the outcomes "y_t" and "another token", which a column of log-probs holds: a lower bound of the KL over the
    vocabulary that its authors use, with the same gradient in the target's logit. With the initial model in memory
    (`reference`) it is theirs.

    As many matrix products as `linear_pear_loss` ("iw-sft": as that at sequence level). A `reference` adds its own.

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, denominator, return_entropy, valid_tokens, group: see
            `linear_pear_loss`.
        weights: like target, float32 or float64, of any sign; values at ignored tokens do not matter. Or a function
            `f(logprobs)`, or `f(logprobs, index)`, from the log-probs (n,) of some tokens to their weights (n,) of any
            real dtype, in float64 and without gradients; `index` (n,) int64 is their place in target.reshape(-1). It is
            passed to a function that needs a second argument, or has one called index; other arguments keep their
            defaults. Both are copies, which the function may overwrite. It is called chunk by chunk, so a token's
            weight must depend on that token alone. (`torch.compile` breaks the graph there.) Or a name, as `weighting`.
        ref_logprobs: like target, float32 or float64: log-probs under the initial model ("iw-sft", "asft") or the
            previous policy ("psft").
        reference: for "asft", the initial model's hidden states and head, in place of ref_logprobs.
        options: objects of `WeightingOptions`, `Reduction` and `HeadOptions`, as in `linear_pear_loss`.

    Returns:
        LossOutput. `weights` are d loss_t / d(-log pi) before the divisor: w, and for "asft" the KL's share (but not
        that of a `reference`, whose KL has other gradients). `stats` are `objectives.weighted.WEIGHTED_STATS`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    own, *others = gather("linear_weighted_loss", CLASSES, options, keywords)
    if isinstance(weights, str) and own.weighting is None:
        own, weights = own.replace(weighting=weights), None
    weighting = own.weighting
    if (weights is None) == (weighting is None):
        got = "neither" if weights is None else f"both, weighting being {weighting!r}"
        raise ValueError(f"give one of weights and weighting, got {got}")
    if reference is not None and weighting != "asft":
        raise ValueError(f"reference is for weighting 'asft', whose KL is to a whole distribution, got {weighting!r}")
    if weighting in NEEDS_REF and ref_logprobs is None and reference is None:
        raise ValueError(
            f"weighting is {weighting!r}, but ref_logprobs is None: pass the targets' log-probs under "
            f"{'the previous policy' if weighting == 'psft' else 'the initial model'}"
        )
    column = None if callable(weights) or isinstance(weights, str) else weights
    columns = {"ref_logprobs": ref_logprobs, "weights": column, "sequence_scale": sequence_scale}
    inputs = checked_inputs(
        hidden, weight, target, bias, group, valid_tokens, return_entropy, columns, cu_seqlens, denominator
    )
    if reference is not None:
        if not isinstance(reference, Teacher):
            raise TypeError(f"reference must be a pear_kernels.Teacher, got {type(reference).__name__}")
        refuse(inputs.group, "reference")
        add_teacher(inputs, reference, "reference")

    given = own, *others
    if callable(weights):
        return run_with(weights_by, weights, "linear_weighted_loss", inputs, given)
    return run("linear_weighted_loss", inputs, given)
