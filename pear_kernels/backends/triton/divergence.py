"""Kernels of a `LogitsWalk`: a row's sums, and the gradient that overwrites its logits.

The formulas are explained in `pear_kernels.backends.torch.logits_head` and `pear_kernels.formulas.divergence`. One
program processes one row, whose float32 logits cuBLAS has left in the workspace. A raw logit of -inf is no outcome of
its own: it is one of a teacher's ids, which `pear_kernels.formulas.topk` handles.
"""

import triton
import triton.language as tl

from pear_kernels.backends.triton.formulas import (
    FORWARD,
    JS,
    MIN_LOG,
    REVERSE,
    divergence_slope,
    entropy_of,
    kl_term,
    largest_logit,
    load_logits,
    log1p,
    log_prob,
    missing_mass,
    mixture,
    slope_at,
    target_nll,
)


@triton.jit
def log_softmax_rows(
    logits,  # (R, V) float32, x W^T; log-probs out
    stride,  # elements from row to row
    bias,  # (V,) or None
    V,
    softcap,
    inverse_temperature,
    inverse_soft,  # 1 / temperature, applied after the head's own
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Log-probs (>= MIN_LOG) in place of a row's logits."""
    row = tl.program_id(0).to(tl.int64)
    top, place = largest_logit(
        logits, stride, bias, row, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, BLOCK_V
    )
    rest = top.to(tl.float64) * 0
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        exp = tl.where(column == place, 0.0, tl.exp((z - top) * inverse_soft))
        rest += tl.sum(exp, 0).to(tl.float64)
    log_z = log1p(rest).to(tl.float32)
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        tl.debug_barrier()  # other threads of this program may not have read their logits yet
        tl.store(logits + row * stride + column, log_prob((z - top) * inverse_soft, log_z), mask=column < V)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def score_rows(
    logits,  # (R, V) float32, x W^T
    stride,  # elements from row to row
    bias,  # (V,) or None
    target,  # (R,) int64
    logit,  # (R,) float64, the target's
    log_q,  # (R, V) float32, the teacher's, or None
    q_stride,  # elements from row to row
    out,  # (10, R) float64 out, in the order of the stores below
    entropy,  # (R,) float64 out, or None
    R,
    V,
    softcap,
    inverse_temperature,
    inverse_soft,  # 1 / the divergence's temperature
    p_share,  # "js": the student's share of m, 1 - js_beta
    log_p_share,  # its logarithm
    log_q_share,  # log(js_beta)
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SOFT: tl.constexpr,  # the divergence's temperature is not 1
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's scalars: sums without the target and the largest logit, log-probs, entropy and divergence."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    top, place = largest_logit(
        logits, stride, bias, row, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, BLOCK_V
    )
    below = tl.load(logit + row) - top.to(tl.float64)
    others = below * 0  # float64
    others_soft, exp_log = others, others
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        u = tl.where((column == place) | (column == y), float("-inf"), z - top)
        exp = tl.exp(u)
        others += tl.sum(exp, 0).to(tl.float64)
        if entropy is not None:
            exp_log += tl.sum(tl.where(exp > 0, exp * u, 0.0), 0).to(tl.float64)
        if SOFT:
            others_soft += tl.sum(tl.exp(u * inverse_soft), 0).to(tl.float64)
    largest = tl.where(place == y, 0.0, 1.0)  # exp of the largest logit, added here unless it is the target's
    others += largest
    others_soft = others_soft + largest if SOFT else others
    # this order of operations: another one spills registers on sm_100
    nll = target_nll(others, below)
    log_z, log_p_y = below + nll, -nll
    below_soft = below * inverse_soft
    nll_soft = target_nll(others_soft, below_soft)
    log_z_soft, log_p_y_soft = below_soft + nll_soft, -nll_soft
    tl.store(out + 0 * R + row, log_p_y)
    tl.store(out + 1 * R + row, top.to(tl.float64))
    tl.store(out + 2 * R + row, others)
    tl.store(out + 3 * R + row, others_soft)
    tl.store(out + 4 * R + row, log_z)
    tl.store(out + 5 * R + row, log_z_soft)
    tl.store(out + 6 * R + row, log_p_y_soft)
    tl.store(out + 9 * R + row, place.to(tl.float64))
    if entropy is not None:
        e_y = tl.exp(below)
        tl.store(entropy + row, entropy_of(log_z, exp_log + e_y * below, others + e_y))
    if log_q is not None:
        shift, at_target = log_z_soft.to(tl.float32), log_p_y_soft.to(tl.float32)
        kl_of_p, kl_of_q = below * 0, below * 0
        for v in range(0, V, BLOCK_V):
            column = v + tl.arange(0, BLOCK_V)
            inside = column < V
            z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
            log_p = tl.where(column == y, at_target, log_prob((z - top) * inverse_soft, shift))
            q = tl.load(log_q + row * q_stride + column, mask=inside, other=MIN_LOG)
            if KIND == FORWARD:
                kl_of_q += tl.sum(tl.where(inside, kl_term(q, log_p), 0.0), 0).to(tl.float64)
            elif KIND == REVERSE:
                kl_of_p += tl.sum(tl.where(inside, kl_term(log_p, q), 0.0), 0).to(tl.float64)
            else:
                m = mixture(log_p, q, log_p_share, log_q_share)
                kl_of_q += tl.sum(tl.where(inside, kl_term(q, m), 0.0), 0).to(tl.float64)
                kl_of_p += tl.sum(tl.where(inside, kl_term(log_p, m), 0.0), 0).to(tl.float64)
        if KIND == JS:
            divergence = kl_of_p * p_share + kl_of_q * (1 - p_share)
        else:
            divergence = kl_of_p + kl_of_q  # one of them is 0
        tl.store(out + 7 * R + row, divergence)
        tl.store(out + 8 * R + row, kl_of_p)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def gradient_rows(
    logits,  # (R, V) float32, x W^T
    dz,  # (R, V) out. A row of it, in its own dtype, overwrites the front part of the row's logits
    stride,  # of logits, elements from row to row
    dz_stride,  # of dz, likewise
    bias,  # (V,) or None
    target,  # (R,) int64
    log_q,  # (R, V) float32, the teacher's, or None
    q_stride,  # elements from row to row
    rows,  # (10, R) float64, from score_rows
    entropy,  # (R,) float64, or None
    factors,  # (3, R) float64: dL/d(-log p), dL/d(entropy) and dL/d(divergence), each divided by the row's unit
    R,
    V,
    softcap,
    inverse_temperature,
    inverse_soft,
    p_share,
    log_p_share,
    log_q_share,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SOFT: tl.constexpr,
    KIND: tl.constexpr,
    BUCKETS: tl.constexpr,  # factors are a, b and t of `pear_kernels.formulas.topk.Buckets.gradient`
    BLOCK_V: tl.constexpr,
):
    """dL/dz of a row: c (p - 1[v = y]) - h p (log p + H) + g dD/dz."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    c, h = tl.load(factors + row).to(tl.float32), tl.load(factors + R + row).to(tl.float32)
    g = tl.load(factors + 2 * R + row).to(tl.float32)
    log_p_y = tl.load(rows + row)
    top = tl.load(rows + R + row).to(tl.float32)
    shift, shift_soft = tl.load(rows + 4 * R + row).to(tl.float32), tl.load(rows + 5 * R + row).to(tl.float32)
    at_target, at_target_soft = log_p_y.to(tl.float32), tl.load(rows + 6 * R + row).to(tl.float32)
    missed = missing_mass(log_p_y).to(tl.float32)
    H = c * 0
    if entropy is not None:
        H = tl.load(entropy + row).to(tl.float32)
    kl_of_p = c * 0
    if log_q is not None:
        kl_of_p = tl.load(rows + 8 * R + row).to(tl.float32)
    place = tl.load(rows + 9 * R + row).to(tl.int32)
    others = log_p_y * 0  # float64: sum of dD/dz without the largest outcome
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        inside = column < V
        z, chain = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        if BUCKETS:
            gradient = c * tl.exp(z - top)
            if SOFT:
                gradient += h * tl.exp((z - top) * inverse_soft)
            else:
                gradient += h * tl.exp(z - top)
            gradient = tl.where(column == y, g, gradient)
        else:
            log_p = tl.where(column == y, at_target, z - top - shift)
            p = tl.exp(log_p)
            gradient = tl.where(column == y, -c * missed, c * p)
            if entropy is not None:
                gradient -= h * tl.where(p > 0, p * (log_p + H), 0.0)
            if log_q is not None:
                log_p = tl.where(column == y, at_target_soft, log_prob((z - top) * inverse_soft, shift_soft))
                q = tl.load(log_q + row * q_stride + column, mask=inside, other=MIN_LOG)
                slope = divergence_slope(log_p, q, kl_of_p, p_share, log_p_share, log_q_share, KIND)
                if KIND != FORWARD:
                    slope = tl.where(inside & (column != place), slope, 0.0)
                    others += tl.sum(slope, 0).to(tl.float64)
                gradient += g * inverse_soft * slope
        tl.debug_barrier()  # dz overwrites logits that other threads of this program may not have read yet
        tl.store(dz + row * dz_stride + column, (gradient * chain).to(dz.dtype.element_ty), mask=inside)
    if log_q is not None:
        if KIND != FORWARD:
            # a row's dD/dz sum to 0: the largest outcome's is minus the others' sum; its formula cancels for p near 1
            gradient = tl.where(place == y, -c * missed, c * tl.exp(-shift)) - g * inverse_soft * others.to(tl.float32)
            if SOFTCAP:
                gradient *= slope_at(top, softcap, inverse_temperature)
            tl.debug_barrier()  # the loop has stored another value there
            tl.store(dz + row * dz_stride + place, gradient.to(dz.dtype.element_ty))
