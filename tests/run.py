"""`make test`: pytest twice over, and the arguments are pytest's.

Triton decides when it is first imported whether kernels are compiled or interpreted, so tests that interpret them,
which need no GPU, have a process of their own. A choice such as `-k name` may leave one of the two runs without a test.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = ROOT / "tests" / "pear_kernels" / "interpreted"
NO_TESTS = 5  # pytest's exit code


def main(arguments: list[str]) -> int:
    named = [argument for argument in arguments if is_test_path(argument)]
    options = [argument for argument in arguments if argument not in named]
    interpreted = [path for path in named if INTERPRETED in (resolved(path), *resolved(path).parents)]
    others = [path for path in named if path not in interpreted]
    if any(resolved(path) in INTERPRETED.parents for path in others):
        interpreted.append(str(INTERPRETED.relative_to(ROOT)))
    codes = []
    if others or not named:
        # with a GPU the kernels' tests run here too, compiled; without, they are skipped
        codes.append(pytest([*options, *others], interpret="0"))
    if interpreted or not named:
        if find_spec("triton") is None:
            print("The kernels' tests need triton, which has wheels for Linux alone: left out", file=sys.stderr)
        else:
            codes.append(pytest([*options, *(interpreted or [str(INTERPRETED.relative_to(ROOT))])], interpret="1"))
    failed = [code for code in codes if code not in (0, NO_TESTS)]
    return failed[0] if failed else min(codes, default=NO_TESTS)


def pytest(arguments: list[str], interpret: str) -> int:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


def is_test_path(argument: str) -> bool:
    path = resolved(argument)
    return path.exists() and ROOT / "tests" in (path, *path.parents)


def resolved(argument: str) -> Path:
    return (ROOT / argument.partition("::")[0]).resolve()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
