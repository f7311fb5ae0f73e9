"""The formulas of the Triton kernels, each once, and the block of logits that the row kernels load.

PEAR's weights are a scan and stand with it, in pear_weights.py.

`pear_kernels.formulas` has the same formulas in PyTorch and explains them;
tests/pear_kernels/interpreted/test_kernel_formulas.py compares the two on a grid. Unless a docstring says otherwise a
formula keeps the dtype of its arguments: float32 for numbers per logit, float64 for per-row scalars. NaN stays NaN.
"""

import torch
import triton
import triton.language as tl

from pear_kernels.formulas import softmax

MAX_EXPONENT = softmax.MAX_EXPONENT[torch.float32]
MAX_EXPONENT_FLOAT64 = tl.constexpr(softmax.MAX_EXPONENT[torch.float64])
MIN_LOG = tl.constexpr(softmax.MIN_LOG)
FORWARD, REVERSE, JS = (tl.constexpr(kind) for kind in range(3))  # KIND: indices of pear_kernels.options.DIVERGENCES

# ---- elementary functions


@triton.jit
def tanh(u):
    """Exact to u's last digits. Near 0 the usual form would cancel, and a large softcap multiplies the error."""
    t = 1 - 2 / (1 + tl.exp(2 * u))
    if u.dtype == tl.float32:
        s = u * u
        series = u * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        t = tl.where(s < 0.0625, series, t)
    return t


@triton.jit
def exp_flushed(z, INTERPRETED: tl.constexpr):
    """float32 exp with subnormal results set to 0: tl.exp takes three more instructions to be exact below 1e-38."""
    if INTERPRETED:
        exp = tl.exp(z)
    else:
        z = z * 1.4426950408889634  # log2 e
        exp = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)
    return exp


@triton.jit
def log1p(u):
    """log(1 + u) for float64 u >= 0: divides out the rounding of 1 + u."""
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))


@triton.jit
def expm1(x):
    """float32 exp(x) - 1, exact to the last digits near 0."""
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1)


@triton.jit
def xlogx(u):
    """u log u, 0 at u = 0."""
    return tl.where(u > 0, u * tl.log(tl.where(u > 0, u, 1.0)), 0.0)


@triton.jit
def clamp(u, low, high):
    u = tl.where(u < low, low, u)
    return tl.where(u > high, high, u)


# ---- logits


@triton.jit
def activate(z, softcap, inverse_temperature, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr):
    """Applies the head's softcap and temperature to raw logits.

    Returns the logits and their slope: d logit / d raw, without the factor 1 / temperature.
    """
    slope = tl.full(z.shape, 1.0, z.dtype)
    if SOFTCAP:
        t = tanh(z / softcap)
        slope = 1 - t * t
        z = t * softcap
    if TEMPERATURE:
        z = z * inverse_temperature
    return z, slope


@triton.jit
def slope_at(logit, softcap, inverse_temperature):
    """`activate`'s slope under a softcap, from the activated logit."""
    t = logit / (softcap * inverse_temperature)
    return 1 - t * t


@triton.jit
def load_logits(
    logits, stride, bias, row, column, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, without=None,
):  # fmt: skip
    """A block of a row's logits, activated, and their slopes.

    Logits are -inf past the vocabulary and at the column `without`; if that is None, where raw logits are -inf instead.
    """
    inside = column < V
    raw = tl.load(logits + row * stride + column, mask=inside, other=float("-inf") if without is None else 0.0)
    z = raw
    if bias is not None:
        z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    z, slope = activate(z, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
    if without is None:
        z = tl.where(raw == float("-inf"), float("-inf"), z)
    else:
        z = tl.where(inside & (column != without), z, float("-inf"))
    return z, slope


@triton.jit
def largest_logit(
    logits, stride, bias, row, V, softcap, inverse_temperature,
    SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The largest of a row's `load_logits`, and the first column that has it."""
    largest = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK_V,), tl.int32)
    for v in range(0, V, BLOCK_V):
        column = v + tl.arange(0, BLOCK_V)
        z, _ = load_logits(logits, stride, bias, row, column, V, softcap, inverse_temperature, SOFTCAP, TEMPERATURE)
        larger = (z > largest) | (z != z)
        largest = tl.where(larger, z, largest)
        place = tl.where(larger, column, place)
    top = tl.max(largest, 0)
    at_top = tl.where(largest == top, place, 2147483647)
    return top, tl.min(at_top, 0)


