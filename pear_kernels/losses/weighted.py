"""Any weights a token: `linear_weighted_loss`."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from pear_kernels import checks, ops
from pear_kernels.distill import Teacher
from pear_kernels.losses.shared import (
    LossOutput,
    autocast_dtype,
    checked_head,
    divisor,
    flat,
    flat_teacher,
    loss_output,
    wanted_gradients,
)
from pear_kernels.scalars import call
from pear_kernels.shards import local_head, refuse
from pear_kernels.weightings import WEIGHTED_STATS, WEIGHTING_DEFAULTS, WEIGHTINGS, Tokens, WeightingOptions


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
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
    backend: str | None = None,
    group: "torch.distributed.ProcessGroup | None" = None,
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
            ignore_index, return_entropy, workspace_bytes, backend, group: see `linear_pear_loss`.
        weights: like target, float32 or float64, of any sign; what stands at ignored tokens does not matter. Or a
            function `f(logprobs)`, or `f(logprobs, index)`, from the log-probs (n,) of some tokens to their weights
            (n,) of any real dtype, in float64 and without gradients; `index` (n,) int64 says where they stand in
            target.reshape(-1). It is given to a function that needs a second argument, or has one called index; other
            arguments keep their defaults. Both are copies, which the function may overwrite. It is called chunk by
            chunk, so a token's weight must come of that token alone. (`torch.compile` breaks the graph there.) Or a
            name, as `weighting`.
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
    hidden, weight, target, bias, shared = local_head(hidden, weight, target, bias, group)
    compute_dtype = checked_head(hidden, weight, target, bias, temperature, softcap, workspace_bytes, backend, shared)
    checks.check_loss_arguments(hidden, target, {"ref_logprobs": ref_logprobs}, cu_seqlens, sequence_scale, denominator)
    if weights is not None and not callable(weights):
        checks.check_given_weights(hidden, target, weights)
    if reference is not None:
        if not isinstance(reference, Teacher):
            raise TypeError(f"reference must be a pear_kernels.Teacher, got {type(reference).__name__}")
        refuse(shared, "reference")
        checks.check_teacher(hidden, weight, target, reference, autocast_dtype, "reference")
    run = functools.partial(
        run_weighted,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        ref_logprobs=flat(ref_logprobs),
        **dict(zip(("ref_hidden", "ref_weight", "ref_bias"), flat_teacher(reference), strict=True)),
        cu_seqlens=checks.sequence_bounds(target.shape, cu_seqlens, hidden.device),
        sequence_scale=flat(sequence_scale),
        denominator=divisor(denominator, hidden.device),
        ref_temperature=1.0 if reference is None else reference.temperature,
        ref_softcap=None if reference is None else reference.softcap,
        **options._replace(idft_clip=[float(bound) for bound in idft_clip])._asdict(),
        reduction=reduction,
        temperature=temperature,
        softcap=softcap,
        ignore_index=ignore_index,
        workspace_bytes=workspace_bytes,
        backend=backend,
        group=shared,
        return_entropy=return_entropy,
        compute_dtype=compute_dtype,
        wanted=wanted_gradients(hidden, weight, bias),
    )
    if callable(weights):
        # to be called, not traced; and not by a decorator, which would import torch._dynamo, a second, with this file
        by = torch.compiler.disable(by_function) if torch.compiler.is_compiling() else by_function
        found = by(run, weights)
    else:
        found = run(weights=flat(weights), weighting=weighting)
    return loss_output(found, target, WEIGHTED_STATS)


def run_weighted(hidden, weight, bias, target, *, weights=None, weighting=None, function=None, **options):
    """The op, with its many arguments by name, in the order of its own."""
    op = ops.linear_weighted_loss
    return call(op, hidden, weight, bias, target, weights, weighting, function, *options.values())


def by_function(run: Callable[..., tuple[Tensor, ...]], function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """`run` with weights by a function of the caller's, which the op finds by its number while it runs."""
    of_logprobs = as_called(function)

    def weights(tokens: Tokens) -> Tensor:
        with torch.no_grad():
            # copies: the function may overwrite what it is given, and the pass needs both again
            found = of_logprobs(tokens.logprobs.clone(), tokens.index.clone())
        if not isinstance(found, Tensor) or found.shape != tokens.logprobs.shape:
            got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"weights must return a tensor of the log-probs' shape {tuple(tokens.logprobs.shape)}, got {got}"
            )
        if found.is_complex():
            raise TypeError(f"weights must return real numbers, got {found.dtype}: take .real or .abs()")
        checks.check_weights(found, torch.ones_like(found, dtype=torch.bool))
        return found.double()

    key = next(ops.function_keys)
    ops.functions[key] = weights
    try:
        return run(function=key)
    finally:
        del ops.functions[key]


def as_called(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The caller's function as one of log-probs and index, by what it can be called with.

    It is given the index if it has a parameter of that name, or if log-probs alone are too few arguments.

    Raises:
        TypeError: for a function that can be called with neither.
    """
    try:
        # what a module is called by takes any arguments: its forward says which it needs, torch.compile's by the module
        own = getattr(function, "_orig_mod", function)
        signature = inspect.signature(own.forward if isinstance(own, torch.nn.Module) else own)
    except (TypeError, ValueError):  # a builtin such as torch.exp, which shows none
        return lambda logprobs, index: function(logprobs)

    def takes(*arguments, **named) -> bool:
        try:
            signature.bind(*arguments, **named)
        except TypeError:
            return False
        return True

    of_index = signature.parameters.get("index")
    bound = isinstance(own, functools.partial) and "index" in own.keywords  # to another value than ours
    if takes(None, index=None) and of_index is not None and not bound:
        return lambda logprobs, index: function(logprobs, index=index)
    if takes(None):
        return lambda logprobs, index: function(logprobs)
    if takes(None, None):
        return function
    name = getattr(function, "__name__", type(function).__name__)
    raise TypeError(f"weights must be a function f(logprobs) or f(logprobs, index), got {name}{signature}")
