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
        self._made: Objective | None = None

    def objective(self, pack: Pack) -> Objective:
        """The call's one objective."""
        if self._made is None:
            made = self.function(pack)
            if not isinstance(made, Objective):
                raise TypeError(
                    "objective must be a function from a Pack to a pear_kernels.Objective (such as a subclass of it), "
                    f"got {type(made).__name__} from it"
                )
            self._made = made
        return self._made

    @property
    def made(self) -> Objective:
        if self._made is None:  # the op did not run: its shapes alone were asked for
            raise RuntimeError(
                'linear_objective_loss does not work on tensors without values (device "meta", FakeTensorMode): the '
                "objective is made of the tokens that count"
            )
        return self._made


_call: ContextVar[ObjectiveCall] = ContextVar("call")  # the call that runs


def objective_by(function: Callable[[Pack], Objective]) -> AbstractContextManager[None]:
    """Within it, a call of the op takes its objective from `function`."""
    return set_to(_call, ObjectiveCall(function))


class CustomLoss(Loss):
    """`linear_objective_loss`."""

    def stats(self, given: Sequence[str]) -> tuple[str, ...]:
        return _call.get().made.stats

    def objective(self, problem: Problem, on_logits: bool) -> Objective:
        return _call.get().objective(problem.pack)

    def needs_entropy(self, options: dict[type[Options], Any]) -> bool:
        return _call.get().made.needs_entropy

    def needs_logits(self, problem: Problem, wanted: Wanted) -> bool:
        return _call.get().objective(problem.pack).on_logits and any(wanted)
