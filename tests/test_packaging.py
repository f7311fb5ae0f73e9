"""`pip install -e .` alone: `pear_kernels` asks for torch and nothing else."""

import subprocess
import sys
from importlib.metadata import packages_distributions, requires

from packaging.requirements import Requirement

# Run where every distribution but torch and what torch itself requires looks as if it were not installed.
IMPORT_WITH_TORCH_ALONE = """
import sys
from importlib.machinery import PathFinder

forbidden = set(sys.argv[1:])

class TorchAlone(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in forbidden else super().find_spec(name, path, target)

sys.meta_path[:] = [TorchAlone if finder is PathFinder else finder for finder in sys.meta_path]

import torch
import pear_kernels

torch.manual_seed(0)
hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
target = torch.tensor([1, 0, 8, 3, 3, 5])
logprobs = torch.log_softmax(hidden.detach() @ weight.detach().T, 1)[torch.arange(6), target]
output = pear_kernels.linear_pear_loss(hidden, weight, target, logprobs, gamma=1.0)  # pi = pi_b: plain cross-entropy
output.loss.backward()
expected = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
torch.testing.assert_close(output.loss, expected)
assert not forbidden & {name.partition(".")[0] for name in sys.modules}
print(sorted(pear_kernels.__all__))
"""


def always_required(distribution: str) -> set[str]:
    found = (Requirement(line) for line in requires(distribution) or [])
    return {r.name.lower().replace("_", "-") for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_torch_is_the_only_requirement():
    assert always_required("pear-kernels") == {"torch"}


def test_kernels_work_with_torch_alone():
    allowed, new = set(), {"pear-kernels"}
    while new:
        allowed |= new
        new = set().union(*map(always_required, new)) - allowed
    forbidden = {
        module
        for module, distributions in packages_distributions().items()
        if not allowed & {name.lower().replace("_", "-") for name in distributions}
    }
    assert {"transformers", "trl", "numpy", "pytest"} <= forbidden
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_WITH_TORCH_ALONE, *sorted(forbidden)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [
        "Coefficients",
        "LinearDistillLoss",
        "LinearPEARLoss",
        "LinearPolicyLoss",
        "LinearWeightedLoss",
        "LossOutput",
        "Objective",
        "Pack",
        "Plan",
        "Teacher",
        "TopKTeacher",
        "linear_distill_loss",
        "linear_logprobs",
        "linear_objective_loss",
        "linear_pear_loss",
        "linear_policy_loss",
        "linear_topk_logprobs",
        "linear_weighted_loss",
        "patch_causal_lm",
        "pear_weights",
        "plan",
        "unpatch_causal_lm",
    ]
    assert done.stdout.strip() == str(names)
