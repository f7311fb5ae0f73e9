"""Rewards for RL: TRL's plain functions, made safe against a completion that they cannot judge, and two ready ones."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from trl.trainer.utils import get_callable_name, is_async_callable

from pear.io import DataError
from pear.tasks import CORRECT, Problem, reward

MOST_IN_A_ROW = 10
SHOWN = 400  # characters of a prompt or a completion in a message

Reward = Callable[..., list[float | None]]  # (prompts, completions, **columns) -> one a completion; None: not judged


class Fault(NamedTuple):
    """A completion that a reward function could not judge."""

    reward: str
    row: int  # in the batch that was judged
    prompt: Any
    completion: Any
    why: str

    def __str__(self) -> str:
        return (
            f"reward {self.reward!r} {self.why}. Prompt: {text_of(self.prompt)[:SHOWN]!r}; completion: "
            f"{text_of(self.completion)[:SHOWN]!r}"
        )


class GuardedReward:
    """A reward function whose faults cost a completion its reward and not the run.

    Where it raises, the batch is judged again one completion at a time; a completion on which it raises, or for which
    it returns something that is not a finite number, scores 0 and is kept in `faults`. (None stays None: TRL's word for
    "not judged by this function".) Ten such completions in a row end the run: then it is not the completion.
    """

    def __init__(self, function: Reward):
        self.function = function
        self.__name__ = get_callable_name(function)
        self.faults: list[Fault] = []
        self._in_a_row = 0

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float | None]:
        """One reward a completion.

        Raises:
            DataError: ten completions in a row could not be judged, or the number of rewards is wrong.
        """
        try:
            found = self.function(prompts=prompts, completions=completions, **columns)
            is_list = isinstance(found, Iterable) and getattr(found, "ndim", 1) > 0
            values = list(found) if is_list else []
        except Exception:  # of whatever kind: it is the user's code
            values, is_list = [self._one(i, prompts, completions, columns) for i in range(len(prompts))], True
        if not is_list:
            raise DataError(
                f"reward {self.__name__!r} returned {_short(found)}; it must return a list: one reward of each "
                "completion"
            )
        if len(values) != len(prompts):
            raise DataError(
                f"reward {self.__name__!r} returned {len(values)} rewards for {len(prompts)} completions; it must "
                "return one of each (None for those that it does not judge)"
            )
        return [self._checked(i, value, prompts, completions) for i, value in enumerate(values)]

    def take_faults(self) -> list[Fault]:
        """Those since the last call."""
        taken, self.faults = self.faults, []
        return taken

    def _one(self, i: int, prompts: list, completions: list, columns: dict[str, Any]) -> Any:
        row = {
            name: [values[i]] if isinstance(values, (list, tuple)) and len(values) == len(prompts) else values
            for name, values in columns.items()
        }
        try:
            (value,) = self.function(prompts=[prompts[i]], completions=[completions[i]], **row)
        except Exception as error:
            return error
        return value

    def _checked(self, i: int, value: Any, prompts: list, completions: list) -> float | None:
        if value is None:
            return None
        if isinstance(value, Exception):
            why = f"raised {type(value).__name__}: {_one_line(str(value))}"
        else:
            try:
                number = float(value)
            except Exception:  # of whatever kind: it is the user's object
                number = math.nan
            if math.isfinite(number):
                self._in_a_row = 0
                return number
            why = f"returned {_short(value)}, which is no finite number"
        fault = Fault(self.__name__, i, prompts[i], completions[i], why)
        self.faults.append(fault)
        self._in_a_row += 1
        if self._in_a_row >= MOST_IN_A_ROW:
            cause = value if isinstance(value, Exception) else None
            raise DataError(f"{MOST_IN_A_ROW} completions in a row could not be judged. The last: {fault}") from cause
        return 0.0


def _short(value: Any) -> str:
    return _one_line(repr(value))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def guarded(function: Any) -> Any:
    """`GuardedReward` around a plain function. Reward models and async functions, which TRL runs itself, stay as they
    are."""
    is_plain = callable(function) and not hasattr(function, "forward") and not is_async_callable(function)
    return GuardedReward(function) if is_plain and not isinstance(function, GuardedReward) else function


def text_of(content: str | Sequence[dict[str, Any]]) -> str:
    """A prompt or completion as text: itself, or what its messages say."""
    return content if isinstance(content, str) else "\n".join(str(message.get("content")) for message in content)


# ---- ready ones


class TaskReward:
    """1 where reasoning-gym's scorer accepts the answer, else 0; rows name their problem by its index."""

    __name__ = "task"

    def __init__(self, problems: list[Problem]):
        self.problems = problems

    def __call__(self, prompts: list, completions: list, problem: list[int], **_: Any) -> list[float]:
        pairs = zip(problem, completions, strict=True)
        return [float(reward(self.problems[index], text_of(completion))) for index, completion in pairs]


def math_reward(prompts: list, completions: list, solution: list[str], **_: Any) -> list[float | None]:
    """1 where math-verify finds the answer equal to the row's `solution`, else 0; None where that cannot be read."""
    from trl.rewards import accuracy_reward

    return accuracy_reward([[{"role": "assistant", "content": text_of(c)}] for c in completions], solution)


def is_right(total: float) -> bool:
    """Whether a completion's reward counts as a right answer (reasoning-gym pays a little for a wrong one)."""
    return total >= CORRECT
