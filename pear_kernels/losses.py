"""The public losses: check arguments, run one pass of the engine, shape the result."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.backend import check_backend
from pear_kernels.distill import Teacher, TopKTeacher
from pear_kernels.divergence import DIVERGENCES, DivergenceOptions
from pear_kernels.negatives import LOGPROB_FLOOR, NEGATIVE_LAMBDA, WRONG_STATS
from pear_kernels.objectives import STATS
from pear_kernels.policy import OBJECTIVES, POLICY_DEFAULTS, POLICY_STATS, PolicyOptions
from pear_kernels.weightings import WEIGHTED_STATS, WEIGHTING_DEFAULTS, WEIGHTINGS, Tokens, WeightingOptions
from pear_kernels.weights import DEFAULTS, PEAROptions


class LossOutput(NamedTuple):
    """What a fused loss returns. Only `loss` carries gradients."""

    loss: Tensor  # (), float32 (float64 for float64 inputs)
    logprobs: Tensor  # target's shape, log pi of each target, 0 at ignored tokens
    weights: (
        Tensor  # target's shape, what multiplies each token's -log pi: G, or a policy loss's r A; 0 at ignored ones
    )
    stats: dict[str, Tensor]  # 0-d tensors; the tables named *_STATS beside each loss's formulas say what each is


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
    sequence_label: Tensor | None = None,  # (S,)
    negative_lambda: float = NEGATIVE_LAMBDA,
    logprob_floor: float = LOGPROB_FLOOR,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """PEAR loss of an LM head (arXiv 2602.01058), head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(G_t) * -log pi(y_t | x, y_<t) / divisor

    with G from `pear_weights` over the response tokens of each sequence, `pi` being the softmax of
    `softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature`. Gradients are made in the forward pass: three
    matrix products when the head is trained, two when `weight` needs no gradient, one without gradients. (Sequence
    level: of several sequences longer than a chunk, those after the first cost up to a fourth product if the workspace
    has no room for a second (V, D) buffer; `pear_kernels.plan` says how much.)

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
        level, block_size, gamma, log_ratio_clip, log_weight_clip: see `pear_weights`.
        sequence_label: (S,) or (B,) bool, False where the response is wrong. Its tokens have, at sequence level alone,
            the repulsive term of the paper's section 3.6 with a bound of ours,
            -negative_lambda G min(-log pi, -logprob_floor); right and wrong ones may be mixed. None: all are right.
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
        workspace_bytes: size of the chunk of logits. None: the size of a float32 gradient of the head, within 128 MiB
            and 1 GiB. It changes speed and memory, not the result.
        backend: "triton", kernels for NVIDIA GPUs of compute capability 8.0 or newer, or "torch", any device; None:
            the environment variable PEAR_KERNELS_BACKEND, or else the kernels wherever they run. float64 is always
            computed by "torch".

    Returns:
        LossOutput. With every token ignored: loss 0 and zero gradients. With labels, the statistics of right sequences
        are `objectives.STATS`, and those of wrong ones `negatives.WRONG_STATS`; for tokens of the latter, `weights`
        hold -negative_lambda G, or 0.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do. Values (of target, behavior_logprobs,
            cu_seqlens, sequence_scale, denominator) are checked where they are: on a GPU by device-side asserts, so
            without waiting for it. PEAR_KERNELS_CHECK_VALUES=0 in the environment leaves that out on every device.
        torch.OutOfMemoryError: naming the workspace's size. (On a CPU, where that is torch's error, RuntimeError.)
        RuntimeError: for a double backward.
    """
    checks.check_options(PEAROptions(level, block_size, gamma, log_ratio_clip, log_weight_clip))
    checks.check_negative_options(negative_lambda, logprob_floor)
    checks.check_reduction(reduction, denominator)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    checks.check_loss_arguments(
        hidden, target, {"behavior_logprobs": behavior_logprobs}, cu_seqlens, sequence_scale, denominator
    )
    checks.check_sequence_label(hidden, target, sequence_label, cu_seqlens)
    found = ops.linear_pear_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(sequence_label),
        flat(behavior_logprobs),
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(sequence_scale),
        as_tensor(denominator, hidden.device),
        negative_lambda,
        logprob_floor,
        level,
        block_size,
        gamma,
        [float(bound) for bound in (*log_ratio_clip, *log_weight_clip)],
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    return loss_output(found, target, STATS if sequence_label is None else STATS + WRONG_STATS)


def linear_weighted_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    weights: Tensor | Callable[..., Tensor] | str | None = None,  # (N,) or (B, T)
    *,
    weighting: str | None = None,
    ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
    reference: Teacher | None = None,
    iw_tau: float = WEIGHTING_DEFAULTS.iw_tau,
    iw_max: float = WEIGHTING_DEFAULTS.iw_max,
    psft_clip: float = WEIGHTING_DEFAULTS.psft_clip,
    asft_kl: float = WEIGHTING_DEFAULTS.asft_kl,
    idft_clip: tuple[float, float] = WEIGHTING_DEFAULTS.idft_clip,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """SFT loss of an LM head with any weights a token, head included, without ever holding the (N, V) logits.

        L = sum_t stop_gradient(w_t) * -log pi(y_t | x, y_<t) / divisor

    The weights are given, or made of the log-probs while the pass has them, by a function of yours or one of these:

    | weighting | w_t, with p = pi(y_t) |
    | --- | --- |
    | "none" | 1 |
    | "dft" | p |
    | "iw-sft" | clip(exp(iw_tau mean(log pi - log pi_ref)), 0, iw_max), the mean being over the sequence |
    | "psft" | r 1[r <= 1 + psft_clip], r = pi / pi_ref, pi_ref being the previous policy |
    | "asft" | p, and asft_kl KL(pi_ref, pi) is added to the loss |
    | "idft" | p^clip(exp(-(log p + H)), *idft_clip), H the entropy |

    DFT: arXiv 2508.05629; iw-SFT: 2507.12856; PSFT: 2508.17784; ASFT: 2509.23753; IDFT: 2602.12222. ASFT's KL is that
    of the outcomes "y_t" and "another token", which a column of log-probs holds: a lower bound of the KL over the
    vocabulary that its authors use, with the same gradient in the target's logit. With the initial model in memory
    (`reference`) it is theirs.

    Gradients are made in the forward pass: three matrix products with a trained head, two when `weight` needs no
    gradient, one without gradients. ("iw-sft": as `linear_pear_loss` at sequence level. A `reference` adds its own.)

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, reduction, denominator, temperature, softcap,
            ignore_index, workspace_bytes, backend: see `linear_pear_loss`.
        weights: like target, float32 or float64, of any sign; what stands at ignored tokens does not matter. Or a
            function `f(logprobs)`, or `f(logprobs, index)`, from the log-probs (n,) of some tokens to their weights
            (n,), both float64 and without gradients; `index` (n,) int64 says where they stand in target.reshape(-1). It
            is called chunk by chunk, so a token's weight must come of that token alone. (`torch.compile` breaks the
            graph there.) Or a name, as `weighting`.
        weighting: a row of the table, in place of weights.
        ref_logprobs: like target, float32 or float64: log-probs under the initial model ("iw-sft", "asft") or the
            previous policy ("psft").
        reference: for "asft", the initial model's hidden states and head, in place of ref_logprobs.
        iw_tau, iw_max, psft_clip, asft_kl, idft_clip: the table's constants. The defaults are their papers'.

    Returns:
        LossOutput. `weights` are d loss_t / d(-log pi) before the divisor: w, and for "asft" the KL's share (but not
        that of a `reference`, whose KL has other gradients). `stats` are `weightings.WEIGHTED_STATS`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    if isinstance(weights, str) and weighting is None:
        weights, weighting = None, weights
    checks.check_weighting(weights, weighting, WEIGHTINGS)
    options = WeightingOptions(iw_tau, iw_max, psft_clip, asft_kl, idft_clip)
    checks.check_weighting_options(options)
    if reference is not None and weighting != "asft":
        raise ValueError(f"reference is for weighting 'asft', whose KL is to a whole distribution, got {weighting!r}")
    if weighting is not None and WEIGHTINGS[weighting].needs_ref and ref_logprobs is None and reference is None:
        raise ValueError(
            f"weighting is {weighting!r}, but ref_logprobs is None: pass the targets' log-probs under "
            f"{'the previous policy' if weighting == 'psft' else 'the initial model'}"
        )
    checks.check_reduction(reduction, denominator)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    checks.check_loss_arguments(hidden, target, {"ref_logprobs": ref_logprobs}, cu_seqlens, sequence_scale, denominator)
    if weights is not None and not callable(weights):
        checks.check_given_weights(hidden, target, weights)
    if reference is not None:
        checks.check_teacher(hidden, weight, target, reference, "reference")
    run = functools.partial(
        run_weighted,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        ref_logprobs=flat(ref_logprobs),
        **dict(zip(("ref_hidden", "ref_weight", "ref_bias"), flat_teacher(reference), strict=True)),
        ref_temperature=1.0 if reference is None else reference.temperature,
        ref_softcap=None if reference is None else reference.softcap,
        cu_seqlens=checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        sequence_scale=flat(sequence_scale),
        denominator=as_tensor(denominator, hidden.device),
        **options._replace(idft_clip=[float(bound) for bound in idft_clip])._asdict(),
        reduction=reduction,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
        backend=backend,
        compute_dtype=compute_dtype,
        wanted=wanted_gradients(hidden, weight, bias),
    )
    if callable(weights):
        found = by_function(run, weights)
    else:
        found = run(weights=flat(weights), weighting=weighting)
    return loss_output(found, target, WEIGHTED_STATS)


