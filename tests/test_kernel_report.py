"""`make kernels`: its figures against what ptxas says of the same code, and each rule by a kernel that breaks it."""

import json
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from bench import cubin, kernels  # noqa: E402
from pear_kernels.backends.triton.launch import Launch  # noqa: E402

pytestmark = pytest.mark.skipif(knobs.runtime.interpret, reason="interpreted kernels have no machine code")


@triton.jit
def centred(x, n, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    row = tl.load(x + column, mask=column < n, other=0.0)
    tl.store(x + column, row - tl.sum(row), mask=column < n)


@triton.jit
def product(x, y, out, D, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, D, BLOCK):
        acc = tl.dot(x.load([0, k]), y.load([0, k]).T, acc, input_precision=PRECISION)
    out.store([0, 0], acc.to(out.dtype))


def meta(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rows(n: int = 64, block: int = 64, warps: int = 1) -> Launch:
    return Launch(centred, (1,), (meta(n), n), {"BLOCK": block}, warps, 1)


def matrix(dtype=torch.bfloat16, precision: str = "tf32", block: int = 64, stages: int = 2, D: int = 256) -> Launch:
    x, y, out = (TensorDescriptor.from_tensor(meta(block, size, dtype=dtype), [block, block]) for size in (D, D, block))
    return Launch(product, (1,), (x, y, out, D), {"BLOCK": block, "PRECISION": precision}, 4, stages)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def of_ptxas(launch: Launch, arch: int, folder) -> tuple[int, bool]:
    """Registers, and whether any were spilled."""
    source = folder / "kernel.ptx"
    source.write_text(cubin.warmup(launch, arch).asm["ptx"])
    ptxas = (knobs.nvidia.ptxas if arch < 90 else knobs.nvidia.ptxas_blackwell).path
    name = f"--gpu-name=sm_{arch}" + "a" * (arch >= 90)
    command = [ptxas, "-v", "--regAllocOptLevel=2", name, str(source), "-o", str(folder / "kernel.cubin")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.search(r"(\d+) bytes spill stores", said)
    return int(re.search(r"Used (\d+) registers", said).group(1)), spills.group(1) != "0"


@pytest.mark.parametrize("arch", cubin.CHIPS)
@pytest.mark.parametrize("launch", [rows(), matrix(), rows(8192, 8192)], ids=["rows", "matrix", "too many rows"])
def test_registers_and_spills_are_those_of_ptxas(launch, arch, tmp_path):
    found = cubin.inspect(launch, arch)
    assert (found.registers, found.spills > 0) == of_ptxas(launch, arch, tmp_path)


def test_matrix_instruction_and_loads():
    found = {arch: cubin.inspect(matrix(), arch) for arch in cubin.CHIPS}
    assert [figures.matrix for figures in found.values()] == ["mma.sync", "wgmma", "tcgen05"]
    assert {figures.kind for figures in found.values()} == {"product"}
    assert [found[90].loads, found[100].loads] == ["TMA", "TMA"]
    exact = cubin.inspect(matrix(torch.float32, "ieee", block=32), 90)
    assert (exact.kind, exact.matrix) == ("float32 product", "none")
    assert cubin.inspect(rows(), 90).kind == "rows"


def test_launches_that_share_code_are_compiled_once():
    def key(n: int, **options) -> str:
        return cubin.variant(rows(n, **options), 90).key

    assert key(64) == key(1024)  # both are multiples of 16
    assert len({key(64), key(65), key(1), key(64, warps=2), key(64, block=128)}) == 5
    configs = [cubin.variant(rows(n), 90).config for n in (64, 65, 1)]
    assert configs == ["fp32 64 w1 s1", "fp32 64 n%16 w1 s1", "fp32 64 n=1 w1 s1"]


def run(monkeypatch, capsys, launches: list[Launch], *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(kernels, "launches", lambda arch: launches)
    monkeypatch.setattr(kernels, "CHIPS", {90: cubin.CHIPS[90]})
    code = kernels.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_budgets(tmp_path, monkeypatch, capsys):
    budgets = tmp_path / "budgets.json"
    monkeypatch.setattr(kernels, "TABLE", tmp_path / "kernels.md")
    options = ("--budgets", budgets)
    code, said = run(monkeypatch, capsys, [rows(), matrix()], *options)
    assert code == 1 and "--update" in said
    assert run(monkeypatch, capsys, [rows(), matrix()], *options, "--update")[0] == 0
    assert "| wgmma" in (tmp_path / "kernels.md").read_text()
    code, said = run(monkeypatch, capsys, [rows(), matrix()], *options)
    assert code == 0 and said.splitlines()[1:] == []  # the first tells how many there are

    code, said = run(monkeypatch, capsys, [rows(), rows(65), matrix()], *options)
    assert code == 1 and "centred, fp32 64 n%16 w1 s1, sm_90: no budget" in said
    code, said = run(monkeypatch, capsys, [rows()], *options)
    assert code == 1 and re.search(r"product, bf16 64 .*sm_90: has a budget, and is not launched any more", said)

    written = json.loads(budgets.read_text())
    limits = written["kernels"]["centred"]["fp32 64 w1 s1"]["sm_90"]
    measured, limits["instructions"] = limits["instructions"], 7
    budgets.write_text(json.dumps(written))
    code, said = run(monkeypatch, capsys, [rows(), matrix()], *options)
    found = re.search(r"centred, fp32 64 w1 s1, sm_90: instructions (\d+), above its budget of 7\n", said)
    assert code == 1 and 7 < int(found.group(1)) <= measured

    written["triton"] = "0.0"  # another compiler's budgets say nothing
    budgets.write_text(json.dumps(written))
    code, said = run(monkeypatch, capsys, [rows(), matrix()], *options)
    assert code == 0 and "not compared" in said


@pytest.mark.parametrize(
    "launch, said",
    [
        (rows(8192, 8192), r"centred, fp32 8192 w1 s1, sm_90: spills \d+ bytes"),
        (matrix(block=128, stages=8, D=2048), r"product, .* sm_90: shared \d{6} bytes, above the chip's 232448"),
        (rows(48, 48), r"centred, fp32 48 .*: does not compile: .*power of 2"),
    ],
    ids=["spills", "shared", "does not compile"],
)
def test_what_no_budget_allows(launch, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "TABLE", tmp_path / "kernels.md")
    code, errors = run(monkeypatch, capsys, [launch], "--budgets", tmp_path / "budgets.json", "--update")
    assert code == 1 and re.search(said, errors)
    assert not any(file.is_file() for file in tmp_path.iterdir())  # neither budgets nor a table


def test_a_product_without_the_matrix_unit_is_refused():
    figures = cubin.inspect(matrix(), 80)._replace(matrix="none")
    (wrong,) = kernels.problems(("product", "bf16", "sm_80"), figures, 163 * 1024, "mma.sync")
    assert wrong == "product, bf16, sm_80: no mma.sync in its code, found none"
