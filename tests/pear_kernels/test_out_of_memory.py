"""Out of memory: the error says what the call asked for, and which option lowers it."""

import subprocess
import sys

import pytest
import torch

from pear_kernels import linear_logprobs, linear_pear_loss
from pear_kernels.backends.torch.head import Head

N, D, V = 6, 4, 9


def call(**changes):
    arguments = dict(
        hidden=torch.randn(N, D), weight=torch.randn(V, D), target=torch.arange(N), behavior_logprobs=-torch.ones(N)
    )
    return linear_pear_loss(**(arguments | changes))


CUDA_SAYS = "CUDA out of memory. Tried to allocate 8.00 GiB."
CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(CUDA_SAYS), RuntimeError(CPU_SAYS)])
@pytest.mark.parametrize("workspace_bytes, size", [(None, "128.0 MiB"), (3 << 20, "3.0 MiB")])
def test_out_of_memory_names_the_workspace_and_the_option(error, workspace_bytes, size, monkeypatch):
    def reserve(self, *_):
        raise error

    monkeypatch.setattr(Head, "reserve", reserve)
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

    monkeypatch.setattr(Head, "reserve", reserve)
    with pytest.raises(torch.OutOfMemoryError, match="backward pass of linear_logprobs.*workspace.*gradient of hidden"):
        logprobs.sum().backward()


def test_other_errors_stay_as_they_are(monkeypatch):
    error = RuntimeError("something else")

    def reserve(self, *_):
        raise error

    monkeypatch.setattr(Head, "reserve", reserve)
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
