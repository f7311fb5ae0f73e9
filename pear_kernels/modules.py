"""nn.Module faces of the functions in losses/."""

import torch
from torch import Tensor, nn

from pear_kernels import checks
from pear_kernels.backend import check_backend
from pear_kernels.distill import Teacher, TopKTeacher
from pear_kernels.divergence import DIVERGENCES, DivergenceOptions
from pear_kernels.losses import (
    LossOutput,
    linear_distill_loss,
    linear_pear_loss,
    linear_policy_loss,
    linear_weighted_loss,
)
from pear_kernels.negatives import LOGPROB_FLOOR, NEGATIVE_LAMBDA
from pear_kernels.policy import OBJECTIVES, POLICY_DEFAULTS, PolicyOptions
from pear_kernels.weightings import WEIGHTING_DEFAULTS, WEIGHTINGS, WeightingOptions
from pear_kernels.weights import DEFAULTS, PEAROptions


class _LinearLoss(nn.Module):
    """A loss of an LM head with its options set once. It holds no parameter: the head's `weight` is an argument."""

    def __init__(
        self,
        options: dict,  # of this loss alone, checked
        *,
        reduction: str | None,  # checked
        temperature: float,
        softcap: float | None,
        ignore_index: int,
        workspace_bytes: int | None,
        backend: str | None,
    ):
        super().__init__()
        checks.check_head_options(temperature, softcap, workspace_bytes)
        check_backend(backend)
        self.options = options | dict(
            reduction=reduction, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearPEARLoss(_LinearLoss):
    """`linear_pear_loss` with its options set once (arXiv 2602.01058); see there for what each means.

    It holds no parameter: the LM head's `weight` is an argument of `forward`, so it may be tied, sharded or frozen.
    """

    def __init__(
        self,
        *,
        level: str = DEFAULTS.level,
        block_size: int = DEFAULTS.block_size,
        gamma: float = DEFAULTS.gamma,
        log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
        log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
        clip_blocks: bool = DEFAULTS.clip_blocks,
        center: bool = DEFAULTS.center,
        clip_length: int | None = DEFAULTS.clip_length,
        normalize: str | None = DEFAULTS.normalize,
        negative_lambda: float = NEGATIVE_LAMBDA,
        logprob_floor: float = LOGPROB_FLOOR,
        reduction: str = "mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        pear = PEAROptions(
            level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
        )
        checks.check_options(pear)
        checks.check_negative_options(negative_lambda, logprob_floor)
        checks.check_reduction(reduction, None)
        super().__init__(
            pear._asdict() | dict(negative_lambda=negative_lambda, logprob_floor=logprob_floor),
            reduction=reduction, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (N, D) or (B, T, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,) or (B, T)
        behavior_logprobs: Tensor,  # (N,) or (B, T)
        *,
        block_ids: Tensor | None = None,  # (N,) or (B, T)
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        sequence_label: Tensor | None = None,  # (S,)
        sequence_scale: Tensor | None = None,  # (S,)
        denominator: float | Tensor | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> LossOutput:
        return linear_pear_loss(
            hidden, weight, target, behavior_logprobs, block_ids=block_ids, bias=bias, cu_seqlens=cu_seqlens,
            sequence_label=sequence_label, sequence_scale=sequence_scale, denominator=denominator, group=group,
            **self.options,
        )  # fmt: skip


class LinearWeightedLoss(_LinearLoss):
    """`linear_weighted_loss` by a named weighting, or with weights given to each call; see there for what each means.

    It holds no parameter: the LM head's `weight` is an argument of `forward`, so it may be tied, sharded or frozen.
    """

    def __init__(
        self,
        weighting: str | None = None,
        *,
        iw_tau: float = WEIGHTING_DEFAULTS.iw_tau,
        iw_max: float = WEIGHTING_DEFAULTS.iw_max,
        psft_clip: float = WEIGHTING_DEFAULTS.psft_clip,
        asft_kl: float = WEIGHTING_DEFAULTS.asft_kl,
        idft_clip: tuple[float, float] = WEIGHTING_DEFAULTS.idft_clip,
        reduction: str = "mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        options = WeightingOptions(iw_tau, iw_max, psft_clip, asft_kl, idft_clip)
        checks.check_weighting(None, weighting or "none", WEIGHTINGS)
        checks.check_weighting_options(options)
        checks.check_reduction(reduction, None)
        super().__init__(
            {"weighting": weighting} | options._asdict(),
            reduction=reduction, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (N, D) or (B, T, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,) or (B, T)
        weights=None,  # (N,) or (B, T), or a function; where no weighting is named
        *,
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
        reference: Teacher | None = None,
        sequence_scale: Tensor | None = None,  # (S,)
        denominator: float | Tensor | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> LossOutput:
        return linear_weighted_loss(
            hidden, weight, target, weights, bias=bias, cu_seqlens=cu_seqlens, ref_logprobs=ref_logprobs,
            reference=reference, sequence_scale=sequence_scale, denominator=denominator, group=group, **self.options,
        )  # fmt: skip


class LinearDistillLoss(_LinearLoss):
    """`linear_distill_loss` with its options set once; see there for what each means.

    It holds no parameter: the LM head's `weight` is an argument of `forward`, so it may be tied, sharded or frozen.
    """

    def __init__(
        self,
        *,
        divergence: str = "forward",
        js_beta: float = 0.5,
        distill_temperature: float = 1.0,
        nll_coef: float = 0.0,
        level: str = DEFAULTS.level,
        block_size: int = DEFAULTS.block_size,
        gamma: float = DEFAULTS.gamma,
        log_ratio_clip: tuple[float, float] = DEFAULTS.log_ratio_clip,
        log_weight_clip: tuple[float, float] = DEFAULTS.log_weight_clip,
        clip_blocks: bool = DEFAULTS.clip_blocks,
        center: bool = DEFAULTS.center,
        clip_length: int | None = DEFAULTS.clip_length,
        normalize: str | None = DEFAULTS.normalize,
        reduction: str = "mean",
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        options = DivergenceOptions(divergence, js_beta, distill_temperature)
        checks.check_divergence_options(options, DIVERGENCES, nll_coef)
        pear = PEAROptions(
            level, block_size, gamma, log_ratio_clip, log_weight_clip, clip_blocks, center, clip_length, normalize
        )
        checks.check_options(pear)
        checks.check_reduction(reduction, None)
        own = dict(divergence=divergence, js_beta=js_beta, distill_temperature=distill_temperature, nll_coef=nll_coef)
        super().__init__(
            own | pear._asdict(),
            reduction=reduction, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (N, D) or (B, T, D)
        weight: Tensor,  # (V, D)
        teacher: Teacher | TopKTeacher,
        target: Tensor,  # (N,) or (B, T)
        behavior_logprobs: Tensor | None = None,  # (N,) or (B, T)
        *,
        block_ids: Tensor | None = None,  # (N,) or (B, T)
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        sequence_scale: Tensor | None = None,  # (S,)
        denominator: float | Tensor | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> LossOutput:
        return linear_distill_loss(
            hidden, weight, teacher, target, behavior_logprobs, block_ids=block_ids, bias=bias, cu_seqlens=cu_seqlens,
            sequence_scale=sequence_scale, denominator=denominator, group=group, **self.options,
        )  # fmt: skip


class LinearPolicyLoss(_LinearLoss):
    """`linear_policy_loss` with its options set once; see there for what each means.

    It holds no parameter: the LM head's `weight` is an argument of `forward`, so it may be tied, sharded or frozen.
    """

    def __init__(
        self,
        *,
        objective: str = POLICY_DEFAULTS.objective,
        beta: float = POLICY_DEFAULTS.beta,
        clip_low: float = POLICY_DEFAULTS.clip_low,
        clip_high: float = POLICY_DEFAULTS.clip_high,
        dual_clip: float | None = POLICY_DEFAULTS.dual_clip,
        sapo_temperatures: tuple[float, float] = POLICY_DEFAULTS.sapo_temperatures,
        sampler_clip: float | None = POLICY_DEFAULTS.sampler_clip,
        sampler_level: str = POLICY_DEFAULTS.sampler_level,
        entropy_coef: float = POLICY_DEFAULTS.entropy_coef,
        max_length: int | None = POLICY_DEFAULTS.max_length,
        unbiased_kl: bool = POLICY_DEFAULTS.unbiased_kl,
        reduction: str | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        ignore_index: int = -100,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        options = PolicyOptions(
            objective, beta, clip_low, clip_high, dual_clip, sapo_temperatures, sampler_clip, sampler_level,
            entropy_coef, max_length, unbiased_kl,
        )  # fmt: skip
        checks.check_policy_options(options, OBJECTIVES)
        checks.check_reduction(reduction or "sum", None, checks.POLICY_REDUCTIONS)
        super().__init__(
            options._asdict(),
            reduction=reduction, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip

    def forward(
        self,
        hidden: Tensor,  # (N, D) or (B, T, D)
        weight: Tensor,  # (V, D)
        target: Tensor,  # (N,) or (B, T)
        old_logprobs: Tensor | None,  # (N,) or (B, T)
        advantages: Tensor,  # (S,), (N,) or (B, T)
        *,
        bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (S+1,)
        ref_logprobs: Tensor | None = None,  # (N,) or (B, T)
        sampler_logprobs: Tensor | None = None,  # (N,) or (B, T)
        sequence_scale: Tensor | None = None,  # (S,)
        denominator: float | Tensor | None = None,
        group: "torch.distributed.ProcessGroup | None" = None,
    ) -> LossOutput:
        return linear_policy_loss(
            hidden, weight, target, old_logprobs, advantages, bias=bias, cu_seqlens=cu_seqlens,
            ref_logprobs=ref_logprobs, sampler_logprobs=sampler_logprobs, sequence_scale=sequence_scale,
            denominator=denominator, group=group, **self.options,
        )  # fmt: skip
