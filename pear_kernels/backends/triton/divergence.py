"""Kernels of a `LogitsWalk`: a row's sums, and the gradient that takes its logits' place.

The formulas are those of `pear_kernels.backends.torch.logits_head` and `pear_kernels.formulas.divergence`, where they
are explained. One program has a row, whose float32 logits another library's product has left in the workspace. Columns
with a logit of -inf there are no outcomes of their own (they are a teacher's ids, which
`pear_kernels.formulas.buckets` sees to)."""

import triton
import triton.language as tl

from pear_kernels.backends.triton.product import activate
from pear_kernels.backends.triton.rows import log1p

FORWARD, REVERSE, JS = 0, 1, 2  # KIND, in the order of pear_kernels.formulas.divergence.DIVERGENCES
_MIN_LOG = tl.constexpr(-1e4)


@triton.jit
def logits_of(
    logits, stride, bias, row, column, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """A block of a row's logits, activated, and d logit / d raw; -inf past the vocabulary and where they were -inf."""
    inside = column < V
    raw = tl.load(logits + row * stride + column, mask=inside, other=float("-inf"))
    z = raw
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = activate(z, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    return tl.where(raw == float("-inf"), float("-inf"), z), slope


@triton.jit
def largest_of(
    logits, stride, bias, row, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """(the largest logit of a row, its column: the first one)."""
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_V,), tl.int32)
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        larger = (z > largest) | (z != z)
        largest = tl.where(larger, z, largest)
        place = tl.where(larger, column, place)
    top = tl.max(largest, 0)
    at_top = tl.where(largest == top, place, 2147483647)
    return top, tl.min(at_top, 0)


@triton.jit
def normaliser(others, of_target):
    """(log Z, log p of the target), float64: Z = exp(of_target) + others."""
    u = tl.log(others) - of_target
    nll = tl.where(u > 0, u, 0.0) + log1p(tl.exp(-tl.abs(u)))
    nll = tl.where(others == others, nll, others)  # a comparison loses NaN
    return of_target + nll, -nll


@triton.jit
def expm1(x):
    """float32 exp(x) - 1, to the last digits near 0."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def kl_term(log_a, log_b):
    """a log(a / b) - a + b of outcomes of two distributions."""
    x = log_a - log_b
    a = tl.exp(log_a)
    # x + expm1(-x), whose first two terms cancel near 0
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320))))))
    near = tl.where(tl.abs(x) < 0.5, series, x + tl.exp(-x) - 1)
    return tl.where(x < -1, a * x - a + tl.exp(log_b), a * near)


@triton.jit
def mixture(log_p, log_q, log_of_p, log_of_q):
    """log m of the Jensen-Shannon divergence, m = (1 - b) p + b q."""
    p, q = log_p + log_of_p, log_q + log_of_q
    larger = tl.maximum(p, q)
    return larger + tl.log(tl.exp(p - larger) + tl.exp(q - larger))


@triton.jit
def slope_of(log_p, log_q, kl_of_p, of_p, log_of_p, log_of_q, KIND: tl.constexpr):
    """dD/dz."""
    p = tl.exp(log_p)
    if KIND == 0:
        x = log_q - log_p
        slope = tl.where(tl.abs(x) < 0.5, -p * expm1(x), p - tl.exp(log_q))
    elif KIND == 1:
        slope = p * (log_p - log_q - kl_of_p)
    else:
        slope = of_p * p * (log_p - mixture(log_p, log_q, log_of_p, log_of_q) - kl_of_p)
    return slope


@triton.jit
def log_softmax_rows(
    logits,  # (R, V) float32, x W^T; log-probs out
    stride,  # from row to row
    bias,  # (V,) or None
    V,
    softcap,
    inverse_temperature,
    inverse_soft,  # 1 / the temperature that comes on top
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A row's log-probs in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    top, place = largest_of(logits, stride, bias, row, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, BLOCK_V)
    rest = top.to(tl.float64) * 0
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        exp = tl.where(column == place, 0.0, tl.exp((z - top) * inverse_soft))
        rest += tl.sum(exp, 0).to(tl.float64)
    log_z = log1p(rest).to(tl.float32)
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        log_p = (z - top) * inverse_soft - log_z
        log_p = tl.where(log_p < _MIN_LOG, _MIN_LOG, log_p)
        tl.debug_barrier()  # other threads of this program may still have to read their logits
        tl.store(logits + row * stride + column, log_p, mask=column < V)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def score_rows(
    logits,  # (R, V) float32, x W^T
    stride,  # from row to row
    bias,  # (V,) or None
    target,  # (R,) int64
    logit,  # (R,) float64, the target's
    log_q,  # (R, V) float32, the teacher's, or None
    q_stride,  # from row to row
    out,  # (10, R) float64 out: what the names below say, in this order
    entropy,  # (R,) float64 out, or None
    R,
    V,
    softcap,
    inverse_temperature,
    inverse_soft,  # 1 / the divergence's temperature
    of_p,  # of "js", the student's share of m: 1 - js_beta
    log_of_p,  # its logarithm
    log_of_q,  # log(js_beta)
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SOFT: tl.constexpr,  # the divergence's temperature is not 1
    KIND: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """What is one number a row: sums without the target and the largest logit, log-probs, entropy and divergence."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    top, place = largest_of(logits, stride, bias, row, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE, BLOCK_V)
    of_target = tl.load(logit + row) - top.to(tl.float64)
    others = of_target * 0  # float64
    others_soft, exp_log = others, others
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        u = tl.where((column == place) | (column == y), float("-inf"), z - top)
        exp = tl.exp(u)
        others += tl.sum(exp, 0).to(tl.float64)
        if entropy is not None:
            exp_log += tl.sum(tl.where(exp > 0, exp * u, 0.0), 0).to(tl.float64)
        if SOFT:
            others_soft += tl.sum(tl.exp(u * inverse_soft), 0).to(tl.float64)
    largest = tl.where(place == y, 0.0, 1.0)  # exp of the largest, which is nobody's twice
    others += largest
    others_soft = others_soft + largest if SOFT else others
    log_z, log_p_y = normaliser(others, of_target)
    log_z_soft, soft_p_y = normaliser(others_soft, of_target * inverse_soft)
    tl.store(out + 0 * R + row, log_p_y)
    tl.store(out + 1 * R + row, top.to(tl.float64))
    tl.store(out + 2 * R + row, others)
    tl.store(out + 3 * R + row, others_soft)
    tl.store(out + 4 * R + row, log_z)
    tl.store(out + 5 * R + row, log_z_soft)
    tl.store(out + 6 * R + row, soft_p_y)
    tl.store(out + 9 * R + row, place.to(tl.float64))
    if entropy is not None:
        e_y = tl.exp(of_target)
        tl.store(entropy + row, log_z - (exp_log + e_y * of_target) / (others + e_y))
    if log_q is not None:
        shift, of_y = log_z_soft.to(tl.float32), soft_p_y.to(tl.float32)
        kl_of_p, kl_of_q = of_target * 0, of_target * 0
        for v in range(0, V, BLOCK_V):
            column = v + tl.arange(0, BLOCK_V)
            inside = column < V
            z, _ = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
            log_p = (z - top) * inverse_soft - shift
            log_p = tl.where(column == y, of_y, tl.where(log_p < _MIN_LOG, _MIN_LOG, log_p))
            q = tl.load(log_q + row * q_stride + column, mask=inside, other=_MIN_LOG)
            if KIND == 0:
                kl_of_q += tl.sum(tl.where(inside, kl_term(q, log_p), 0.0), 0).to(tl.float64)
            elif KIND == 1:
                kl_of_p += tl.sum(tl.where(inside, kl_term(log_p, q), 0.0), 0).to(tl.float64)
            else:
                m = mixture(log_p, q, log_of_p, log_of_q)
                kl_of_q += tl.sum(tl.where(inside, kl_term(q, m), 0.0), 0).to(tl.float64)
                kl_of_p += tl.sum(tl.where(inside, kl_term(log_p, m), 0.0), 0).to(tl.float64)
        if KIND == 2:
            divergence = kl_of_p * of_p + kl_of_q * (1 - of_p)
        else:
            divergence = kl_of_p + kl_of_q  # one of them is 0
        tl.store(out + 7 * R + row, divergence)
        tl.store(out + 8 * R + row, kl_of_p)


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["target"])
def gradient_rows(
    logits,  # (R, V) float32, x W^T
    dz,  # (R, V) out, in the same bytes: a row, in its own dtype, lies in the front part of the row's logits
    stride,  # of logits, from row to row
    dz_stride,  # of dz, likewise
    bias,  # (V,) or None
    target,  # (R,) int64
    log_q,  # (R, V) float32, the teacher's, or None
    q_stride,  # from row to row
    rows,  # (10, R) float64, what score_rows gave
    entropy,  # (R,) float64, or None
    factors,  # (3, R) float64: dL/d(-log p), dL/d(entropy) and dL/d(divergence), over the row's unit
    R,
    V,
    softcap,
    inverse_temperature,
    inverse_soft,
    of_p,
    log_of_p,
    log_of_q,
    SOFTCAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SOFT: tl.constexpr,
    KIND: tl.constexpr,
    BUCKETS: tl.constexpr,  # factors are a, b and t of `pear_kernels.formulas.buckets.Buckets.gradient`
    BLOCK_V: tl.constexpr,
):
    """dL/dz of a row: c (p - 1[v = y]) - h p (log p + H) + g dD/dz."""
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    c, h, g = (
        tl.load(factors + row).to(tl.float32),
        tl.load(factors + R + row).to(tl.float32),
        tl.load(factors + 2 * R + row).to(tl.float32),
    )
    log_p_y = tl.load(rows + row)
    top = tl.load(rows + R + row).to(tl.float32)
    shift, shift_soft = tl.load(rows + 4 * R + row).to(tl.float32), tl.load(rows + 5 * R + row).to(tl.float32)
    of_y, soft_of_y = log_p_y.to(tl.float32), tl.load(rows + 6 * R + row).to(tl.float32)
    # 1 - p of the target, to its last digits where p is near 1
    missed = tl.where(log_p_y > -1e-4, -log_p_y * (1 + log_p_y * (0.5 + log_p_y / 6)), 1 - tl.exp(log_p_y))
    missed = missed.to(tl.float32)
    H = c * 0
    if entropy is not None:
        H = tl.load(entropy + row).to(tl.float32)
    kl_of_p = c * 0
    if log_q is not None:
        kl_of_p = tl.load(rows + 8 * R + row).to(tl.float32)
    place = tl.load(rows + 9 * R + row).to(tl.int32)
    balance = log_p_y * 0  # float64: sum of dD/dz but for the largest outcome's
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        inside = column < V
        z, of_z = logits_of(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        if BUCKETS:
            gradient = c * tl.exp(z - top)
            if SOFT:
                gradient += h * tl.exp((z - top) * inverse_soft)
            else:
                gradient += h * tl.exp(z - top)
            gradient = tl.where(column == y, g, gradient)
        else:
            log_p = tl.where(column == y, of_y, z - top - shift)
            p = tl.exp(log_p)
            gradient = tl.where(column == y, -c * missed, c * p)
            if entropy is not None:
                gradient -= h * tl.where(p > 0, p * (log_p + H), 0.0)
            if log_q is not None:
                log_p = (z - top) * inverse_soft - shift_soft
                log_p = tl.where(column == y, soft_of_y, tl.where(log_p < _MIN_LOG, _MIN_LOG, log_p))
                q = tl.load(log_q + row * q_stride + column, mask=inside, other=_MIN_LOG)
                slope = slope_of(log_p, q, kl_of_p, of_p, log_of_p, log_of_q, KIND)
                if KIND != 0:
                    slope = tl.where(inside & (column != place), slope, 0.0)
                    balance += tl.sum(slope, 0).to(tl.float64)
                gradient += g * inverse_soft * slope
        tl.debug_barrier()  # dz overwrites logits that other threads of this program may still have to read
        tl.store(dz + row * dz_stride + column, (gradient * of_z).to(dz.dtype.element_ty), mask=inside)
    if log_q is not None:
        if KIND != 0:
            # all of a row's dD/dz sum to 0; the largest outcome's is a difference of numbers that p near 1 makes alike
            of_nll = tl.where(place == y, -c * missed, c * tl.exp(-shift))
            gradient = of_nll - g * inverse_soft * balance.to(tl.float32)
            if SOFTCAP:
                t = top / (softcap * inverse_temperature)
                gradient *= 1 - t * t
            tl.debug_barrier()  # a thread of the loop has stored there
            tl.store(dz + row * dz_stride + place, gradient.to(dz.dtype.element_ty))
