"""One spelling of options for every command, and one line for a command line that is wrong.

Options are written with underscores; dashes are accepted. A switch works alone and with a value: --bf16, --bf16 true,
--no_bf16. An unknown option names the nearest one.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from pear.interruption import ends_in_words

TRUE = ("true", "yes", "on", "1")
FALSE = ("false", "no", "off", "0")


def spelled(name: str) -> str:
    """`--some-option` as `--some_option`."""
    return "--" + name.removeprefix("--").replace("-", "_")


def unknown_option(name: str, known: Iterable[str]) -> str:
    """A message about an option that a command does not have."""
    written = spelled(name) if name.startswith("--") else name
    nearest = difflib.get_close_matches(written, sorted(set(known)), n=1, cutoff=0.5)
    return f"no such option: {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; --help lists the options")


def with_underscores(arguments: Sequence[str]) -> list[str]:
    """The arguments, options spelled with underscores; values and what follows a bare `--` stay as they are."""
    found: list[str] = []
    for i, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[i:]]
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = spelled(name) + equals + value
        found.append(argument)
    return found


class OneLineErrors:
    """A mix-in of typer's commands and groups: a usage error is one line on stderr, with exit status 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_one_line(super().make_context, *args, **kwargs)

    def invoke(self, *args: Any, **kwargs: Any) -> Any:
        return self._in_one_line(super().invoke, *args, **kwargs)

    def _in_one_line(self, call: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except typer.BadParameter.__base__ as error:  # UsageError, which typer does not export
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            command = f"pear {self.name or ''}".strip()
            said = " ".join(error.format_message().split())
            if type(error).__name__ == "NoSuchOption":
                known = {spelled(name) for option in self.params for name in (*option.opts, *option.secondary_opts)}
                said = unknown_option(error.option_name, known)
            from pear.cli import _fail

            stop = _fail(f"{command}: {said}")
            stop.exit_code = 2
            raise stop from None


class PearGroup(OneLineErrors, TyperGroup):
    pass


class PearCommand(OneLineErrors, TyperCommand):
    def __init__(self, *args: Any, params: list | None = None, **kwargs: Any) -> None:
        super().__init__(*args, params=params, **kwargs)
        for option in self.params:
            if isinstance(option, TyperOption):
                option.opts = with_underscores(option.opts)
                option.secondary_opts = with_underscores(option.secondary_opts)

    def invoke(self, ctx: Any) -> Any:
        with ends_in_words(self.name or "", ctx.meta["pear.arguments"]):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["pear.arguments"] = list(args)
        if not ctx.ignore_unknown_options:  # those of sft and rl are read by pear.options
            args = self._without_switch_values(with_underscores(args))
        return super().parse_args(ctx, args)

    def _without_switch_values(self, arguments: list[str]) -> list[str]:
        """`--switch true` as `--switch`, `--switch false` as `--no_switch`, or as nothing where that is the default."""
        switches = {name: option for option in self.params if getattr(option, "is_flag", False) for name in option.opts}
        found: list[str] = []
        left = list(arguments)
        while left:
            argument = left.pop(0)
            name, equals, value = argument.partition("=")
            if argument == "--":
                return [*found, argument, *left]
            if name in switches and not equals and left and left[0].lower() in TRUE + FALSE:
                value = left.pop(0)
            if name not in switches or value and value.lower() not in TRUE + FALSE:
                found.append(argument)  # typer says that a switch takes no such value
            elif value.lower() in FALSE:
                found += switches[name].secondary_opts[:1]
            else:
                found.append(name)
        return found
