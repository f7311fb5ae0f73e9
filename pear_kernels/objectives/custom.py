"""An objective of the caller: `linear_objective_loss`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar

from pear_kernels.engine.objective import Objective
from pear_kernels.engine.packing import Pack
from pear_kernels.objectives.base import Problem, set_to


class ObjectiveCall:
    """One call of `linear_objective_loss`: the caller's function, and the objective that it returned."""

    def __init__(self, function: Callable[[Pack], Objective]):
        self.function = function
        self.made: Objective | None = None


_call: ContextVar[ObjectiveCall] = ContextVar("call")  # the call that runs


def objective_by(function: Callable[[Pack], Objective]) -> AbstractContextManager[None]:
    """Within it, a call of the op takes its objective from `function`."""
    return set_to(_call, ObjectiveCall(function))


def custom_objective(problem: Problem) -> Objective:
    """What the caller's function returns, checked."""
    call = _call.get()
    made = call.made = call.function(problem.pack)
    if not isinstance(made, Objective):
        raise TypeError(
            "objective must be a function from a Pack to a pear_kernels.Objective (such as a subclass of it), "
            f"got {type(made).__name__} from it"
        )
    return made


def custom_stats(given: Sequence[str]) -> tuple[str, ...]:
    """The statistics that the caller's objective names."""
    made = _call.get().made
    if made is None:  # the op did not run: its shapes alone were asked for
        raise RuntimeError(
            'linear_objective_loss does not work on tensors without values (device "meta", FakeTensorMode): the '
            "objective is made of the tokens that count"
        )
    return made.stats
