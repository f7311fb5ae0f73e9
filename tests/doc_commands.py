"""Commands as they stand in the pages: taken apart, held against the options that there really are, or run."""

import argparse
import contextlib
import importlib
import io
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import typer
from typer.testing import CliRunner

from pear.cli import app

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MODULES = ("pear", "pear_kernels", "bench", "experiments")
ASSIGNED = re.compile(r"[A-Z_]+=.*")


class Wrong(Exception):
    """A command that does not exist, or not with these options."""


def commands_of(code: str) -> Iterator[list[str]]:
    """Each line's words; lines that end in a backslash are joined, and comments left out."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run(words: list[str]) -> str:
    """What a command of ours prints, in the folder one is in.

    Raises:
        Wrong: it is no `pear ...`, which alone is run here (mark the block), or it fails.
    """
    if words[0] == "pip":
        check(words)  # the environment of the tests is what it would make
        return ""
    if words[0] != "pear":
        raise Wrong(f"{words[0]}: only `pear` is run; mark the block as checked, not run, with the reason")
    done = CliRunner().invoke(app, without_dots(words[1:]))
    if done.exit_code:
        raise Wrong(f"{shlex.join(words)}: exit status {done.exit_code}\n{done.output}\n{done.exception!r}")
    return done.output


def check(words: list[str]) -> None:
    """Raises Wrong unless the program is known and has the options."""
    while words and ASSIGNED.fullmatch(words[0]):
        words = words[1:]
    if words[0] not in CHECKS:
        raise Wrong(f"{words[0]}: nobody checks this program; see tests/doc_commands.py")
    CHECKS[words[0]](without_dots(words[1:]))


def without_dots(words: list[str]) -> list[str]:
    """`...` at the end stands for further options."""
    return words[:-1] if words[-1:] == ["..."] else words


# ---- one check a program


def check_pear(words: list[str]) -> None:
    known = typer.main.get_command(app).commands
    if words[0] not in known:
        raise Wrong(f"pear {words[0]}: no such command")
    if words[0] in ("sft", "rl"):
        check_parser(options_of(words[0]), words[1:])
        return
    try:
        known[words[0]].make_context(words[0], list(words[1:]))
    except Exception as error:  # click's, or that of the click inside newer typers
        raise Wrong(f"pear {shlex.join(words)}: {error}") from None
    check_files(words)


def options_of(trainer: str) -> argparse.ArgumentParser:
    """The parser of `pear sft` or `pear rl`, from the dataclasses that its command reads."""
    from pear.options import Parser

    module = importlib.import_module(f"pear.{trainer}")

    class Asked(Exception):
        pass

    def parse(kinds, command, argv):
        raise Asked(kinds)

    with mock.patch.object(module, "parse", parse), pytest.raises(Asked) as asked:
        module.main([])
    return Parser(asked.value.args[0], trainer)


def check_parser(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """By argparse alone: no dataclass is made, which might ask for a GPU."""
    told = io.StringIO()
    parser.allow_abbrev = False  # it would work, but a page writes an option out
    try:
        with contextlib.redirect_stderr(told):
            _, unknown = argparse.ArgumentParser.parse_known_args(parser, words)
    except (SystemExit, ValueError) as error:
        raise Wrong(told.getvalue() or error) from None
    if unknown:
        raise Wrong(f"unknown options: {unknown}")


def check_python(words: list[str]) -> None:
    """`python -m MODULE options` or `python FILE`: the file is ours, and each option stands in it."""
    if words[0] == "-m":
        words = words[1:]
        if words[0] == "pear":
            return check_pear(words[1:])
        path = ROOT / words[0].replace(".", "/")
        source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        if words[0].partition(".")[0] not in MODULES:
            raise Wrong(f"python -m {words[0]}: no module of ours")
    else:
        source = ROOT / words[0]
    if not source.is_file():
        raise Wrong(f"python {shlex.join(words)}: no {source.relative_to(ROOT)}")
    for option in (word.partition("=")[0] for word in words[1:] if re.match("--?[a-zA-Z]", word)):
        if f'"{option}"' not in source.read_text():
            raise Wrong(f"python {shlex.join(words)}: {source.relative_to(ROOT)} has no {option}")
    check_files(words[1:])


def check_launcher(make: Callable[[], argparse.ArgumentParser]) -> Callable[[list[str]], None]:
    def check_launched(words: list[str]) -> None:
        """The launcher's own options before the program, which is `-m pear` or a file of ours."""
        parser = make()
        try:
            with contextlib.redirect_stderr(told := io.StringIO()):
                found = parser.parse_args(words)
        except SystemExit:
            raise Wrong(told.getvalue()) from None
        check_python(["-m"] * found.module + [found.training_script, *found.training_script_args])

    return check_launched


def accelerate_parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def torchrun_parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    return get_args_parser()


def check_accelerate(words: list[str]) -> None:
    if words[0] != "launch":
        raise Wrong(f"accelerate {words[0]}: only launch is known here")
    check_launcher(accelerate_parser)(words[1:])


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        variable, assigned, _ = word.partition("=")
        if not re.search(rf"\$\({variable}\)|^{variable} " if assigned else rf"^{word}:", makefile, re.M):
            raise Wrong(f"make: the Makefile has no {variable}")


def check_pip(words: list[str]) -> None:
    """`pip install`: files exist, extras are the project's, other packages are in its constraints or extras."""
    if words[0] != "install":
        raise Wrong(f"pip {words[0]}: only install is known here")
    check_known(words, {"-c", "--constraint", "-e", "--no-deps"})
    known = str(PROJECT["project"]) + (ROOT / "constraints.txt").read_text() + (ROOT / "Makefile").read_text()
    for before, word in zip(words, words[1:], strict=False):
        name, _, extras = word.partition("[")
        if before in ("-c", "--constraint"):
            check_files([word])
        elif name in (".", "pear-kernels"):
            named = set(filter(None, extras.rstrip("]").split(",")))
            if unknown := named - PROJECT["project"]["optional-dependencies"].keys():
                raise Wrong(f"pip: the project has no extra {sorted(unknown)}")
        elif not word.startswith("-") and not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", known):
            raise Wrong(f"pip: nothing else here knows of {word}")


def check_known(words: list[str], options: set[str]) -> None:
    """Of a program that is not ours only these are known here: look them up in its help before adding one."""
    if unknown := [word for word in words if word.startswith("-") and word not in options]:
        raise Wrong(f"nobody checks {unknown}; see tests/doc_commands.py")


def check_pytest(words: list[str]) -> None:
    check_known(words, {"-m", "-k", "-n", "-q", "-s", "-x"})
    markers = [marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and word.removeprefix("not ") not in markers:
            raise Wrong(f"pytest: no marker {word}")
    check_files(words)


def check_files(words: list[str]) -> None:
    """Paths that begin in a folder of the repository exist."""
    folders = {"docs", "examples", "experiments", "tests", "constraints.txt"}
    for word in words:
        if Path(word).parts[:1] and Path(word).parts[0] in folders and not (ROOT / word.partition("::")[0]).exists():
            raise Wrong(f"no such file: {word}")


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "pear": check_pear,
    "python": check_python,
    "accelerate": check_accelerate,
    "torchrun": check_launcher(torchrun_parser),
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
}
