"""Each formula of the Triton kernels against the PyTorch one, on a grid that reaches the ends of its range."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kernel_problems import DEVICE

from pear_kernels.backends.triton import formulas
from pear_kernels.formulas import divergence, softmax
from pear_kernels.formulas.activation import Activation
from pear_kernels.options import DIVERGENCES, DivergenceOptions, PEAROptions

BLOCK = 256
FLOAT32, FLOAT64 = 2e-6, 1e-14  # relative
TINY = torch.finfo(torch.float64).tiny  # subnormal numbers have fewer digits


def on_grid(kernel, *columns, dtype=torch.float64, out=1, scalars=(), **constexprs):
    """The kernel's `out` results (n,) of columns (n,), computed in `dtype`."""
    n = len(columns[0])
    padded = [torch.nn.functional.pad(c.to(DEVICE, dtype), (0, -n % BLOCK)).contiguous() for c in columns]
    results = torch.empty(out, len(padded[0]), dtype=dtype, device=DEVICE)
    stride = results.stride(0)
    kernel[(len(padded[0]) // BLOCK,)](*padded, results, stride, *scalars, BLOCK=BLOCK, **constexprs)
    return [result[:n] for result in results]


def assert_close(found, expected, tolerance, floor=0.0):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=floor, equal_nan=True)


# ---- softcap and temperature


@triton.jit
def activated(
    raw, out, stride, softcap, inverse, SOFTCAP: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z, slope = formulas.activate(tl.load(raw + at), softcap, inverse, SOFTCAP, TEMPERATURE)
    tl.store(out + at, z)
    tl.store(out + stride + at, slope)
    if SOFTCAP:
        slope = formulas.slope_at(z, softcap, inverse)
    tl.store(out + 2 * stride + at, slope)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 4.0, 30.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, FLOAT64)])
def test_softcap_and_temperature(softcap, temperature, dtype, tolerance):
    size = torch.logspace(-6, 3, 100, dtype=torch.float64).to(dtype)
    raw = torch.cat([-size, torch.zeros(1, dtype=dtype), size]).to(DEVICE)
    z, slope, slope_at = on_grid(
        activated, raw, dtype=dtype, out=3, scalars=(softcap or 1.0, 1 / temperature),
        SOFTCAP=softcap is not None, TEMPERATURE=temperature != 1.0,
    )  # fmt: skip
    activation, exact = Activation(temperature, softcap), raw.double()
    activation.apply_(exact)
    expected = activation.slope(exact)
    expected = torch.ones_like(exact) if expected is None else expected
    # near 0 the float64 form has no series: it cancels, as the docstring of `tanh` says
    assert_close(z, exact, tolerance, floor=0.0 if dtype == torch.float32 else 1e-14)
    for found in (slope, slope_at):  # 1 - tanh^2
        assert_close(found, expected, tolerance, floor=tolerance)


# ---- log p, log Z and entropy from a row's sums


