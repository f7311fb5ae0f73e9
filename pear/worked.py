"""Worked solutions that a model can learn a task from, by task: their styles, tokenizer and training problems."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from transformers import PreTrainedTokenizerBase

from pear import arithmetic, countdown
from pear.tasks import Problem


@dataclass(frozen=True)
class Worked:
    """How solutions of one task of `pear.tasks` are made. A "problem" here is whatever `example` can choose from."""

    styles: tuple[str, ...]
    make_tokenizer: Callable[[], PreTrainedTokenizerBase]  # for models made from nothing
    problems: Callable[[dict[str, Any], int], Sequence[Any]]  # (configuration of the task, seed) -> of its train split
    example: Callable[[Random, Sequence[Any], str], tuple[str, str]]  # (rng, problems, style) -> prompt, solution
    of: Callable[[Problem], Any]  # such a problem from one of `load_task`'s


def _countdown_problems(config: dict[str, Any], seed: int) -> Sequence[Any]:
    if config:
        raise ValueError(f"task_config: worked solutions of countdown are for its own configuration, got {config}")
    return countdown.train_problems()


def _chain_sum_problems(config: dict[str, Any], seed: int) -> Sequence[Any]:
    terms = {"min_terms": 2, "max_terms": config.get("max_terms", 8)}  # short sums first show how it goes
    if config.get("min_digits", 1) != config.get("max_digits", 1):
        raise ValueError("task_config: worked sums are of terms with one number of digits: min_digits = max_digits")
    size = {2: 100, 3: 2000}.get(terms["max_terms"], 20000)  # there are not many different short sums of one digit
    return arithmetic.train_problems(digits=config.get("max_digits", 1), seed=seed, size=size, **terms)


WORKED = {
    "countdown": Worked(
        countdown.STYLES,
        countdown.make_tokenizer,
        _countdown_problems,
        countdown.worked_example,
        lambda problem: (tuple(problem.entry["metadata"]["numbers"]), problem.entry["metadata"]["target"]),
    ),
    "chain_sum": Worked(
        arithmetic.STYLES,
        arithmetic.make_tokenizer,
        _chain_sum_problems,
        arithmetic.worked_example,
        lambda problem: problem.entry["metadata"]["expression"],
    ),
}
