"""Which backend runs: the argument, the environment, the device; and what is said where the wish cannot be met."""

import subprocess
import sys
import types
import warnings

import pytest
import torch
from problems import gradients, make_problem

from pear_kernels import (
    LinearPEARLoss,
    linear_distill_loss,
    linear_logprobs,
    linear_pear_loss,
    linear_topk_logprobs,
    linear_weighted_loss,
    pear_weights,
)
from pear_kernels.backends import choice as backend
from pear_kernels.backends import triton as triton_package
from pear_kernels.backends.torch import head, logits_head
from pear_kernels.formulas import pear_weights as formulas

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FLOAT = torch.float32


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No wish in the environment, nothing remembered of earlier calls."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "_warned", False)
    monkeypatch.setattr(backend, "interpreting", lambda: False)
    backend.triton_obstacle.cache_clear()
    yield
    backend.triton_obstacle.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of some compute capability, as far as `resolve` asks."""

    def make(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        backend.triton_obstacle.cache_clear()

    pytest.importorskip("triton")
    monkeypatch.setattr(torch.version, "hip", None)
    make((9, 0))
    return make


def test_the_device_decides(gpu):
    assert backend.resolve(None, CPU, FLOAT) == "torch"
    assert backend.resolve(None, GPU, FLOAT) == "triton"
    assert backend.resolve(None, GPU, torch.bfloat16) == "triton"


def test_the_environment_goes_before_the_device_and_the_argument_before_both(gpu, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "torch")
    assert backend.resolve(None, GPU, FLOAT) == "torch"
    assert backend.resolve("triton", GPU, FLOAT) == "triton"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.resolve(None, GPU, FLOAT) == "triton"
    assert backend.resolve("torch", GPU, FLOAT) == "torch"
    monkeypatch.setenv(backend.VARIABLE, "")
    assert backend.resolve(None, CPU, FLOAT) == "torch"


@pytest.mark.parametrize("wish", [None, "triton", "torch"])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_float64_is_always_torch(gpu, wish, device):
    assert backend.resolve(wish, device, torch.float64) == "torch"


@pytest.mark.parametrize("capability", [(7, 0), (7, 5)])
def test_an_old_gpu_falls_back_with_one_warning(gpu, capability):
    gpu(capability)
    with pytest.warns(RuntimeWarning, match=rf"Some GPU has compute capability {capability[0]}.{capability[1]}.* 8.0"):
        assert backend.resolve(None, GPU, FLOAT) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve(None, GPU, FLOAT) == "torch"
        assert backend.resolve(None, torch.device("cuda", 1), FLOAT) == "torch"
    with pytest.raises(ValueError, match="backend is 'triton', but Some GPU has compute capability 7"):
        backend.resolve("triton", GPU, FLOAT)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus_run_the_kernels_without_a_word(gpu, capability):
    gpu(capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.resolve(None, GPU, FLOAT) == "triton"


def test_rocm_falls_back(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(RuntimeWarning, match="built for ROCm"):
        assert backend.resolve(None, GPU, FLOAT) == "torch"


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    with pytest.warns(RuntimeWarning, match="triton cannot be imported"):
        assert backend.resolve(None, GPU, FLOAT) == "torch"
    with pytest.raises(ValueError, match="triton cannot be imported.*install the triton that belongs to torch"):
        backend.resolve("triton", GPU, FLOAT)
    assert backend.resolve(None, CPU, FLOAT) == "torch"


def calls(problem, **options):
    """Every public function on the problem's tensors."""
    hidden, weight = problem.hidden, problem.weight
    return {
        "linear_pear_loss": lambda: linear_pear_loss(
            hidden, weight, problem.target, problem.behavior_logprobs, cu_seqlens=problem.cu_seqlens, **options
        ),
        "LinearPEARLoss": lambda: LinearPEARLoss(**options)(hidden, weight, problem.target, problem.behavior_logprobs),
        "linear_logprobs": lambda: linear_logprobs(hidden, weight, problem.target, **options),
        "pear_weights": lambda: pear_weights(problem.behavior_logprobs, problem.behavior_logprobs, **options),
    }


