"""The wheel and the sdist: built from the tree, installed apart from it, and used as they come."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from test_packaging import always_required

ROOT = Path(__file__).resolve().parent.parent
NEWEST = (77, 0, 3)  # setuptools that knows the license field of pyproject.toml; torch asks for as much
BUILD = "from setuptools import build_meta; print(build_meta.{hook}({out!r}))"

# Run by the venv's Python, in which nothing but the wheel, torch and what torch itself requires can be found.
USE = """
import importlib.metadata, importlib.util, pathlib, sys
import torch
import pear_kernels
from pear_kernels import reference

venv = pathlib.Path(sys.prefix)
assert venv in pathlib.Path(pear_kernels.__file__).parents, pear_kernels.__file__
assert importlib.util.find_spec("numpy") is None and importlib.util.find_spec("transformers") is None
assert importlib.metadata.version("pear-kernels") == pear_kernels.__version__

torch.manual_seed(0)
hidden, weight = (torch.randn(n, 16, dtype=torch.float64, requires_grad=True) for n in (24, 50))
target, behavior = torch.randint(50, (24,)), -torch.rand(24, dtype=torch.float64)
bounds = torch.tensor([0, 9, 24], dtype=torch.int32)
found = pear_kernels.linear_pear_loss(hidden, weight, target, behavior, cu_seqlens=bounds, level="block")
gradients = torch.autograd.grad(found.loss, (hidden, weight))
expected, *_ = reference.naive_pear_loss(hidden, weight, target, behavior, cu_seqlens=bounds, level="block")
for ours, theirs in zip((found.loss, *gradients), (expected, *torch.autograd.grad(expected, (hidden, weight)))):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and sdist of the tree as it is."""
    version = tuple(map(int, distribution("setuptools").version.split(".")[:3]))
    if version < NEWEST:
        pytest.skip(f"setuptools {version} is older than {NEWEST}, and a build by itself would ask the network for one")
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    )
    return build(tree, "build_wheel", folder), build(tree, "build_sdist", folder)


def build(tree: Path, hook: str, out: Path) -> Path:
    """What pip does without isolation: the hook of pyproject.toml's backend, in the tree."""
    return out / run([sys.executable, "-c", BUILD.format(hook=hook, out=str(out))], tree).split()[-1]


def run(command: list, folder: Path, **environment: str) -> str:
    words, variables = [str(part) for part in command], {**os.environ, **environment}
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def venv(built, tmp_path_factory) -> Path:
    """An empty environment with the wheel, which sees torch and its requirements and nothing else of this one."""
    folder = tmp_path_factory.mktemp("venv")
    run([sys.executable, "-m", "venv", "--without-pip", folder], folder)
    alone, new = {}, {"torch"}
    while new:
        alone |= {name: distribution(name) for name in new}
        new = set().union(*map(always_required, new)) - alone.keys()
    links = folder / "torch-alone"
    links.mkdir()
    for found in alone.values():
        for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (links / top).exists():
                (links / top).symlink_to(found.locate_file(top))
    (packages(folder) / "torch.pth").write_text(f"{links}\n")
    install = [sys.executable, "-m", "pip", "--python", python(folder), "install", "--quiet", "--no-index", "--no-deps"]
    run([*install, built[0]], folder)
    return folder


def python(venv: Path) -> Path:
    return venv / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def packages(venv: Path) -> Path:
    return Path(run([python(venv), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], venv).strip())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_the_wheel_has_both_packages_whole_and_nothing_else(built):
    found = contents(built[0])
    tree = built[0].parent / "tree"
    expected = {
        path.relative_to(tree).as_posix()
        for package in ("pear", "pear_kernels")
        for path in (tree / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"pear/py.typed", "pear_kernels/py.typed", "pear_kernels/backends/triton/tiles.json"} <= expected
    [info] = {name.partition("/")[0] for name in found if name.partition("/")[0].endswith(".dist-info")}
    assert {name for name in found if not name.startswith(info)} == expected
    assert found[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"pear = pear.__main__:main" in found[f"{info}/entry_points.txt"]


def test_the_sdist_is_the_repository_and_makes_the_same_wheel(built, tmp_path):
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [tree] = tmp_path.iterdir()
    if (ROOT / ".git").exists() and shutil.which("git"):
        tracked = set(run(["git", "ls-files", "-z"], ROOT).split("\0")) - {""}
        here = {name for name in tracked if (ROOT / name).is_file() and not name.startswith(".")}
        assert not {name for name in here if not (tree / name).is_file()}
    assert contents(build(tree, "build_wheel", tmp_path)) == contents(wheel)


def test_the_wheel_works_beside_torch_alone(venv):
    run([python(venv), "-I", "-W", "ignore", "-c", USE], venv)
    done = subprocess.run([python(venv).with_name("pear"), "--help"], cwd=venv, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install 'pear-kernels[train]'")


def test_the_command_of_the_wheel_runs(venv):
    """With everything that the extra `train` asks for, by the path of this environment."""
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    everything = os.pathsep.join(paths)  # the editable install of this tree is no folder of these
    told = run([python(venv).with_name("pear"), "--help"], venv, PYTHONPATH=everything)
    assert all(f" {command} " in told for command in ("score", "import", "sft", "rl", "eval", "compare", "inspect"))
    ask = "import pear.io, pear_kernels; print(pear.io.__file__, pear_kernels.__file__)"
    where = run([python(venv), "-c", ask], venv, PYTHONPATH=everything)
    assert [Path(path).is_relative_to(venv) for path in where.split()] == [True, True]


@pytest.mark.slow
def test_a_type_checker_sees_the_types(venv, tmp_path):
    """mypy --strict on a caller's file, against the wheel; transformers is skipped, which takes it half a minute."""
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text("[mypy]\nstrict = True\n[mypy-transformers.*]\nfollow_imports = skip\n")
    caller = shutil.copy(ROOT / "tests" / "typed_consumer.py", tmp_path / "caller.py")
    told = run([sys.executable, "-m", "mypy", "--python-executable", python(venv), caller], tmp_path)
    assert "no issues found" in told
