"""An objective of the caller: `linear_objective_loss`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any

from pear_kernels.engine.objective import Objective
from pear_kernels.engine.packing import Pack
from pear_kernels.engine.schedule import Wanted
from pear_kernels.objectives.base import Loss, Problem, set_to
from pear_kernels.options import Options


class ObjectiveCall:
    """One call of `linear_objective_loss`: the caller's function, and the objective that it returned."""

    def __init__(self, function: Callable[[Pack], Objective]):
        self.function = function
        self.objective: Objective | None = None

    def make(self, pack: Pack) -> Objective:
        """The objective, made once per call.

        Raises:
            TypeError: if the function does not return one.
        """
        if self.objective is None:
            self.objective = self.function(pack)
            if not isinstance(self.objective, Objective):
                raise TypeError(
                    "objective must be a function from a Pack to a pear_kernels.Objective (such as a subclass of it), "
                    f"got {type(self.objective).__name__} from it"
                )
        return self.objective

    @property
    def made(self) -> Objective:
        assert self.objective is not None, "`make` comes first"
        return self.objective


_call: ContextVar[ObjectiveCall] = ContextVar("call")  # the call that runs


def objective_by(function: Callable[[Pack], Objective]) -> AbstractContextManager[None]:
    """Within it, a call of the op takes its objective from `function`."""
    return set_to(_call, ObjectiveCall(function))


class CustomLoss(Loss):
    """`linear_objective_loss`."""

    def stats(self, given: Sequence[str]) -> tuple[str, ...]:
        return _call.get().made.stats

    def objective(self, problem: Problem, on_logits: bool) -> Objective:
        return _call.get().make(problem.pack)

    def needs_entropy(self, options: dict[type[Options], Any]) -> bool:
        return _call.get().made.needs_entropy

    def needs_logits(self, problem: Problem, wanted: Wanted) -> bool:
        return _call.get().make(problem.pack).on_logits and any(wanted)