@triton.jit
def finished(S, exp_log, below, out, stride, inverse, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    log_p, scale, H = formulas.row_results(tl.load(S + at), tl.load(exp_log + at), tl.load(below + at), inverse)
    tl.store(out + at, log_p)
    tl.store(out + stride + at, scale)
    tl.store(out + 2 * stride + at, H)
    tl.store(out + 3 * stride + at, formulas.missing_mass(log_p))


def test_log_prob_and_entropy_from_sums():
    """1 - p from 1e-300 to 1 and p down to exp(-1000); the target at the anchor and far below and above it."""
    logs = torch.cat([torch.linspace(-690, 690, 47), torch.linspace(-3, 3, 13), torch.tensor([-torch.inf])]).double()
    below = torch.tensor([0.0, 1e-9, -1e-9, -0.5, -2.0, -40.0, -300.0, -700.0, 30.0, 300.0], dtype=torch.float64)
    logs, below = (column.flatten().to(DEVICE) for column in torch.meshgrid(logs, below, indexing="ij"))
    S = logs.exp()
    exp_log = torch.xlogy(S, S)  # one other token
    log_p, scale, H, missing = on_grid(finished, S, exp_log, below, out=4, scalars=(1 / 0.7,))
    e_y = below.exp()
    Z, nll = e_y + S, softmax.nll(S, below)
    assert_close(log_p, -nll, FLOAT64, floor=TINY)
    assert_close(scale, 1 / (Z * 0.7), FLOAT64)
    assert_close(missing, -torch.expm1(-nll), 1e-11, floor=TINY)  # its series has three terms
    log_z = torch.where(below < -1, Z.log(), below + nll)
    assert_close(H, softmax.entropy(log_z, exp_log + torch.xlogy(e_y, e_y), Z), FLOAT64, floor=1e-11)


def test_a_row_of_nan_has_no_log_prob():
    nan, zero = torch.full((1,), torch.nan), torch.zeros(1)
    assert on_grid(finished, nan, nan, zero, out=4, scalars=(1.0,))[0].isnan().all()


# ---- divergences


@triton.jit
def compared(
    log_p, log_q, kl_of_p, out, stride, share, log_p_share, log_q_share, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q = tl.load(log_p + at), tl.load(log_q + at)
    m = formulas.mixture(p, q, log_p_share, log_q_share)
    if KIND == 0:
        kl = formulas.kl_term(q, p)
    elif KIND == 1:
        kl = formulas.kl_term(p, q)
    else:
        kl = (1 - share) * formulas.kl_term(q, m) + share * formulas.kl_term(p, m)
    tl.store(out + at, kl)
    slope = formulas.divergence_slope(p, q, tl.load(kl_of_p + at), share, log_p_share, log_q_share, KIND)
    tl.store(out + stride + at, slope)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_and_slope(kind):
    """Single outcomes: log p and log q from 0 to MIN_LOG, equal, nearly equal and far apart."""
    options = DivergenceOptions(divergence=kind, js_beta=0.3)
    logs = torch.tensor([-1e-6, -0.1, -1.0, -3.0, -20.0, -80.0, softmax.MIN_LOG])
    gaps = torch.tensor([0.0, 1e-4, -0.01, 0.3, -2.0, -50.0])
    log_p, gap = (column.flatten() for column in torch.meshgrid(logs, gaps, indexing="ij"))
    log_q = (log_p + gap).clamp(max=0.0, min=softmax.MIN_LOG)
    log_p, log_q = log_p.to(DEVICE), log_q.to(DEVICE)
    kl_of_p = torch.full_like(log_p, 0.2)
    numbers = 1 - options.js_beta, math.log1p(-options.js_beta), math.log(options.js_beta)
    found, slope = on_grid(
        compared, log_p, log_q, kl_of_p, dtype=torch.float32, out=2, scalars=numbers, KIND=DIVERGENCES.index(kind)
    )
    p, q = log_p.double()[:, None], log_q.double()[:, None]  # a row of one outcome each: terms of sums
    m = divergence.compared_with(p, q, options)
    expected, _ = divergence.divergence(p, q, m, options)
    assert_close(found, expected, 2e-5, floor=1e-8)
    exact = divergence.slope(p, m, kl_of_p.double(), options)[:, 0]
    assert_close(slope, exact, 2e-5, floor=1e-7)


# ---- the clips of PEAR's weights


@triton.jit
def clamped(u, out, stride, low, high, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, formulas.clamp(tl.load(u + at), low, high))


def test_clip_of_log_ratios_and_log_weights():
    u = torch.tensor([-torch.inf, -3.0, -1.0, -0.3, 0.0, 0.4, 1.0, 5.0, torch.inf, torch.nan], dtype=torch.float64)
    for low, high in (PEAROptions().log_ratio_clip, PEAROptions().log_weight_clip, (-0.3, 0.4)):
        (found,) = on_grid(clamped, u, scalars=(low, high))
        assert_close(found, u.to(DEVICE).clamp(low, high), 0.0)
