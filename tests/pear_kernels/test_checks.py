"""Bad input: each a clear error that names the argument."""

import math
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pear_kernels import LinearPEARLoss, checks, linear_logprobs, linear_pear_loss, pear_weights
from pear_kernels.backends.torch import head as cpu

N, D, V = 6, 4, 9


def call(**changes):
    arguments = dict(
        hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.arange(N), behavior_logprobs=-torch.ones(N)
    )
    arguments.update(changes)
    return linear_pear_loss(**arguments)


def with_value(position, value, base=None):
    tensor = -torch.ones(N) if base is None else base
    tensor[position] = value
    return tensor


def freed(tensor):
    """As FSDP1 leaves a parameter outside the forward: its shape, and no memory."""
    tensor.untyped_storage().resize_(0)
    return tensor


BAD = {
    "target too large": (
        dict(target=with_value(2, V, torch.arange(N))),
        r"target must be in \[0, 9\).*got 9 at flat position 2",
    ),
    "target negative": (dict(target=with_value(2, -1, torch.arange(N))), r"target must be in .*got -1"),
    "target of int32": (
        dict(target=torch.arange(N, dtype=torch.int32)),
        r"target must be torch.int64.*target.long\(\)",
    ),
    "target of floats": (dict(target=torch.zeros(N)), "target must be torch.int64"),
    "target of another length": (
        dict(target=torch.arange(N - 1)),
        r"target must have hidden's leading shape \(6,\), got \(5,\)",
    ),
    "hidden of one dimension": (
        dict(hidden=torch.randn(D)),
        r"hidden must be \(N, D\) or \(B, T, D\), got shape \(4,\)",
    ),
    "weight transposed": (
        dict(weight=torch.randn(D, V)),
        r"weight must be \(V, D\) with hidden's D = 4, got shape \(4, 9\)",
    ),
    "weight flattened by FSDP": (
        dict(weight=torch.randn(V * D)),
        r"weight must be \(V, D\), whole, got shape \(36,\) with 36 numbers: FSDP or DeepSpeed.*patch_causal_lm",
    ),
    "weight emptied by FSDP or ZeRO-3": (dict(weight=torch.randn(0)), r"got shape \(0,\) with 0 numbers: FSDP"),
    "weight whose memory FSDP has freed": (dict(weight=freed(torch.randn(V, D))), r"got shape \(9, 4\).*FSDP"),
    "weight of integers": (
        dict(weight=torch.ones(V, D, dtype=torch.int64)),
        "weight must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    "weight of another dtype": (
        dict(weight=torch.randn(V, D).bfloat16()),
        "hidden and weight must have one dtype.*float32 and torch.bfloat16",
    ),
    "weight on another device": (
        dict(weight=torch.randn(V, D, device="meta")),
        "weight must be on the device of .*cpu, got meta",
    ),
    "bias of another length": (dict(bias=torch.zeros(V + 1)), r"bias must have \(V,\) \(9,\), got \(10,\)"),
    "behavior of another length": (
        dict(behavior_logprobs=-torch.ones(N + 1)),
        r"behavior_logprobs must have target's shape \(6,\), got \(7,\)",
    ),
    "behavior in bfloat16": (
        dict(behavior_logprobs=-torch.ones(N).bfloat16()),
        "behavior_logprobs must be float32.*too coarse",
    ),
    "behavior nan": (
        dict(behavior_logprobs=with_value(3, math.nan)),
        "behavior_logprobs must be finite and at most 0, got nan at flat position 3",
    ),
    "behavior -inf": (dict(behavior_logprobs=with_value(3, -math.inf)), "behavior_logprobs must be finite"),
    "behavior positive": (
        dict(behavior_logprobs=with_value(3, 2e-4)),
        r"behavior_logprobs must be .*1 such tokens\): score the data again",
    ),
    "cu_seqlens not ascending": (
        dict(cu_seqlens=torch.tensor([0, 4, 2, N])),
        r"cu_seqlens must be ascending, got \[0, 4, 2, 6\]",
    ),
    "cu_seqlens short of N": (
        dict(cu_seqlens=torch.tensor([0, 4])),
        "cu_seqlens must begin with 0 and end at N = 6, got 0 and 4",
    ),
    "cu_seqlens not from 0": (dict(cu_seqlens=torch.tensor([1, N])), "cu_seqlens must begin with 0"),
    "cu_seqlens of floats": (dict(cu_seqlens=torch.tensor([0.0, N])), "cu_seqlens must be torch.int32 or torch.int64"),
    "cu_seqlens of one number": (dict(cu_seqlens=torch.tensor([0])), r"cu_seqlens must be \(S\+1,\)"),
    "level": (dict(level="word"), "level must be one of 'token', 'block', 'sequence', got 'word'"),
    "block_size": (dict(block_size=0), "block_size must be an integer of at least 1.*got 0"),
    "block_size of a float": (dict(block_size=2.5), "block_size must be an integer"),
    "gamma zero": (dict(gamma=0.0), r"gamma must be in \(0, 1\], got 0.0"),
    "gamma above one": (dict(gamma=1.01), r"gamma must be in \(0, 1\]"),
    "gamma nan": (dict(gamma=math.nan), r"gamma must be in \(0, 1\]"),
    "log_ratio_clip reversed": (dict(log_ratio_clip=(0.3, -0.08)), r"log_ratio_clip must be \(low, high\).*swap"),
    "log_weight_clip reversed": (dict(log_weight_clip=(5.0, -10.0)), r"log_weight_clip must be \(low, high\).*swap"),
    "log_ratio_clip of one": (dict(log_ratio_clip=(0.3,)), "log_ratio_clip must be two numbers"),
    "reduction": (dict(reduction="none"), "reduction must be one of 'mean', 'sum', 'sequence_mean', got 'none'"),
    "denominator": (dict(denominator=0.0), "denominator must be a positive number"),
    "denominator zero, as a tensor": (
        dict(denominator=torch.tensor(0)),
        "denominator must be a positive number, got 0",
    ),
    "denominator nan": (dict(denominator=torch.tensor(math.nan)), "denominator must be a positive number, got nan"),
    "gamma of text": (dict(gamma="0.9"), r"gamma must be in \(0, 1\], got '0.9'"),
    "log_ratio_clip of one number": (dict(log_ratio_clip=0.3), "log_ratio_clip must be two numbers"),
    "log_weight_clip without end": (dict(log_weight_clip=(0.0, math.inf)), "log_weight_clip must have a finite upper"),
    "cu_seqlens of a list": (dict(cu_seqlens=[0, N]), "cu_seqlens must be a tensor"),
    "workspace_bytes of a float": (dict(workspace_bytes=1e9), "workspace_bytes must be a positive integer"),
    "denominator of two": (dict(denominator=torch.ones(2)), "denominator must hold one number"),
    "sequence_scale of another length": (
        dict(sequence_scale=torch.ones(2)),
        r"sequence_scale must have \(S,\).*\(1,\), got \(2,\)",
    ),
    "sequence_scale nan": (dict(sequence_scale=torch.full((1,), math.nan)), "sequence_scale must be finite"),
    "temperature": (dict(temperature=0.0), "temperature must be a positive number"),
    "softcap": (dict(softcap=-1.0), "softcap must be a positive number"),
    "workspace_bytes": (dict(workspace_bytes=0), "workspace_bytes must be a positive integer"),
    "clip_blocks": (dict(clip_blocks=1), "clip_blocks must be True or False, got 1"),
    "center": (dict(center="yes"), "center must be True or False, got 'yes'"),
    "center at sequence level": (
        dict(center=True, level="sequence"),
        "center must be off at level 'sequence', got True.*all of them would be 1",
    ),
    "clip_length": (dict(clip_length=0), "clip_length must be an integer of at least 1.*or None, got 0"),
    "clip_length of a float": (dict(clip_length=64.0), "clip_length must be an integer.*got 64.0"),
    "normalize": (dict(normalize="token"), "normalize must be None or one of 'sequence', 'batch', got 'token'"),
    "normalize at sequence level": (
        dict(normalize="sequence", level="sequence"),
        "normalize must be off at level 'sequence', got 'sequence'",
    ),
    "normalize batch and labels": (
        dict(normalize="batch", sequence_label=torch.tensor([True])),
        "normalize must not be 'batch' beside sequence_label.*use 'sequence'",
    ),
    **{
        f"block_ids, {name}": (dict(level="block", block_ids=ids), message)
        for name, ids, message in (
            ("another length", torch.arange(N + 1), r"block_ids must have target's shape \(6,\), got \(7,\)"),
            ("a list", [0] * N, "block_ids must be a tensor, got list"),
            ("floats", torch.zeros(N), r"block_ids must be torch.int32 or torch.int64, got torch.float32.*int\(\)"),
            ("meta", torch.zeros(N, device="meta").int(), "block_ids must be on the device of .*cpu, got meta"),
            (
                "descending",
                torch.tensor([0, 4, -1, 2, 2, 5]),
                "block_ids must not descend .*got 2 after 4 at flat pos.*3",
            ),
            (
                "too small",
                torch.tensor([0, 1, -2, 3, 4, 5]),
                r"block_ids must be in \[0, 2147483648\).*got -2 at flat.*2",
            ),
            (
                "too large",
                torch.tensor([0, 1, 2, 3, 4, 2**31]),
                "block_ids must be in .*got 2147483648 at flat position 5",
            ),
        )
    },
    "block_ids at token level": (
        dict(block_ids=torch.arange(N)),
        "block_ids must be None at level 'token'.*use level 'block'",
    ),
    "behavior nan where a block has a ratio": (
        dict(level="block", block_ids=torch.arange(N), behavior_logprobs=with_value(3, math.nan)),
        "behavior_logprobs must be finite and at most 0, got nan at flat position 3",
    ),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_linear_pear_loss(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(**changes)


def test_cu_seqlens_with_padded_input():
    with pytest.raises(ValueError, match="cu_seqlens is for packs"):
        linear_pear_loss(
            torch.randn(2, 3, D), torch.randn(V, D), torch.zeros(2, 3).long(), -torch.ones(2, 3),
            cu_seqlens=torch.tensor([0, 3, 6]),
        )  # fmt: skip


def test_what_stands_at_ignored_tokens_does_not_matter():
    target = with_value(3, -100, torch.arange(N))
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    losses = [
        linear_pear_loss(hidden, weight, target, with_value(3, value)).loss.item() for value in (-1.0, math.nan, 7.0)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_nor_where_a_token_has_no_ratio():
    torch.manual_seed(0)
    arguments = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), level="block")
    arguments["block_ids"] = with_value(3, -1, torch.arange(N))
    losses = [
        call(**arguments, behavior_logprobs=with_value(3, value), clip_blocks=clip_blocks).loss.item()
        for value in (-1.0, math.nan, 7.0, -math.inf)
        for clip_blocks in (False, True)
    ]
    assert len(set(losses)) == 1  # in blocks of one token


def test_ids_may_start_anew_in_each_sequence_and_hold_anything_at_ignored_tokens():
    bounds, target = torch.tensor([0, 3, N]), with_value(4, -100, torch.arange(N))
    options = dict(level="block", target=target, cu_seqlens=bounds)
    assert call(**options, block_ids=torch.tensor([1, 1, 2**31 - 1, 0, -77, 1])).loss.isfinite()
    with pytest.raises(ValueError, match="block_ids must not descend .*got 0 after 1 at flat position 5"):
        call(**options, block_ids=torch.tensor([0, 0, 0, 1, 0, 0]).int())


def test_rounding_just_above_zero_is_no_error():
    assert call(behavior_logprobs=with_value(3, 5e-5)).loss.isfinite()


def test_linear_logprobs_and_module_check_too():
    with pytest.raises(ValueError, match="target must be in"):
        linear_logprobs(torch.randn(N, D), torch.randn(V, D), torch.full((N,), V))
    with pytest.raises(ValueError, match="gamma must be in"):
        LinearPEARLoss(gamma=2.0)
    with pytest.raises(ValueError, match="clip_length must be"):
        LinearPEARLoss(clip_length=-1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(behavior_logprobs=-torch.ones(N + 1)), "behavior_logprobs must have logprobs' shape"),
        (dict(logprobs=-torch.ones(N).half()), "logprobs must be float32"),
        (dict(mask=torch.ones(N)), r"mask must be torch.bool.*mask.bool\(\)"),
        (dict(mask=torch.ones(N - 1, dtype=torch.bool)), "mask must have logprobs' shape"),
        (dict(logprobs=-torch.ones(1, 1, N)), r"logprobs must be \(N,\) or \(B, T\)"),
        (dict(behavior_logprobs=torch.full((N,), math.nan)), "behavior_logprobs must be finite"),
        (dict(cu_seqlens=torch.tensor([0, 3])), "cu_seqlens must begin with 0 and end at N"),
        (dict(gamma=0), "gamma must be in"),
        (dict(center=None), "center must be True or False"),
        (dict(block_ids=torch.zeros(N)), "block_ids must be torch.int32 or torch.int64"),
        (dict(block_ids=torch.zeros(N + 1).int()), "block_ids must have logprobs' shape"),
        (dict(block_ids=torch.zeros(N).int()), "block_ids must be None at level 'token'"),
        (dict(block_ids=-torch.arange(N), level="sequence"), "block_ids must be in"),
    ],
)
def test_pear_weights(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pear_weights(**{"logprobs": -torch.ones(N), "behavior_logprobs": -torch.ones(N), **changes})


# ---- checks of values: off the CPU, and switched off


VALUES_THAT_ARE_BAD = {name: BAD[name] for name in ("target too large", "behavior nan", "cu_seqlens short of N")}


@pytest.mark.parametrize("changes, message", VALUES_THAT_ARE_BAD.values(), ids=VALUES_THAT_ARE_BAD.keys())
def test_checks_of_values_can_be_switched_off(changes, message, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    try:
        call(**changes)  # anything may come of it but our error
    except Exception as error:
        assert not isinstance(error, ValueError)
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_switched_off_checks_change_no_result(monkeypatch):
    arguments = dict(hidden=torch.randn(N, D), weight=torch.randn(V, D), denominator=3.0)
    checked = call(**arguments)
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "0")
    assert torch.equal(call(**arguments).loss, checked.loss)
    with pytest.raises(ValueError, match="gamma must be"):  # options stay checked
        call(gamma=2.0)


def test_the_switch_itself_is_checked(monkeypatch):
    monkeypatch.setenv("PEAR_KERNELS_CHECK_VALUES", "no")
    with pytest.raises(ValueError, match="PEAR_KERNELS_CHECK_VALUES must be 0 .* or 1, got 'no'"):
        call()
    with pytest.raises(ValueError, match="PEAR_KERNELS_CHECK_VALUES"):
        pear_weights(-torch.ones(N), -torch.ones(N))


class Asserts(TorchDispatchMode):
    """Lists the messages of asserts on the device."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._assert_async.msg:
            self.messages.append(args[1])
        return func(*args, **(kwargs or {}))


def test_checks_of_values_read_nothing_off_the_cpu():
    """A tensor of device "meta" has no values, so reading one raises, whichever way it is done."""
    big = 2**31 - 1
    floats, ids = torch.zeros(N, device="meta"), torch.zeros(N, dtype=torch.int64, device="meta")
    with Asserts() as asserts:
        checks.check_cu_seqlens(ids, big)
        checks.check_target(ids, ids == 0, big, -big)
        checks.check_logprobs("behavior_logprobs", floats, ids == 0)
        checks.check_denominator(floats[0])
        checks.check_sequence_scale(floats)
        checks.check_block_ids(ids, ids == 0, ids)
    names = ["cu_seqlens", "cu_seqlens", "target", "behavior_logprobs", "denominator", "sequence_scale"]
    names += ["block_ids", "block_ids"]
    assert [message.split()[1] for message in asserts.messages] == names
    # CUDA's assert takes no longer message
    assert all(message.startswith("pear_kernels: ") and len(message.encode()) < 255 for message in asserts.messages)


@pytest.mark.parametrize("denominator", [None, 3.0, torch.ones])
@pytest.mark.parametrize("padded", [False, True])
def test_checks_of_arguments_read_nothing(denominator, padded):
    """Nor do the functions around them: PyTorch's fake tensors of a GPU raise where a value is asked for."""
    shape = (2, N // 2) if padded else (N,)
    with FakeTensorMode(), torch.device("cuda"):
        head = dict(hidden=torch.randn(*shape, D), weight=torch.randn(V, D), target=torch.zeros(shape).long())
        behavior = torch.zeros(shape)
        bounds = None if padded else torch.zeros(3, dtype=torch.int32)
        out = linear_pear_loss(
            **head, behavior_logprobs=behavior, cu_seqlens=bounds, sequence_scale=torch.ones(2),
            denominator=denominator(()) if callable(denominator) else denominator, level="block",
            block_ids=torch.zeros(shape).int(), center=True, normalize="sequence",
        )  # fmt: skip
        results = [out.logprobs, linear_logprobs(**head), pear_weights(behavior, behavior, behavior < 1)]
        assert all(result.is_cuda and result.shape == shape for result in results)
        with pytest.raises(DataDependentOutputException):
            bool(out.loss > 0)  # as it would there


# ---- out of memory


CUDA_SAYS = "CUDA out of memory. Tried to allocate 8.00 GiB."
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), RuntimeError(CPU_SAYS)])
@pytest.mark.parametrize("workspace_bytes, size", [(None, "128.0 MiB"), (3 << 20, "3.0 MiB")])
def test_out_of_memory_names_the_workspace_and_the_option(error, workspace_bytes, size, monkeypatch):
    def reserve(self, *_):
        raise error

    monkeypatch.setattr(cpu.Head, "reserve", reserve)
    hidden, weight = torch.randn(N, D), torch.randn(V, D, requires_grad=True)
    message = rf"ran out of memory. It asks for a workspace of up to {size} \(lower it: workspace_bytes, now"
    with pytest.raises(type(error), match=message) as raised:
        call(hidden=hidden, weight=weight, workspace_bytes=workspace_bytes)
    assert type(raised.value) is type(error) and raised.value.__cause__ is error and str(error) in str(raised.value)
    assert "float32 gradient of weight (V, D) = (9, 4)" in str(raised.value)
    with pytest.raises(type(error), match=message) as raised:
        linear_logprobs(hidden, weight, torch.arange(N), workspace_bytes=workspace_bytes)
    assert "gradient of weight" not in str(raised.value)  # the forward pass makes none