# ---- results of a row, from S = sum_{v != y} exp(z_v - anchor) and `below`, the target's logit less the anchor


@triton.jit
def target_nll(S, below):
    """-log p = log(1 + S / e_y) with e_y = exp(below), exact to the last digits for S near 0 and for e_y near 0."""
    u = tl.log(S) - below
    nll = tl.where(u > 0, u, 0.0) + log1p(tl.exp(-tl.abs(u)))
    return tl.where(S == S, nll, S)  # a comparison loses NaN


@triton.jit
def entropy_of(log_z, exp_log, Z):
    """H = log Z - sum_v p_v log(p_v Z), from sum_v E_v log E_v = sum_v (p_v Z) log(p_v Z)."""
    return log_z - exp_log / Z


@triton.jit
def row_results(S, exp_log, below, inverse_temperature):
    """(log p, 1 / ((e_y + S) temperature), entropy), where `exp_log` is the sum of E log E without the target."""
    nll = target_nll(S, below)
    e_y = tl.exp(below)
    Z = e_y + S
    log_z = tl.where(below < -1, tl.log(Z), below + nll)  # the latter is exact where Z is near 1
    entropy = entropy_of(log_z, exp_log + xlogx(e_y), Z)  # before the reciprocal: the other order takes more registers
    return -nll, inverse_temperature / Z, entropy


@triton.jit
def missing_mass(log_p):
    """1 - p, exact to the last digits where p is near 1."""
    return tl.where(log_p > -1e-4, -log_p * (1 + log_p * (0.5 + log_p / 6)), 1 - tl.exp(log_p))


@triton.jit
def log_prob(z, log_z):
    """z - log z, no less than MIN_LOG."""
    log_p = z - log_z
    return tl.where(log_p < MIN_LOG, MIN_LOG, log_p)


# ---- divergences, as in pear_kernels.formulas.divergence


@triton.jit
def kl_term(log_a, log_b):
    """a log(a / b) - a + b for one outcome of two distributions."""
    x = log_a - log_b
    a = tl.exp(log_a)
    # x + expm1(-x), whose first two terms cancel near 0
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320))))))
    near = tl.where(tl.abs(x) < 0.5, series, x + tl.exp(-x) - 1)
    return tl.where(x < -1, a * x - a + tl.exp(log_b), a * near)


@triton.jit
def mixture(log_p, log_q, log_p_share, log_q_share):
    """log m of the Jensen-Shannon divergence, m = (1 - b) p + b q, from log(1 - b) and log b."""
    p, q = log_p + log_p_share, log_q + log_q_share
    larger = tl.maximum(p, q)
    return larger + tl.log(tl.exp(p - larger) + tl.exp(q - larger))


@triton.jit
def divergence_slope(log_p, log_q, kl_of_p, p_share, log_p_share, log_q_share, KIND: tl.constexpr):
    """dD/dz of one outcome; `p_share` is 1 - b."""
    p = tl.exp(log_p)
    if KIND == FORWARD:
        x = log_q - log_p
        slope = tl.where(tl.abs(x) < 0.5, -p * expm1(x), p - tl.exp(log_q))
    elif KIND == REVERSE:
        slope = p * (log_p - log_q - kl_of_p)
    else:
        slope = p_share * p * (log_p - mixture(log_p, log_q, log_p_share, log_q_share) - kl_of_p)
    return slope
