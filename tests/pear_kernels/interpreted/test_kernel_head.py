"""The head's operations one by one, where a whole loss would hide an error or make it small."""

import math

import pytest
import torch
from kernel_problems import DEVICE, HEADS, PRODUCTS, TOLERANCE, Head
from problems import relative_error

from pear_kernels.backends.triton import head as triton_head
from pear_kernels.backends.triton import tiles
from pear_kernels.backends.triton.logits_head import LogitsHead

R, V, D = 21, 75, 24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TARGETS = torch.arange(R, device=DEVICE) * 7 % V


@pytest.fixture(params=PRODUCTS)
def product(request, monkeypatch):
    monkeypatch.setenv(tiles.VARIABLE, request.param)
    return request.param


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_head(name="plain", dtype=torch.float32, rows=R, kind=Head):
    """A head, what its options mean in float64 (raw logits -> logits), and hidden states."""
    options = dict(HEADS[name])
    bias = randn(V, seed=2, dtype=dtype) if options.pop("bias", False) else None
    temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
    weight, x = randn(V, D, seed=1, dtype=dtype) / 2, randn(R, D, dtype=dtype)
    head = kind(weight, bias, temperature, softcap, dtype)
    head.reserve(rows, True)

    def activate(raw):
        z = raw if softcap is None else softcap * torch.tanh(raw / softcap)
        return z / temperature

    raw = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    return head, x, raw, activate


