"""What a reader of the pages has and a test makes: small models in folders, traces, scored rows.

For the hidden set-up of docs/*.md (`<!-- run: setup`), which runs in the page's own empty folder.
"""

import json
from pathlib import Path

from mixed_rows import other_tokenizer
from tiny import make_model, make_tokenizer

from pear.score import score


def models(*folders: str, others: tuple[str, ...] = ()) -> None:
    """A model each, of different weights; those named in `others` have another tokenizer."""
    for seed, folder in enumerate((*folders, *others)):
        tokenizer = other_tokenizer() if folder in others else make_tokenizer()
        make_model(tokenizer, seed=seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def traces(path: str, rows: int = 8, **columns) -> None:
    """Prompts and completions as strings."""
    made = [
        {"prompt": f"What is {n} plus {n}?", "completion": f"It is {2 * n}. " + "Let us think. " * (n % 4)} | columns
        for n in range(1, rows + 1)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in made))


def scored(path: str, model: str = "teacher", label: bool = False) -> None:
    """Traces scored by a model of `models`; with `label`, every fourth one is wrong."""
    traces("to_score.jsonl")
    score(model, "to_score.jsonl", path, progress=False)
    if label:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        lines = [json.dumps(row | {"label": number % 4 > 0}) + "\n" for number, row in enumerate(rows)]
        Path(path).write_text("".join(lines))