@pytest.mark.parametrize("name", calls(make_problem()))
def test_unknown_backends_are_refused_by_name(name, monkeypatch):
    problem = make_problem(dtype=FLOAT)
    with pytest.raises(ValueError, match="backend must be 'triton' or 'torch'.*got 'cuda'"):
        calls(problem, backend="cuda")[name]()
    monkeypatch.setenv(backend.VARIABLE, "Triton")
    with pytest.raises(ValueError, match="PEAR_KERNELS_BACKEND must be 'triton' or 'torch'.*got 'Triton'"):
        calls(problem)[name]()


@pytest.mark.parametrize("name", calls(make_problem()))
def test_triton_on_cpu_tensors_is_refused_and_says_what_to_do(name, monkeypatch):
    pytest.importorskip("triton")
    problem = make_problem(dtype=FLOAT)
    with pytest.raises(ValueError, match="backend is 'triton', but the tensors are on cpu.*TRITON_INTERPRET=1"):
        calls(problem, backend="triton")[name]()
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(ValueError, match="PEAR_KERNELS_BACKEND is 'triton', but the tensors are on cpu"):
        calls(problem)[name]()
    calls(make_problem(dtype=torch.float64))[name]()  # runs on the PyTorch path whatever was wished


@pytest.fixture
def watched(monkeypatch):
    """Stand-ins for the kernels, which list what is made of them."""
    pytest.importorskip("triton")
    made = []

    class Head(head.Head):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append("head")

    class PEARWeights(formulas.PEARWeights):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append("weights")

    class LogitsHead(logits_head.LogitsHead):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append("logits head")

    for name, part in (("head", Head), ("logits_head", LogitsHead), ("pear_weights", PEARWeights)):
        module = types.ModuleType(f"pear_kernels.backends.triton.{name}")
        setattr(module, part.__name__, part)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(triton_package, name, module, raising=False)  # where another test has imported the real one
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    return made


def loss_of_all(problem, wish):
    """A scalar through every op, with gradients."""

    def loss(hidden, weight):
        out = linear_pear_loss(hidden, weight, problem.target, problem.behavior_logprobs, backend=wish)
        logprobs, entropy = linear_logprobs(hidden, weight, problem.target, return_entropy=True, backend=wish)
        g = pear_weights(logprobs, problem.behavior_logprobs, problem.target >= 0, backend=wish)
        dft = linear_weighted_loss(hidden, weight, problem.target, weighting="dft", backend=wish)
        teacher = linear_topk_logprobs(hidden, weight, problem.target, 3, backend=wish)
        distilled = linear_distill_loss(
            hidden, weight, teacher, problem.target, problem.behavior_logprobs, nll_coef=1.0, backend=wish
        )
        return out.loss - (g * logprobs).sum() + entropy.sum() + dft.loss + distilled.loss

    return loss


@pytest.mark.parametrize("compiled", [False, True])
def test_the_choice_reaches_every_op(watched, compiled, monkeypatch):
    problem = make_problem(dtype=FLOAT)
    torch._dynamo.reset()

    def run(wish):
        watched.clear()
        loss, leaves = loss_of_all(problem, wish), problem.leaves()
        if compiled:
            loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
        grads = gradients(loss(*leaves), leaves)
        return sorted(watched), grads

    # linear_logprobs' backward pass with the entropy's gradient, linear_topk_logprobs and linear_distill_loss; forward
    # passes of the other three; weights of two losses and of their own
    everything = ["head"] * 3 + ["logits head"] * 3 + ["weights"] * 3
    of_torch, exact = run("torch")
    of_triton, grads = run("triton")
    assert of_torch == [] and of_triton == everything
    torch.testing.assert_close(grads, exact, rtol=1e-6, atol=1e-7)
    assert run(None)[0] == []
    monkeypatch.setenv(backend.VARIABLE, "triton")  # read when an op runs, so a compiled graph follows it
    assert run(None)[0] == everything
    assert run("torch")[0] == []


def test_importing_the_package_imports_neither_triton_nor_the_compiler():
    """Which take longer than PyTorch itself."""
    heavy = "pear_kernels.backends.triton", "torch._dynamo", "torch._inductor"
    code = f"import pear_kernels, sys; print(*(m for m in sys.modules if m.startswith({heavy})))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
