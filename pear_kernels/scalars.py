"""Numbers among an op's arguments that change from call to call, such as a scheduled beta, under `torch.compile`.

`torch.compile` guards on the value of each float in an op's schema: ten values are ten compilations, until it gives up.
As elements of a tensor they are data.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def with_numbers(function: Callable) -> Callable:
    """The function of an op with two arguments more: numbers that replace some of its arguments, and their places.

    `torch.compile` guards on the value of each float in an op's schema, so one that changes from call to call would
    compile anew each time. `call` sends such numbers as data instead. `places` holds two integers for each of them: the
    position of the argument, and that of the element if the argument is a list, or -1.
    """
    signature = inspect.signature(function)
    more = {"numbers": Tensor | None, "places": list[int]}
    own = [*signature.parameters.values()]

    @functools.wraps(function)
    def filled(*arguments, **named):
        if len(arguments) <= len(own):
            named.pop("numbers", None), named.pop("places", None)
            return function(*arguments, **named)
        *arguments, numbers, places = arguments
        if numbers is not None:
            for number, argument, element in zip(numbers.tolist(), places[::2], places[1::2], strict=True):
                if element < 0:
                    arguments[argument] = number
                else:
                    arguments[argument] = [*arguments[argument]]
                    arguments[argument][element] = number
        return function(*arguments)

    extra = [inspect.Parameter(name, own[0].kind, annotation=kind) for name, kind in more.items()]
    filled.__signature__ = signature.replace(parameters=own + extra)
    filled.floats = frozenset(i for i, parameter in enumerate(own) if parameter.annotation in (float, float | None))
    return filled


def without_numbers(fake: Callable) -> Callable:
    """The shapes of an op do not depend on the arguments that `with_numbers` adds."""
    return lambda *arguments: fake(*arguments[:-2])


def call(op: Callable, *arguments):
    """An op `with_numbers`, whose arguments may be numbers that `torch.compile` traces as symbols.

    Raises:
        RuntimeError: under a transform of torch.func, for an op with a gradient, naming it and what to do.
    """
    if not torch.compiler.is_compiling():
        transforming = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        if transforming and op._backward_fn is not None:  # what has no gradient works
            refuse_transforms(op._name, arguments)
        return op(*arguments, None, [])
    given, numbers, places = [], [], []
    floats = op._init_fn.floats
    for i, argument in enumerate(arguments):
        if i in floats and isinstance(argument, int):
            argument = float(argument)  # an integer that changes is a symbol too, which no float of a schema may be
        if is_symbol(argument):
            numbers.append(argument)
            places += [i, -1]
            argument = 0.0
        elif isinstance(argument, list):
            symbols = [j for j, element in enumerate(argument) if is_symbol(element)]
            for j in symbols:
                numbers.append(argument[j])
                places += [i, j]
            argument = [0.0 if j in symbols else element for j, element in enumerate(argument)]
        given.append(argument)
    as_data = [as_tensor(number, torch.device("cpu")) for number in numbers]
    return op(*given, torch.stack(as_data) if as_data else None, places)


def as_tensor(number: float, device: torch.device) -> Tensor:
    """() float64. Of a number that `torch.compile` traces as a symbol, it is a product: that it can make of a tensor,
    where it makes a constant of the number to fill a tensor with."""
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * number
    return torch.full((), number, dtype=torch.float64, device=device)


def refuse_transforms(name: str, arguments: tuple) -> None:
    """The gradients are made in the forward pass, which such a transform would have to transform too."""

    def transformed(x) -> bool:
        if not isinstance(x, Tensor):
            return False
        return torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None

    if any(map(transformed, arguments)):
        raise RuntimeError(
            f"{name} does not work under the transforms of torch.func (grad, vjp, jvp, vmap, jacrev, ...) and in "
            "forward mode: take gradients by loss.backward() or torch.autograd.grad, and give a batch as (B, T) or "
            "with cu_seqlens"
        )


def is_symbol(value) -> bool:
    """Whether a value is a float that `torch.compile` does not know while it traces."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return isinstance(value, float) and not has_static_value(value)
