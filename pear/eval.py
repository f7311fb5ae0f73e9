"""pass@k of a model on problems with a verifier: sampling, judging, the unbiased estimate, JSON and a table."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.appending import holding, output_file
from pear.generate import generate
from pear.io import DataError, write_json
from pear.shown import say
from pear.tasks import FORMATS, Problem, load_task, rewards


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of `k` completions is right (arXiv 2107.03374, equation 1).

    1 - C(n-c, k) / C(n, k), as a product so that no binomial is ever formed:
    C(n-c, k) / C(n, k) = prod_{i = n-c+1 .. n} (1 - k / i).

    Args:
        samples: n, completions drawn
        correct: c, how many of them are right
        k: at least 1, at most n
    """
    _check_k(k, samples)
    if not 0 <= correct <= samples:
        raise ValueError(f"correct must lie between 0 and samples={samples}, got {correct}")
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and samples={samples}, got {k}: pass@k needs k samples of each problem")


def prompt_format(tokenizer: PreTrainedTokenizerBase) -> str:
    """How a model wants its problems worded: `prompt_format` in its tokenizer_config.json, "question" if not there.

    It travels with the tokenizer because it is part of how a problem becomes the model's input, as a chat template is;
    so every checkpoint made from the model carries it on.
    """
    style = tokenizer.init_kwargs.get("prompt_format", "question")
    if style not in FORMATS:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} has prompt_format {style!r}; known are {', '.join(FORMATS)}"
        )
    return style


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Sequence[Problem] = "countdown",
    k: int = 8,
    samples: int = 16,
    *,
    size: int = 200,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: str | Callable[[int, int], None] | None = "sampling",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """pass@1 and pass@k on held-out problems.

    Args:
        task: a name from pear.tasks (its test split is drawn), or the problems themselves
        k: besides pass@1, at most `samples`
        samples: completions a problem
        size: problems to draw when `task` is a name
        seed: of the problems and of the sampling
        max_new_tokens, temperature, batch_size, progress: see `pear.generate.generate`

    Returns:
        a dict ready for JSON: "pass@1", "pass@{k}", their standard errors over problems, and, for each problem,
        its prompt and its counts.

    Raises:
        ValueError: unknown task, k outside 1..samples, size < 1, no problems
    """
    _check_k(k, samples)
    if isinstance(task, str):
        problems = load_task(task, "test", size, seed)
    elif not (problems := list(task)):
        raise ValueError("task: no problems given")
    style = prompt_format(tokenizer)
    prompts = [problem.prompt(style) for problem in problems]
    drawn = generate(
        model,
        tokenizer,
        prompts,
        samples=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        chat_template_kwargs=chat_template_kwargs,
    )
    correct = [_correct(i, problem, texts) for i, (problem, texts) in enumerate(zip(problems, drawn, strict=True))]
    everything = [completion for completions in drawn for completion in completions]
    figures = {}
    for each in sorted({1, k}):
        values = [pass_at_k(samples, c, each) for c in correct]
        figures[f"pass@{each}"], figures[f"pass@{each}_stderr"] = _mean_and_stderr(values)
    return {
        "model": model.name_or_path,
        "task": task if isinstance(task, str) else problems[0].task,
        "split": "test" if isinstance(task, str) else None,
        "prompt_format": style,
        "size": len(problems),
        "samples": samples,
        "k": k,
        "seed": seed,
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        **figures,
        "finished": sum(c.finished for c in everything) / len(everything),  # share that ended before max_new_tokens
        "mean_tokens": sum(len(c.ids) for c in everything) / len(everything),
        "problems": [
            {"prompt": prompt, "samples": samples, "correct": c, "example": completions[0].text}
            for prompt, c, completions in zip(prompts, correct, drawn, strict=True)
        ],
    }


def _correct(number: int, problem: Problem, completions: Sequence[Any]) -> int:
    """How many of the completions are right.

    Raises:
        DataError: the task's scorer fails on one of them.
    """
    try:
        return sum(rewards(problem, [c.text for c in completions]))
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"task {problem.task!r}, problem {number} ({problem.prompt('question')[:200]!r}): its scorer raised {what}"
        ) from error


def _mean_and_stderr(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over problems (None for one problem, which has none)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def table(results: dict[str, dict[str, Any]], title: str | None = None) -> Table:
    """Results of `evaluate` by the name to show, as a rich table; percentages with their standard errors."""
    first = next(iter(results.values()))
    ks = [key for key in first if key.startswith("pass@") and not key.endswith("_stderr")]
    caption = f"{first['samples']} samples of each of {first['size']} problems; ± standard error over problems"
    view = Table(title=title, caption=caption)
    view.add_column("model", overflow="fold")
    for name in (*ks, "finished", "tokens"):
        view.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        cells = [percent(result[key], result[f"{key}_stderr"]) for key in ks]
        view.add_row(Text(name), *cells, percent(result["finished"]), f"{result['mean_tokens']:.1f}")
    return view


def percent(value: float, stderr: float | None = None) -> str:
    return f"{100 * value:.1f} %" + ("" if stderr is None else f" ± {100 * stderr:.1f}")


@holding(output_file, "out")
def run(
    model: str,
    task: str = "countdown",
    k: int = 8,
    samples: int = 16,
    size: int = 200,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`pear eval`: load `model` by name, evaluate, print the table, and write the result as JSON to `out` if given.

    `options` go to `evaluate`. Arguments are checked before the model is loaded.
    """
    from pear.models import load_model, load_tokenizer
    from pear.side_by_side import quiet

    _check_k(k, samples)
    problems = load_task(task, "test", size, seed)
    with quiet():
        loaded, tokenizer = load_model(model), load_tokenizer(model)
    result = evaluate(loaded, tokenizer, problems, k, samples, seed=seed, **options)
    result |= {"model": model, "task": task, "split": "test"}
    Console().print(table({model: result}, title=f"{task}, held-out problems"))
    if out is not None:
        write_json(out, result)
        say(f"written: {out}")
    return result
