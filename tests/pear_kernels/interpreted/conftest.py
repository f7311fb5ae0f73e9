"""The kernels' semantics, as Triton's interpreter runs them on CPU tensors; `tests/run.py` gives them their process.

On a machine with a GPU and without TRITON_INTERPRET=1 the same tests run compiled kernels. Elsewhere all are skipped.
"""

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # problems.py


def pytest_collection_modifyitems(items):
    # NumPy, which the interpreter computes with, warns of every 0 * inf and log 0 that a GPU passes over
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(quiet)


@pytest.fixture(autouse=True)
def round_to_bfloat16(monkeypatch):
    """The interpreter cuts float32 off to bfloat16, where GPUs round to the nearest, as PyTorch does."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(data, source, destination, mode):
        if str(source) != "fp32" or str(destination) != "bf16":
            return convert(data, source, destination, mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
