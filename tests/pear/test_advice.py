"""What one command prints as advice, every command takes: options in messages are real ones, spelled as in --help."""

import ast
import functools
import re
import shlex
from pathlib import Path

import numpy as np
import typer
from doc_commands import check, options_of
from inspected import advice, make_data, policy_logprobs, shifted

from pear.cli import app
from pear.outcome import outcome
from pear.runs import write_run
from pear_kernels.options import PEAROptions

ROOT = Path(__file__).resolve().parents[2] / "pear"
FLAG = re.compile(r"(?<![\w-])--([a-z][\w-]*)")
COMMAND = re.compile(r"\bpear ([a-z]+)((?: +(?!(?:and|or|to|for|in)\b)[^\s`\"',;:]+)*)")
OTHERS = {  # of other programs
    "models.py": {"no-deps"},  # pip
    "replicate/__init__.py": {"porcelain", "short"},  # git
    "save.py": {"exclude"},  # hf
    "scoring/processes.py": {"multi_gpu", "num_processes"},  # accelerate
}
NO_TEXT = {"cli.py", "command_line.py", "inspecting/style.py", "options.py"}  # declarations, and CSS
WHOSE = {  # by where a message is written: the commands that it speaks of
    "inspecting/": ("inspect", "sft", "score"),
    "importing/": ("import", "score"),
    "scoring/": ("score",),
    "rl": ("rl",),
    "sft": ("sft", "score"),
    "health.py": ("sft", "score"),
    "planning.py": ("plan", "sft"),
    "replicate/": ("replicate",),
    "compare.py": ("compare",),
}


@functools.cache
def options(command: str) -> frozenset[str]:
    if command in ("sft", "rl"):
        return frozenset(name.removeprefix("--") for name in options_of(command)._option_string_actions)
    params = typer.main.get_command(app).commands[command].params
    return frozenset(name.removeprefix("--") for param in params for name in (*param.opts, *param.secondary_opts))


COMMANDS = sorted(typer.main.get_command(app).commands)


def texts(path: Path) -> list[str]:
    """The string literals of a module, docstrings left out; what an f-string fills in stands as X."""
    tree = ast.parse(path.read_text())
    inner, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            inner.add(id(node.value))
        if isinstance(node, ast.JoinedStr):
            inner.update(map(id, ast.walk(node)))
            found.append("".join(p.value if isinstance(p, ast.Constant) else "X" for p in node.values))
    found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in inner]
    return [text for text in found if isinstance(text, str)]


def modules():
    return [path for path in sorted(ROOT.rglob("*.py")) if str(path.relative_to(ROOT)) not in NO_TEXT]


def test_options_in_messages_are_real():
    for path in modules():
        check_messages(path)


def check_messages(path):
    name = str(path.relative_to(ROOT))
    whose = next((found for start, found in WHOSE.items() if name.startswith(start)), COMMANDS)
    known = set().union(*(options(command) for command in whose)) | OTHERS.get(name, set())
    for text in texts(path):
        without_commands = text
        for found in COMMAND.finditer(text):
            command, words = found[1], found[2]
            if command in COMMANDS:
                unknown = set(FLAG.findall(words)) - options(command)
                assert not unknown, f"{name}: pear {command} has no {sorted(unknown)}: {text!r}"
                without_commands = without_commands.replace(found[0], "")
        unknown = set(FLAG.findall(without_commands)) - known
        assert not unknown, f"{name}: {'/'.join(whose)} have no {sorted(unknown)}: {text!r}"


def advised() -> set[str]:
    """Flags that `pear inspect` offers, over data of many kinds."""
    found = set()
    for mean, length, options in (
        (-0.5, 12, PEAROptions()),
        (-0.3, 400, PEAROptions()),
        (-0.3, 400, PEAROptions(level="sequence")),
        (0.01, 3200, PEAROptions()),
        (0.01, 3200, PEAROptions(level="block")),
    ):
        rng = np.random.default_rng(0)
        behavior = [b - 0.5 for b in policy_logprobs(rng, 6, length)]
        given = advice(make_data(behavior), shifted(behavior, rng, mean, 0.001), options)
        found |= {option.flags for finding in given.values() for option in finding.options}
    return found


def test_what_inspect_advises_both_commands_take():
    flags = advised()
    names = {name for each in flags for name in FLAG.findall(each)}
    assert {"center", "clip_length", "log_ratio_clip", "gamma", "normalize"} <= names
    for each in flags:
        check(["pear", "inspect", "--data", "d.jsonl", "--model", "m", *shlex.split(each)])
        check(["pear", "sft", "--data", "d.jsonl", "--model", "m", *shlex.split(each)])


def test_what_comes_next_is_a_command(tmp_path):
    for kind, command in (("sft", "pear rl"), ("rl", "pear eval")):
        folder = tmp_path / f"a {kind} run"
        write_run(folder, kind, [{"step": 1, "pear/nll": 2.0, "reward": 0.1}, {"step": 9, "pear/nll": 1.0}], {})
        *_, line = outcome(folder, kind)
        assert line.startswith(f"next: {command} --model {shlex.quote(str(folder))} ")
        check(shlex.split(line.removeprefix("next: ")))