def gradient_of_raw(raw, activate, target, of_nll, of_entropy=None):
    """dL/d(raw logits), and the log-probs and entropies, by autograd in float64."""
    raw = raw.detach().requires_grad_()
    log_p = torch.log_softmax(activate(raw), 1)
    logprobs = log_p.gather(1, target[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    loss = -(of_nll * logprobs).sum() + (0 if of_entropy is None else (of_entropy * entropy).sum())
    (gradient,) = torch.autograd.grad(loss, raw)
    return gradient, logprobs.detach(), entropy.detach()


# ---- first product


@pytest.mark.parametrize("name", HEADS)
def test_softmax_is_the_gradient_of_the_raw_logits(name, product):
    """E, row scale and target mass one by one: of the target's raw logit too, where a softcap bends it."""
    head, x, raw, activate = make_head(name)
    made = head.softmax(x, TARGETS, gradient=True, entropy=True)
    exact, logprobs, entropy = gradient_of_raw(raw, activate, TARGETS, torch.ones(R, device=DEVICE).double())
    row = torch.arange(R, device=DEVICE)
    assert made.exp.shape == (R, V) and not made.exp[row, TARGETS].any()
    assert relative_error(-made.row_scale * made.target_mass, exact[row, TARGETS]) < TOLERANCE
    ours = made.row_scale[:, None] * made.exp.double()
    ours[row, TARGETS] = exact[row, TARGETS]
    for r in range(R):  # each row by itself: none hides behind a larger one
        assert relative_error(ours[r], exact[r]) < TOLERANCE
    assert relative_error(made.logprobs, logprobs) < TOLERANCE and relative_error(made.entropy, entropy) < TOLERANCE
    assert all(t.dtype == torch.float64 for t in (made.row_scale, made.logprobs, made.entropy, made.target_mass))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_workspace_is_written_where_the_rows_are_and_nowhere_else(dtype, product):
    head, x, raw, activate = make_head(dtype=dtype, rows=R + 3)
    head.workspace.fill_(7.0)
    made = head.softmax(x, TARGETS, gradient=True)
    assert made.exp.dtype == dtype and made.exp.isfinite().all()
    if head.workspace.dtype == dtype:
        assert (head.workspace[R:] == 7.0).all() and (head.workspace[:, V:] == 7.0).all()
    else:  # float32 logits, whose place E takes
        assert (head.workspace[R:] == 7.0).all() and (head.workspace[:R, V:] == 7.0).all()
    exact, _, _ = gradient_of_raw(raw, activate, TARGETS, torch.ones(R, device=DEVICE).double())
    others = torch.ones(R, V, dtype=torch.bool, device=DEVICE).scatter_(1, TARGETS[:, None], False)
    ours = made.row_scale[:, None] * made.exp.double()
    assert relative_error(ours[others], exact[others]) < max(TOLERANCE, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy_gradient_is_that_of_the_raw_logits(name, dtype):
    head, x, raw, activate = make_head(name, dtype, kind=LogitsHead)
    of_nll, of_entropy = randn(R, seed=3).double(), randn(R, seed=4).double()
    of_nll[:3], of_entropy[2:5] = 0.0, 0.0
    scores = head.scores(x, TARGETS, entropy=True)
    dz, row_scale = head.gradient(scores, of_nll, of_entropy)
    exact, logprobs, entropy = gradient_of_raw(raw, activate, TARGETS, of_nll, of_entropy)
    assert relative_error(scores.logprobs, logprobs) < TOLERANCE
    assert relative_error(scores.entropy, entropy) < TOLERANCE
    ours = row_scale[:, None].double() * dz.double()
    assert dz.dtype == dtype and not ours[2].any() and not exact[2].any()
    for r in [0, 1, *range(3, R)]:
        assert relative_error(ours[r], exact[r]) < max(2 * TOLERANCE, torch.finfo(dtype).eps / 2)


# ---- second and third


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masses", [True, False])
def test_grad_hidden_is_written_into_a_subset_of_rows(dtype, masses, monkeypatch):
    monkeypatch.setattr(triton_head, "ROW_BLOCK", 16)  # D = 24 is a block and a half
    head, _, _, _ = make_head(dtype=dtype)
    N = 40
    into = torch.full((N, D), math.pi, device=DEVICE, dtype=torch.float32 if dtype == torch.float16 else dtype)
    index = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:R].to(DEVICE)  # in no order
    factor = torch.zeros(R, head.padded, device=DEVICE, dtype=dtype)[:, :V]
    factor.copy_(randn(R, V, seed=6).abs())
    scale = torch.linspace(-2, 3, R, device=DEVICE)
    mass = randn(R, seed=7).abs().double() * 30 if masses else None
    before = into.clone()
    head.write_grad_hidden_(into, index, factor, scale, TARGETS, mass)
    exact = factor.double() @ head.weight.double()
    if masses:
        exact -= mass[:, None] * head.weight.double()[TARGETS]
    exact *= scale[:, None].double()
    assert relative_error(into[index], exact) < max(1e-6, torch.finfo(into.dtype).eps / 2)
    untouched = torch.ones(N, dtype=torch.bool, device=DEVICE)
    untouched[index] = False
    assert torch.equal(into[untouched], before[untouched])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grad_weight_is_written_first_and_added_to_after(dtype):
    head, x, _, _ = make_head(dtype=dtype)
    grad = torch.full((V, D), math.nan, device=DEVICE)  # as memory may come
    exact = torch.zeros(V, D, dtype=torch.float64, device=DEVICE)
    for chunk, rows in enumerate((R, 5, R)):
        factor = randn(rows, V, seed=chunk).abs().to(dtype)
        scale = randn(rows, seed=10 + chunk) * 10.0 ** (-3 * chunk)  # of later chunks smaller
        head.add_grad_weight_(grad, factor, x[:rows], scale, first=chunk == 0)
        exact += factor.double().T @ (scale[:, None].double() * x[:rows].double())
    assert relative_error(grad, exact) < max(1e-6, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_grad_weight_of_float16_whatever_the_coefficients_size(size):
    """1e-9 is below float16's range and 1e9 above it."""
    head, x, _, _ = make_head(dtype=torch.float16)
    grad = torch.zeros(V, D, device=DEVICE)
    factor, scale = randn(R, V).abs().half(), randn(R, seed=1) * size
    scale[3] = 0.0
    for first in (True, False):
        head.add_grad_weight_(grad, factor, x, scale, first=first)
    exact = 2 * factor.double().T @ (scale[:, None].double() * x.double())
    assert relative_error(grad, exact) < torch.finfo(torch.float16).eps / 2
    before = grad.clone()  # a chunk without weight adds nothing and scales nothing away
    head.add_grad_weight_(grad, factor, x, scale * 0, first=False)
    assert torch.equal(grad, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("upstream", [1.0, -0.3])
@pytest.mark.parametrize("rows", [1, 341])  # 24 columns: less than a block, and no multiple of one
def test_gradients_are_scaled_and_rounded_once(rows, upstream, dtype):
    gradient, by = randn(rows, D), torch.tensor(upstream, device=DEVICE)
    found = triton_head.scale_and_round(gradient, by, dtype)
    assert torch.equal(found, (gradient * by).to(dtype))


@pytest.mark.parametrize("entropy", [False, True])
def test_float32_log_probs_are_the_same_with_and_without_a_gradient(entropy):
    """Bit for bit, in the variant that the table has for float32: ratios to a policy's own log-probs are 1."""
    head, x, *_ = make_head()
    head.choice = head.choice._replace(product="plain")
    found = [head.softmax(x, TARGETS, gradient=gradient, entropy=entropy) for gradient in (True, False)]
    assert found[1].exp is None
    assert torch.equal(found[0].logprobs, found[1].logprobs)
    assert not entropy or torch.equal(found[0].entropy, found[1].entropy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns", [(1, 2), (31, 127), (32, 128), (33, 129), (70, 300)])
def test_grad_bias_adds_to_what_is_there(dtype, rows, columns):
    head = Head(randn(columns, 8, dtype=dtype), randn(columns, dtype=dtype), 1.0, None, dtype)
    padded = torch.full((rows, head.padded), math.nan, device=DEVICE, dtype=dtype)  # between rows there may be anything
    padded[:, :columns] = randn(rows, columns, seed=1).abs()
    scale, grad = randn(rows, seed=2), randn(columns, seed=3)
    exact = grad.double() + padded[:, :columns].double().T @ scale.double()
    head.add_grad_bias_(grad, padded[:, :columns], scale)
    assert relative_error(grad, exact) < 1e-6


# ---- the target's term


def check_subtraction(target, dtype=torch.float32, layout=lambda x: x, weight=True, bias=True, columns=D):
    n, N = len(target), len(target) + 6
    head = Head(randn(V, columns, dtype=dtype), None, 1.0, None, dtype)
    hidden = layout(randn(N, columns, seed=1, dtype=torch.float32 if dtype == torch.float32 else dtype))
    index = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:n].to(DEVICE)
    scale = randn(n, seed=3)
    scale[::5] = 0.0
    hidden[index[::5]] = math.nan  # rows of scale 0 add nothing, whatever stands there
    grad_weight, grad_bias = randn(V, columns, seed=4), randn(V, seed=5)
    exact_weight, exact_bias = grad_weight.double(), grad_bias.double()
    x = hidden[index].double().nan_to_num()
    exact_weight.index_add_(0, target, -scale[:, None].double() * x)
    exact_bias.index_add_(0, target, -scale.double())
    before = grad_weight.clone(), grad_bias.clone()
    head.subtract_targets_(grad_weight if weight else None, grad_bias if bias else None, hidden, index, target, scale)
    untouched = torch.ones(V, dtype=torch.bool, device=DEVICE)
    untouched[target] = False
    for wanted, grad, was, exact in (
        (weight, grad_weight, before[0], exact_weight),
        (bias, grad_bias, before[1], exact_bias),
    ):
        if wanted:
            assert relative_error(grad, exact) < 1e-6
            assert torch.equal(grad[untouched], was[untouched])
        else:
            assert torch.equal(grad, was)


ALL_DIFFERENT = torch.randperm(V, generator=torch.Generator().manual_seed(0))[:40].to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "target", [torch.full((40,), 3, device=DEVICE), ALL_DIFFERENT, ALL_DIFFERENT % 4], ids=["one", "all", "few"]
)
def test_targets_are_subtracted_once_each(target, dtype):
    check_subtraction(target, dtype)


def test_targets_are_subtracted_at_either_end_of_the_vocabulary():
    check_subtraction(torch.tensor([V - 1, 0, V - 1, 0, 0, V - 1, 1], device=DEVICE))
    check_subtraction(torch.tensor([V - 1], device=DEVICE))


@pytest.mark.parametrize("columns", [1, 255, 256, 257])
def test_targets_are_subtracted_over_all_of_the_hidden_size(columns):
    check_subtraction(torch.tensor([4, 4, 9], device=DEVICE), columns=columns)


@pytest.mark.parametrize("weight, bias", [(True, False), (False, True)])
def test_targets_are_subtracted_from_what_is_trained(weight, bias):
    check_subtraction(ALL_DIFFERENT[:12] % 5, weight=weight, bias=bias)


def rows_apart(x):
    return torch.nn.functional.pad(x, (1, 2))[:, 1:-2]


def transposed(x):
    return x.T.contiguous().T


@pytest.mark.parametrize("layout", [rows_apart, transposed])
def test_targets_are_subtracted_with_hidden_states_as_they_lie(layout):
    check_subtraction(ALL_DIFFERENT[:12] % 5, layout=layout)


def test_the_targets_term_rounds_hidden_states_as_the_products_do():
    """Under autocast hidden states are float32, and operands bfloat16."""
    head = Head(randn(V, D), None, 1.0, None, torch.bfloat16)
    hidden, index = randn(9, D, seed=1), torch.arange(9, device=DEVICE)
    grad, scale = torch.zeros(V, D, device=DEVICE), randn(9, seed=3)
    head.subtract_targets_(grad, None, hidden, index, TARGETS[:9], scale)
    exact = torch.zeros(V, D, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, TARGETS[:9], -scale[:, None].double() * hidden.bfloat16().double())
    assert relative_error(grad, exact) < 1e-6


# ---- operands


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_contiguous_and_aligned_and_copied_only_if_they_were_not(dtype):
    head = Head(randn(V, D, dtype=dtype), None, 1.0, None, dtype)
    x = randn(R, D, dtype=dtype)
    assert head.as_operand(x) is x or head.as_operand(x).data_ptr() == x.data_ptr()
    flat = torch.cat([x.new_zeros(1), x.flatten()])
    for odd in (flat[1:].view(R, D), x.T.contiguous().T, rows_apart(x), x[:1].expand(R, D)):
        widened = head.as_operand(odd)
        assert widened.is_contiguous() and widened.data_ptr() % triton_head.ALIGNMENT == 0
        assert torch.equal(widened, odd)


@pytest.mark.parametrize("setting, precision", [("none", "tf32x3"), ("ieee", "tf32x3"), ("tf32", "tf32")])
def test_float32_products_go_by_pytorchs_switch(setting, precision):
    """The new switch: PyTorch's older functions for it refuse to answer once it was used."""
    matmul, weight = torch.backends.cuda.matmul, torch.zeros(32, 16)
    before = matmul.fp32_precision
    matmul.fp32_precision = setting
    try:
        assert Head(weight, None, 1.0, None, torch.float32).precision == precision
        # means nothing there: one kernel for both
        assert Head(weight, None, 1.0, None, torch.bfloat16).precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_one_row_of_a_wider_tensor():
    """A single row may keep any stride, which a descriptor must not be told."""
    wide = randn(5, 19)
    head = Head(randn(40, 16, seed=1), None, 1.0, None, torch.float32)
    head.reserve(1, True)
    target = torch.tensor([7], device=DEVICE)
    x = head.as_operand(wide[2:3, :16])
    logits = x.double() @ head.weight.double().T
    found = head.softmax(x, target, gradient=True).logprobs
    assert (found - torch.log_softmax(logits, 1)[0, 7]).abs().item() < 1e-6
