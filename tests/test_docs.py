"""Every code block of the pages is run or, where it says why not, checked; `pytest tests/test_docs.py -s` lists them.

A page's blocks run in order, in one namespace and one empty folder, with what its hidden set-up puts there
(`<!-- run: setup`). CONTRIBUTING.md says what each language means.
"""

import ast
import contextlib
import doctest
import io
import json
import runpy
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
import yaml
from doc_blocks import Block, blocks_of
from doc_commands import CHECKS, Wrong, check, commands_of, run
from markdown_it import MarkdownIt

import pear_kernels
from pear_kernels import pear_weights
from pear_kernels.reference import naive_weights

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
RUN, CHECKED, SHOWN = "run", "checked, not run", "shown"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where a page's blocks run: an empty folder, with the helpers of the hidden set-up at hand."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "pear"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks(page, folder):
    namespace: dict = {"__name__": "__docs__"}
    for block in blocks_of(page):
        try:
            how = handle(block, namespace)
        except Exception as error:
            raise AssertionError(f"{name(page)}:{block.line}: {type(error).__name__}: {error}") from error
        print(f"{name(page)}:{block.line} {block.language}: {how}" + (f" ({block.not_run})" if block.not_run else ""))
        assert how in (RUN, CHECKED, SHOWN)


def handle(block: Block, namespace: dict) -> str:
    """Runs or checks a block, and says which of the two.

    Raises:
        ValueError: no language, one that nobody checks, or a comment that does not go with it.
        Exception: whatever the block itself raises.
    """
    if block.language not in HANDLERS:
        raise ValueError(f"a block of {block.language!r}: give it a fence with one of {', '.join(HANDLERS)}")
    if block.not_run and block.language not in ("python", "bash"):
        raise ValueError(f"a block of {block.language} is never run: leave out 'checked, not run'")
    return HANDLERS[block.language](block, namespace)


def handle_python(block: Block, namespace: dict) -> str:
    if block.not_run is None:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile("\n" * (block.line - 1) + block.code, str(block.page), "exec"), namespace)
        return RUN
    for statement in ast.parse(block.code).body:  # what it imports of ours must be there
        imported = [n.name for n in statement.names] if isinstance(statement, ast.Import) else []
        imported += [statement.module] if isinstance(statement, ast.ImportFrom) else []
        if any(module.partition(".")[0] in ("pear", "pear_kernels") for module in imported):
            exec(compile(ast.Module([statement], []), str(block.page), "exec"), namespace)
    return CHECKED


def handle_session(block: Block, namespace: dict) -> str:
    """`>>>` and what is printed, where a line of `...` stands for anything."""
    examples = doctest.DocTestParser().get_examples(block.code.replace("\n\n", "\n<BLANKLINE>\n"))
    if not examples:
        raise ValueError("no line begins with >>>")
    for example in examples:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec(compile(example.source, str(block.page), "single"), namespace)
        if not doctest.OutputChecker().check_output(example.want, told.getvalue(), doctest.ELLIPSIS):
            raise AssertionError(f"{example.source} printed\n{told.getvalue()}")
    return RUN


def handle_commands(block: Block, namespace: dict) -> str:
    commands = list(commands_of(block.code))
    if not commands:
        raise ValueError("no command in it")
    for words in commands:
        (run if block.not_run is None else check)(words)
    return RUN if block.not_run is None else CHECKED


def handle_text(block: Block, namespace: dict) -> str:
    """Output and sketches; nothing that a reader would type."""
    for line in block.code.splitlines():
        if line.split(" ")[0] in (*CHECKS, ">>>", "$"):
            raise ValueError(f"a command in a block of text: {line}")
    return SHOWN


def handle_json(block: Block, namespace: dict) -> str:
    for line in block.code.splitlines():
        json.loads(line)
    return CHECKED


def handle_yaml(block: Block, namespace: dict) -> str:
    assert yaml.safe_load(block.code)
    return CHECKED