def test_out_of_memory_in_a_backward_pass(monkeypatch):
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D)
    logprobs = linear_logprobs(hidden, weight, torch.arange(N))

    def reserve(self, *_):
        raise torch.OutOfMemoryError(CUDA_SAYS)

    monkeypatch.setattr(cpu.Head, "reserve", reserve)
    with pytest.raises(torch.OutOfMemoryError, match="backward pass of linear_logprobs.*workspace.*gradient of hidden"):
        logprobs.sum().backward()


def test_other_errors_stay_as_they_are(monkeypatch):
    error = RuntimeError("something else")

    def reserve(self, *_):
        raise error

    monkeypatch.setattr(cpu.Head, "reserve", reserve)
    with pytest.raises(RuntimeError, match="^something else$") as raised:
        call()
    assert raised.value is error


LITTLE_MEMORY = """
import resource, torch
from pear_kernels import linear_pear_loss

def call(V, D, **options):
    weight = torch.zeros(1, 1).expand(V, D).requires_grad_()
    return linear_pear_loss(torch.ones(1000, D), weight, torch.zeros(1000).long(), -torch.ones(1000), **options)

torch.set_num_threads(1)
call(64, 8)
address_space = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (address_space + (100 << 20), resource.RLIM_INFINITY))
for V, D, options in [(40_000, 8, {"workspace_bytes": 1 << 30}), (40_000, 1000, {})]:
    try:
        call(V, D, **options)
    except RuntimeError as error:
        print(str(error).split("[")[0])
print(call(40_000, 8, workspace_bytes=8 << 20).loss.item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own address space, which Linux counts")
def test_memory_that_is_really_short():
    """What PyTorch's CPU allocator says is recognised, and the advice helps."""
    run = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    workspace, gradient, loss = run.stdout.splitlines()
    assert workspace.startswith("linear_pear_loss ran out of memory. It asks for a workspace of up to 1024.0 MiB")
    assert "152.6 MiB for the float32 gradient of weight (V, D) = (40000, 1000)" in gradient
    assert float(loss) > 0