def linear_distill_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    teacher: Teacher | TopKTeacher,
    target: Tensor,  # (N,) or (B, T)
    behavior_logprobs: Tensor | None = None,  # (N,) or (B, T)
    *,
    divergence: str = "forward",
    js_beta: float = 0.5,
    distill_temperature: float = 1.0,
    nll_coef: float = 0.0,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    level: str = DEFAULTS.level,
    block_size: int = DEFAULTS.block_size,
    gamma: float = DEFAULTS.gamma,
    log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
    log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str = "mean",
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Distillation of an LM head with PEAR's weights, heads included, without ever holding the (N, V) logits of either.

        L = sum_t stop_gradient(G_t) * (D_t + nll_coef * -log pi(y_t | x, y_<t)) / divisor

    with D_t a divergence of the student's distribution p from the teacher's q:

    | divergence | D |
    | --- | --- |
    | "forward" | KL(q, p) = sum q log(q / p) |
    | "reverse" | KL(p, q) = sum p log(p / q) |
    | "js" | js_beta KL(q, m) + (1 - js_beta) KL(p, m), m = js_beta q + (1 - js_beta) p (GKD, arXiv 2306.13649) |

    Three matrix products with a trained head, two with a frozen one, one without gradients, and for a teacher in memory
    one of its own in each case, the least there can be. (At sequence level: as `linear_pear_loss`.) Of both models a
    chunk of logits is held at a time.

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, reduction, denominator, temperature, softcap,
            ignore_index, workspace_bytes, backend: see `linear_pear_loss`.
        teacher: `Teacher(hidden, weight, bias, temperature, softcap)`, whose hidden states stand where the student's
            do, with a hidden size and a dtype of its own and the student's vocabulary; or `TopKTeacher(ids, logprobs)`,
            its K most likely tokens at each position, with log-probs at distill_temperature, largest first. D then
            compares K + 1 outcomes, the last one being any other token. No gradient goes to a teacher.
        behavior_logprobs: as in `linear_pear_loss`; None: every G is 1.
        divergence: a row of the table.
        js_beta: the teacher's share of m, between 0 and 1.
        distill_temperature: divides the logits of both in D alone, on top of what either head does to its own. (There
            is no factor of its square.)
        nll_coef: how much of the NLL is added.
        level, block_size, gamma, log_ratio_clip, log_weight_clip: see `pear_weights`.

    Returns:
        LossOutput. `weights` are G. `stats` begin with "divergence", the mean of D; the others are `objectives.STATS`
        with behavior_logprobs, else `weightings.WEIGHTED_STATS`.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    checks.check_divergence_options(DivergenceOptions(divergence, js_beta, distill_temperature), DIVERGENCES, nll_coef)
    checks.check_options(PEAROptions(level, block_size, gamma, log_ratio_clip, log_weight_clip))
    checks.check_reduction(reduction, denominator)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    columns = {"behavior_logprobs": behavior_logprobs}
    checks.check_loss_arguments(hidden, target, columns, cu_seqlens, sequence_scale, denominator)
    offline = (None, None)
    if isinstance(teacher, TopKTeacher):
        checks.check_top_k_teacher(hidden, target, teacher, weight.shape[0])
        offline, teacher = tuple(part.detach().reshape(-1, part.shape[-1]) for part in teacher), None
    elif isinstance(teacher, Teacher):
        checks.check_teacher(hidden, weight, target, teacher)
    else:
        raise TypeError(f"teacher must be a pear_kernels.Teacher or TopKTeacher, got {type(teacher).__name__}")
    found = ops.linear_distill_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(behavior_logprobs),
        *flat_teacher(teacher),
        *offline,
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(sequence_scale),
        as_tensor(denominator, hidden.device),
        1.0 if teacher is None else teacher.temperature,
        None if teacher is None else teacher.softcap,
        divergence,
        js_beta,
        distill_temperature,
        nll_coef,
        level,
        block_size,
        gamma,
        [float(bound) for bound in (*log_ratio_clip, *log_weight_clip)],
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    names = WEIGHTED_STATS if behavior_logprobs is None else STATS
    return loss_output(found, target, ("divergence", *names))


