"""Verifiable problems from reasoning-gym: drawing them, wording them, splitting them, and judging an answer."""

import hashlib
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

CORRECT = 0.99  # reasoning-gym pays 0.01 to 0.05 for a wrong answer, so a reward counts only from here
TEST_SHARE = 5  # one problem in five belongs to the test split
SPLITS = ("train", "test")
FORMATS = ("question", "compact")
MAX_ANSWER_CHARS = 200


@dataclass(frozen=True)
class Task:
    """How one reasoning-gym dataset is used here."""

    dataset: str  # its name in reasoning-gym
    config: dict[str, Any]  # our difficulty; `load_task(**config)` overrides it
    compact: Callable[[dict], str]  # item -> a prompt of a few tokens, for models trained from nothing
    identity: Callable[[dict], str]  # item -> what makes two items the same problem, whatever their wording
    answer: re.Pattern  # group 1 is what the scorer may see; no match is a wrong answer


@dataclass(frozen=True)
class Problem:
    """One problem. `entry` is reasoning-gym's item, as its scorer wants it."""

    task: str
    question: str
    compact: str
    identity: str
    entry: dict[str, Any] = field(repr=False, hash=False, compare=False)

    def prompt(self, style: str = "question") -> str:
        """The problem as "question" (reasoning-gym's words) or "compact" (few tokens, for small models)."""
        if style not in FORMATS:
            raise ValueError(f"prompt format must be one of {', '.join(FORMATS)}, got {style!r}")
        return self.question if style == "question" else self.compact


def countdown_prompt(numbers: Sequence[int], target: int) -> str:
    return f"{' '.join(map(str, numbers))} = {target} :"


def countdown_identity(numbers: Sequence[int], target: int) -> str:
    # The order of the numbers is wording: 3 7 2 = 42 in train must keep 2 3 7 = 42 out of test.
    return f"{sorted(numbers)} = {target}"


def _expression_compact(item: dict) -> str:
    return f"{item['metadata']['expression']} ="


def _expression_identity(item: dict) -> str:
    return item["metadata"]["expression"].replace(" ", "")


_NUMBER = re.compile(r"(?:.*=)?\s*([+-]?[\d,]*\.?\d+)")  # "12 + 7 = 19" answers 19
# Countdown's scorer runs sympy's parse_expr, which is Python's eval: only digits, + - * / and brackets may reach it,
# and no power (9**9**9**9 would never come back).
_ARITHMETIC = re.compile(r"((?:[\d+\-() ]|/(?!/)|\*(?!\*))+)")

# A task belongs here once its scorer has been read: several of reasoning-gym's evaluate whatever they are given.
TASKS = {
    "countdown": Task(
        dataset="countdown",
        config=dict(min_numbers=3, max_numbers=3, min_value=1, max_value=10, min_target=1, max_target=50),
        compact=lambda item: countdown_prompt(item["metadata"]["numbers"], item["metadata"]["target"]),
        identity=lambda item: countdown_identity(item["metadata"]["numbers"], item["metadata"]["target"]),
        answer=_ARITHMETIC,
    ),
    "chain_sum": Task(
        dataset="chain_sum",
        config=dict(min_terms=2, max_terms=4, min_digits=1, max_digits=2),
        compact=_expression_compact,
        identity=_expression_identity,
        answer=_NUMBER,
    ),
    "basic_arithmetic": Task(
        dataset="basic_arithmetic",
        config=dict(min_terms=2, max_terms=4, min_digits=1, max_digits=2),
        compact=_expression_compact,
        identity=_expression_identity,
        answer=_NUMBER,
    ),
}


def get_task(name: str) -> Task:
    """The task of this name; ValueError naming those there are."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def split_of(identity: str) -> str:
    """The split a problem belongs to, for every size and seed: a hash of what the problem is decides.

    So nothing drawn as "test" can have been trained on by anyone who drew "train", whatever the seeds. Two seeds of
    reasoning-gym promise less: its item i uses Random(seed + i), and a small problem space repeats itself anyway.
    """
    digest = hashlib.sha256(identity.encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def load_task(name: str, split: str = "test", size: int = 200, seed: int = 0, **config: Any) -> list[Problem]:
    """Draw `size` different problems of one split.

    Args:
        name: a key of TASKS
        split: "train" or "test"; the two never share a problem (see `split_of`)
        size: number of problems, at least 1
        seed: draws of different seeds come from unrelated streams
        config: overrides of the task's reasoning-gym configuration, e.g. max_numbers=4

    Raises:
        ValueError: unknown task or split, size < 1, seed < 0, or fewer than `size` different problems exist
    """
    import reasoning_gym

    task = get_task(name)
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    draws = 50 * size + 2000
    # reasoning-gym's item i uses Random(seed + i): streams of neighbouring seeds would be the same items moved by one.
    items = reasoning_gym.create_dataset(task.dataset, **{**task.config, **config}, seed=seed * 10**7, size=draws)
    problems: dict[str, Problem] = {}
    for i in range(draws):
        item = items[i]
        identity = task.identity(item)
        if split_of(identity) == split and identity not in problems:
            problems[identity] = Problem(name, item["question"], task.compact(item), identity, item)
            if len(problems) == size:
                return list(problems.values())
    raise ValueError(
        f"size={size}: only {len(problems)} different {split} problems of {name!r} turned up in {draws} draws; "
        "ask for fewer, or widen its configuration (more numbers, larger values)"
    )


_ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.IGNORECASE | re.DOTALL)
_ANSWER_WORD = re.compile(r"\banswer\b(?: is)?[ *]*:?[ *]*([^\n]*)", re.IGNORECASE)


def extract_answer(text: str) -> str:
    """The answer in a completion, "" when there is none.

    The last of, in this order of preference: what stands between <answer> tags; what follows the word "answer" (or
    "answer is", "answer:") on its line; the last line that is not blank. Quotes, backticks, dollar signs and a final
    full stop around it go. Nothing else is repaired: "3*7*2 = 42" stays as it is, which countdown calls wrong.
    """
    if tagged := _ANSWER_TAG.findall(text):
        answer = tagged[-1]
    elif marked := [found for found in _ANSWER_WORD.findall(text) if found.strip()]:
        answer = marked[-1]
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        answer = lines[-1] if lines else ""
    around = " \t\r\n`$\"'"
    return answer.lstrip(around).rstrip(around + ".")


@cache
def _scorer(dataset: str) -> Callable[[str, dict], float]:
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(dataset)


def judge(problem: Problem, answer: str) -> int:
    """1 if reasoning-gym's own scorer accepts this answer, else 0."""
    task = get_task(problem.task)
    found = task.answer.fullmatch(answer)
    if not found or len(found[1]) > MAX_ANSWER_CHARS:
        return 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # Python's remarks on answers such as "(1)(2)"
            score = _scorer(task.dataset)(found[1], problem.entry)
    except (ValueError, ArithmeticError, SyntaxError, RecursionError, MemoryError):
        # what parsers raise on junk; anything else is a bug to see
        return 0
    return int(score >= CORRECT)


def reward(problem: Problem, text: str) -> int:
    """1 if the answer in a completion's text is right (see `extract_answer` and `judge`), else 0."""
    if not isinstance(text, str):
        raise TypeError(f"text must be a completion's text, got {type(text).__name__}")
    return judge(problem, extract_answer(text))


def rewards(problem: Problem, texts: Sequence[str]) -> list[int]:
    """`reward` of several completions; equal answers, of which there are many, are judged once."""
    answers = [extract_answer(text) for text in texts]
    verdicts = {answer: judge(problem, answer) for answer in set(answers)}
    return [verdicts[answer] for answer in answers]
