"""Problems whose targets are the argmax of full logits in half of the rows, for every loss."""

import torch
from problems import (
    Problem,
    make_distill_problem,
    make_policy_problem,
    make_problem,
    make_weighted_problem,
)
from torch import Tensor

from pear_kernels.reference import naive_logits

LENGTHS = (9, 1, 0, 17, 5)
KINDS = {
    "pear": make_problem,
    "weighted": make_weighted_problem,
    "idft": lambda *args, **options: make_weighted_problem(*args, weighting="idft", **options),
    "anchored": lambda *args, **options: make_weighted_problem(*args, weighting="anchored", **options),
    "policy": make_policy_problem,
    "bonus": lambda *args, **options: make_policy_problem(*args, entropy_coef=0.1, **options),
    "teacher": make_distill_problem,
    "top-k": lambda *args, **options: make_distill_problem(*args, top_k=3, **options),
}


def hit_and_miss(kind: str, **options) -> Problem:
    """Of tokens that count, one of three has the argmax as its target, one the second, one any."""
    problem = KINDS[kind](LENGTHS, ignored=0.2, **options)
    order = logits_of(problem).argsort(1, descending=True)
    rank = torch.arange(len(order)) % 3
    chosen = torch.where(rank == 0, order[:, 0], torch.where(rank == 1, order[:, 1], problem.target))
    problem.target = torch.where(problem.target < 0, problem.target, chosen)
    return problem


def logits_of(problem: Problem) -> Tensor:
    head = {name: problem.options[name] for name in ("bias", "temperature", "softcap") if name in problem.options}
    if "bias" in head:
        head["bias"] = head["bias"].double()
    return naive_logits(problem.hidden.double(), problem.weight.double(), **head)


def expected(problem: Problem, among: Tensor | None = None) -> tuple[float, float]:
    """(accuracy, mean entropy) from full float64 logits, over the tokens that count (and are `among` these)."""
    logits, counts = logits_of(problem), problem.target >= 0
    counts = counts if among is None else counts & among
    right = logits.argmax(1) == problem.target
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return right[counts].double().mean().item(), entropy[counts].mean().item()