HANDLERS = {
    "setup": handle_python,
    "python": handle_python,
    "pycon": handle_session,
    "bash": handle_commands,
    "json": handle_json,
    "yaml": handle_yaml,
    "text": handle_text,
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_to_the_outside_are_addresses(page):
    """No network here: that they are well formed is all. Links within are checked where the site is built."""
    for token in MarkdownIt("commonmark").parse(page.read_text()):
        for child in token.children or []:
            target = child.attrGet("href") or child.attrGet("src") or ""
            parts = urlsplit(target)
            if parts.scheme:
                assert parts.scheme == "https" and "." in parts.netloc and " " not in target, f"{name(page)}: {target}"
            else:
                assert not target.startswith("/"), f"{name(page)}: {target} is a path of one machine"


def test_every_public_name_has_its_place():
    page = (ROOT / "docs" / "api" / "pear_kernels.md").read_text()
    named = [line.removeprefix("::: ") for line in page.splitlines() if line.startswith("::: ")]
    options = {cls.__name__ for cls in pear_kernels.options.CLASSES.values()} - {"TeacherOptions", "CallOptions"}
    expected = sorted(pear_kernels.__all__) + sorted(options)
    assert sorted(name.rpartition(".")[2] for name in named) == sorted(expected)


def test_the_pictures_are_of_what_the_definition_says(tmp_path):
    """docs/pictures: the numbers behind them agree with the naive weights, and the script still draws."""
    pictures = runpy.run_path(str(ROOT / "docs" / "_site" / "pictures.py"))
    scored = {
        steps: torch.tensor(found, dtype=torch.float64) for steps, found in pictures["read"]()["logprobs"].items()
    }
    behavior = scored[pictures["WRITER"]]
    for steps in pictures["STUDENTS"]:
        for level, block in (("token", 1), ("block", 16), ("sequence", 16)):
            found = pear_weights(scored[steps], behavior, level=level, block_size=block)
            torch.testing.assert_close(found, naive_weights(scored[steps], behavior, level, block), check_dtype=False)
    pictures["main"](tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


# ---- the checks themselves


def test_what_leads_nowhere_on_the_site_is_told(tmp_path):
    problems = runpy.run_path(str(ROOT / "docs" / "_site" / "check.py"))["problems"]
    assert problems(tmp_path)  # no page at all
    (tmp_path / "other.html").write_text('<p id="here">text</p><img src="picture.png">')
    (tmp_path / "picture.png").touch()
    (tmp_path / "index.html").write_text('<a href="other.html#here"></a><a href="https://example.org/">far</a>')
    assert problems(tmp_path) == []
    for broken in ("other.html#there", "no.html", "#nothing"):
        (tmp_path / "index.html").write_text(f'<a href="{broken}"></a>')
        assert len(problems(tmp_path)) == 1
    (tmp_path / "index.html").write_text('<script src="https://example.org/far.js"></script>')
    assert problems(tmp_path) == ["index.html loads https://example.org/far.js"]


@pytest.mark.parametrize(
    "command",
    [
        "pear score --modle teacher/ --data a --out b",
        "pear sft --no_such_flag 1",
        "pear rl --learning_rate fast",
        "pear train --model a",
        "python -m bench --no-such-flag",
        "python -m bench.nothing",
        "python examples/no_such_example.py",
        "accelerate launch --no_such_flag -m pear score --data a --out b",
        "accelerate launch -m pear score --no-such-flag",
        "torchrun --nproc_per_node 2 -m pear score --no-such-flag",
        "make no-such-target",
        "make test NO_SUCH_VARIABLE=1",
        "pip install -e '.[no-such-extra]'",
        "pip install -c no-such-file/constraints.txt no-such-package",
        "pip install --no-such-flag .",
        "pip install trans",
        "pytest -m no_such_marker",
        "pytest --no-such-flag",
        "pear sft --weightin dft",
        "pear replicate --config experiments/no_such_study.yaml",
        "rm -r everything",
    ],
)
def test_what_does_not_exist_is_told(command):
    for words in commands_of(command):
        with pytest.raises(Wrong):
            check(words)


def test_blocks_that_nobody_checks_are_told(tmp_path):
    page = tmp_path / "page.md"
    for text in ("```\nsome code\n```", "    some code\n", "```rust\nfn main() {}\n```"):
        page.write_text(text)
        with pytest.raises(ValueError, match="give it a fence"):
            handle(blocks_of(page)[0], {})
    for text in ("```pycon\n1 + 1\n```", "```bash\n# pear score\n```", "```text\npear score\n```"):
        page.write_text(text)
        with pytest.raises(ValueError, match="no line begins|no command|a command in"):
            handle(blocks_of(page)[0], {})
    for text in ("<details>\n```python\n1 / 0\n```\n</details>\n", "!!! note\n    ```python\n    1 / 0\n    ```\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="makes no block"):
            blocks_of(page)
    for text in ("<!-- checked, not run: a reason -->\n\nno block\n", "<!-- checked: a reason -->\n"):
        page.write_text(text)
        with pytest.raises(ValueError, match="stands over no block|not understood"):
            blocks_of(page)


def test_a_block_that_fails_is_told(tmp_path):
    page = tmp_path / "page.md"
    for text in ("```python\nassert 1 == 2\n```", "```pycon\n>>> 1 + 1\n3\n```", "```bash\npear score\n```"):
        page.write_text(text)
        with pytest.raises((AssertionError, Wrong)):
            handle(blocks_of(page)[0], {})
    assert "__docs__" not in sys.modules