def linear_policy_loss(
    hidden: Tensor,  # (N, D) or (B, T, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) or (B, T)
    old_logprobs: Tensor | None,  # (N,) or (B, T)
    advantages: Tensor,  # (S,), (N,) or (B, T)
    *,
    bias: Tensor | None = None,  # (V,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
    objective: str = POLICY_DEFAULTS.objective,
    ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
    beta: float = POLICY_DEFAULTS.beta,
    clip_low: float = POLICY_DEFAULTS.clip_low,
    clip_high: float = POLICY_DEFAULTS.clip_high,
    dual_clip: float | None = POLICY_DEFAULTS.dual_clip,
    sapo_temperatures: tuple[float, float] = POLICY_DEFAULTS.sapo_temperatures,
    sampler_logprobs: Tensor | None = None,  # (N,) or (B, T)
    sampler_clip: float | None = POLICY_DEFAULTS.sampler_clip,
    sampler_level: str = POLICY_DEFAULTS.sampler_level,
    entropy_coef: float = POLICY_DEFAULTS.entropy_coef,
    max_length: int | None = POLICY_DEFAULTS.max_length,
    unbiased_kl: bool = POLICY_DEFAULTS.unbiased_kl,
    sequence_scale: Tensor | None = None,  # (S,)
    reduction: str | None = None,
    denominator: float | Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> LossOutput:
    """Policy-gradient loss of an LM head, head included, without ever holding the (N, V) logits.

    With r_t = pi(y_t) / pi_old(y_t), the advantage A_t and the sampler's correction w_t (1 without sampler_logprobs),

        L = sum_t (w_t policy_t + beta (r_ref - 1 - log r_ref)_t - entropy_coef H_t) / divisor,   r_ref = pi_ref / pi

    | objective | policy_t | reduction |
    | --- | --- | --- |
    | "ppo", "grpo" | -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) | "sequence_mean" |
    | "dapo", "bnpo" | the same | "mean" |
    | "dr_grpo" | the same | "constant_length" |
    | "gspo" | the same of s = exp(mean over the sequence of log r) | "sequence_mean" |
    | "gspo_token" | the same of sg(s) pi / sg(pi): its gradient is the token's own | "sequence_mean" |
    | "cispo" | -sg(min(r, 1 + clip_high)) A log pi | "mean" |
    | "sapo" | -4 / tau sigmoid(tau (r - 1)) A, tau by the sign of A | "mean" |
    | "reinforce" | -A log pi | "mean" |

    with sg a stopped gradient, and the reduction the one that is used where none is named. PPO: arXiv 1707.06347; GRPO:
    2402.03300; DAPO: 2503.14476, its clip_high is 0.28; BNPO: TRL's name; Dr. GRPO: 2503.20783; GSPO: 2507.18071, its
    clips are 3e-4 and 4e-4, "gspo_token" its section 4.3; CISPO: 2506.13585; SAPO: 2511.20347; REINFORCE: Williams
    1992.

    Gradients are made in the forward pass: three matrix products with a trained head, two when `weight` needs no
    gradient, one without gradients. ("gspo" and "gspo_token": of sequences longer than a chunk, those after the first
    cost up to a fourth product if the workspace has no room for a second (V, D) buffer; with beta or an entropy bonus,
    or for "gspo_token" with numbers that differ within a sequence, so does the first.)

    Args:
        hidden, weight, target, bias, cu_seqlens, sequence_scale, denominator, temperature, softcap, ignore_index,
            workspace_bytes, backend: see `linear_pear_loss`. All log-probs are at this `temperature`.
        old_logprobs: like target, float32 or float64: log-probs under the policy before the update. None: the policy
            in training itself, so that every ratio is exactly 1 and the gradient is the policy gradient.
        advantages: (S,) or (B,), one of each sequence, or like target, one of each token. (Read as (S,) where a pack
            has as many sequences as tokens.)
        objective: a row of the table.
        ref_logprobs: like target, under the reference policy. For statistics alone if beta is 0.
        beta: factor of the KL to the reference policy, estimated by Schulman's k3.
        clip_low, clip_high: a ratio counts for no less than 1 - clip_low and no more than 1 + clip_high, by objective.
        dual_clip: what a clipped ratio counts for at most where A < 0 (arXiv 1912.09729); None: no such bound.
        sapo_temperatures: tau of "sapo" for A > 0 and for other A.
        sampler_logprobs: like target, under the engine that drew the tokens, where it is not pi_old to the last digit.
        sampler_clip: cap of w = pi_old / pi_sampler, which has no gradient; None: no cap.
        sampler_level: "token", or "sequence": w is the product over the sequence.
        entropy_coef: factor of the entropy H_t.
        max_length: the length of "constant_length"; None: that of the longest sequence here (of (B, T) rows: T).
            Dr. GRPO wants one that is the same in every call.
        unbiased_kl: multiply the KL term by the token's r = pi / pi_old, gradient included, which makes its gradient
            that of the reverse KL (DeepSeek-V3.2, arXiv 2512.02556).
        reduction: "mean", "sum", "sequence_mean" (as in `linear_pear_loss`), or "constant_length", all sequences (empty
            ones too) times `max_length`; None: the objective's.

    Returns:
        LossOutput. `weights` are the policy gradient's factors: d loss_t / d(-log pi) before the divisor, KL included.
        `stats` (`policy.POLICY_STATS`) wait for nothing on the device. All-ignored: loss 0 and zero gradients.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError, RuntimeError: as `linear_pear_loss`.
    """
    options = PolicyOptions(
        objective, beta, clip_low, clip_high, dual_clip, sapo_temperatures, sampler_clip, sampler_level, entropy_coef,
        max_length, unbiased_kl,
    )  # fmt: skip
    checks.check_policy_options(options, OBJECTIVES)
    checks.check_reduction(reduction or "sum", denominator, checks.POLICY_REDUCTIONS)
    if beta and ref_logprobs is None:
        raise ValueError(f"beta is {beta!r}, but ref_logprobs is None: pass the reference policy's log-probs")
    if sampler_logprobs is not None and old_logprobs is None:
        raise ValueError("sampler_logprobs needs old_logprobs: its correction is pi_old / pi_sampler, got None")
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    columns = {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs}
    checks.check_loss_arguments(hidden, target, columns, cu_seqlens, sequence_scale, denominator)
    checks.check_policy_arguments(hidden, target, advantages, cu_seqlens)
    found = ops.linear_policy_loss(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        flat(old_logprobs),
        flat(advantages),
        checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        flat(ref_logprobs),
        flat(sampler_logprobs),
        flat(sequence_scale),
        as_tensor(denominator, hidden.device),
        tuple(advantages.shape) == checks.sequence_count(target, cu_seqlens),
        *options._replace(sapo_temperatures=[float(tau) for tau in sapo_temperatures]),
        reduction,
        temperature,
        softcap,
        ignore_index,
        workspace_bytes,
        backend,
        compute_dtype,
        wanted_gradients(hidden, weight, bias),
    )
    return loss_output(found, target, POLICY_STATS)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """log pi of each target under an LM head, without ever holding the (N, V) logits; any loss may be built on top.

    One matrix product where no gradient is asked for, and nothing kept; otherwise four in all, since the backward pass
    makes the logits again. Arguments as in `linear_pear_loss`.

    Returns:
        Log-probs of target's shape, float32 (float64 for float64 inputs), 0 at ignored tokens; with `return_entropy`
        also the entropy of each token's distribution in nats, likewise. Both are differentiable, once.

    Raises:
        ValueError, TypeError: naming the argument, what it got and what to do.
        RuntimeError: for a double backward.
    """
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    logprobs, entropy = ops.linear_logprobs(
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
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend)
    checks.check_k("k", k, weight.shape[0])
    ids, logprobs = ops.linear_topk_logprobs(
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
        compute_dtype,
    )
    return TopKTeacher(ids.view(*target.shape, k), logprobs.view(*target.shape, k))


def run_weighted(hidden, weight, bias, target, *, weights=None, weighting=None, function=None, **options):
    """The op, with its many arguments by name."""
    return ops.linear_weighted_loss(hidden, weight, bias, target, weights, weighting, function, **options)


@torch.compiler.disable
def by_function(run: Callable[..., tuple[Tensor, ...]], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """`run` with weights by a function of the caller's, which the op finds by its number while it runs."""
    try:
        takes_index = len(inspect.signature(function).parameters) > 1
    except ValueError:  # a builtin such as torch.exp, which shows none
        takes_index = False

    def weights(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            found = function(tokens.logprobs, tokens.index) if takes_index else function(tokens.logprobs)
        if not isinstance(found, Tensor) or found.shape != tokens.logprobs.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"weights must return a tensor of the log-probs' shape {tuple(tokens.logprobs.shape)}, got {got}"
            )
        return found.double()

    key = next(ops.function_keys)
    ops.functions[key] = weights
    try:
        return run(function=key)
    finally:
        del ops.functions[key]


def loss_output(found: tuple[Tensor, ...], target: Tensor, names: tuple[str, ...]) -> LossOutput:
    """What an op returned, in target's shape, and its statistics by their names."""
    loss, logprobs, weights, stats, *_ = found
    stats = dict(zip(names, stats.unbind(), strict=True))
    return LossOutput(loss, logprobs.view(target.shape), weights.view(target.shape), stats)


def checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend) -> torch.dtype:
    """Checks the arguments that every function shares; returns the dtype that operands are rounded to."""
    device_type = hidden.device.type
    # autocast leaves float64 alone, as it does in F.linear
    autocast = torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype)
    checks.check_head(hidden, weight, target, bias, autocast)
    checks.check_head_options(temperature, softcap, workspace_bytes)
    check_backend(backend)
    return torch.get_autocast_dtype(device_type) if autocast else hidden.dtype


def flat(values: Tensor | None) -> Tensor | None:
    """What has no gradient, as (N,) or (S,)."""
    return None if values is None else values.detach().reshape(-1)


def flat_teacher(teacher: Teacher | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Hidden states (N, D'), weight and bias of a teacher in memory, which gets no gradient."""
    if teacher is None:
        return None, None, None
    hidden, weight, bias, *_ = teacher
    return hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), flat(bias)


def as_tensor(denominator: float | Tensor | None, device: torch.device) -> Tensor | None:
    """A number as the 0-d tensor that another denominator is compiled with, without compiling anew."""
    if denominator is None or isinstance(denominator, Tensor):
        return denominator if denominator is None else denominator.detach()
    return torch.full((), float(denominator), dtype=torch.float64, device=device)


def wanted_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Whether each of them gets a gradient."""
    grad = torch.is_grad_enabled()
    return [grad and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
