"""The command `pear`: score, sft, rl, eval, compare, demo, replicate.

Heavy imports wait inside, so that --help is quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    help="Fine-tune language models with PEAR weights: score -> sft -> rl -> eval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _fail(error: Exception) -> typer.Exit:
    """A mistake in the input is told in a sentence, without a traceback."""
    Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return typer.Exit(1)


@app.command()
def score(
    data: Annotated[Path, typer.Option(help="JSONL rows: prompt and completion, or messages.")],
    out: Annotated[Path, typer.Option(help="JSONL to write: the rows with input_ids and behavior_logprobs.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Behaviour policy: smollm2, a transformers folder or a hub name. Without, each row names its own as "
            "behavior_policy."
        ),
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(help="Without --model, for rows that name no policy: none (weight 1), or a model to estimate by."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in a batch, at most.")] = 8192,
    max_length: Annotated[int | None, typer.Option(help="Leave out longer rows; default: the model's context.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU, else as stored.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run; default: the accelerator, if any.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from what an earlier, killed call has scored.")] = True,
    column: Annotated[
        str,
        typer.Option(
            help="Where the log-probs go: behavior_logprobs, or ref_logprobs beside what a row has; none: nowhere, for "
            "the --top-k of a teacher that did not write the responses."
        ),
    ] = "behavior_logprobs",
    top_k: Annotated[
        int | None, typer.Option(help="Write the K most likely tokens at each response token too, for distillation.")
    ] = None,
    top_k_temperature: Annotated[
        float, typer.Option(help="Temperature of the top-k log-probs: that of the distillation.")
    ] = 1.0,
) -> None:
    """Score each response under the policy that wrote it: the behaviour log-probs that `pear sft` needs.

    Shared by several processes: accelerate launch -m pear score ...
    """
    from pear.io import DataError, WriteError
    from pear.score import score as run
    from pear.score import summary_text
    from pear.scoring.processes import OtherProcessFailed, is_main, leave_group

    try:
        summary = run(
            model,
            data,
            out,
            batch_tokens=batch_tokens,
            max_length=max_length,
            dtype=dtype,
            device=device,
            resume=resume,
            column=column,
            top_k=top_k,
            top_k_temperature=top_k_temperature,
            fallback=fallback,
        )
    except OtherProcessFailed:  # which has told why
        raise typer.Exit(1) from None
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    if is_main():
        typer.echo(summary_text(summary))
    leave_group()


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def sft(context: typer.Context) -> None:
    """Train on scored rows: --model M --data scored.jsonl, --config x.yaml, any flag of TRL's SFTConfig, PEAR's own."""
    from pear.io import DataError, WriteError
    from pear.sft import main

    try:
        main(context.args)
    except (DataError, WriteError) as error:
        raise _fail(error) from None


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def rl(context: typer.Context) -> None:
    """GRPO from any checkpoint: --model M --task countdown, or --data rows.jsonl --reward math; any GRPOConfig flag."""
    from pear.io import DataError, WriteError
    from pear.rl import main

    try:
        main(context.args)
    except (DataError, WriteError) as error:
        raise _fail(error) from None


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="Model to evaluate: smollm2, a transformers folder or a hub name.")],
    task: Annotated[str, typer.Option(help="Task from reasoning-gym.")] = "countdown",
    k: Annotated[int, typer.Option(help="Report pass@k for this k, besides 1.")] = 8,
    samples: Annotated[int, typer.Option(help="Samples for each problem, at least k.")] = 16,
    size: Annotated[int, typer.Option(help="Problems.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of problems and sampling.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON report to write.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer sampled.")] = 256,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
) -> None:
    """Unbiased pass@1 and pass@k on verifiable problems that no training split holds."""
    from pear.eval import run
    from pear.io import WriteError

    try:
        run(
            model=model,
            task=task,
            k=k,
            samples=samples,
            size=size,
            seed=seed,
            out=out,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        )
    except (ValueError, WriteError) as error:
        raise _fail(error) from None


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs; the first two are subtracted.")],
    out: Annotated[Path, typer.Option(help="Folder for report.md and pictures.")] = Path("runs/compare"),
    name: Annotated[list[str] | None, typer.Option(help="What to call the runs: once for each, in order.")] = None,
) -> None:
    """Compare runs of `pear sft` or `pear rl`: one table with intervals, and pictures of what they logged."""
    from pear.compare import compare as run
    from pear.io import DataError, WriteError

    try:
        files = run(runs, out, name)
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    for path in files:
        typer.echo(f"written: {path}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, report and pictures.")] = Path("runs/demo"),
    fast: Annotated[bool, typer.Option(help="A much smaller run that only shows that everything works.")] = False,
) -> None:
    """Small student and teacher on Countdown: SFT against PEAR, from data to report, on two CPU cores."""
    from pear.demo import run
    from pear.io import DataError, WriteError

    try:
        run(out, fast)
    except (DataError, WriteError) as error:
        raise _fail(error) from None


@app.command()
def replicate(
    config: Annotated[Path, typer.Option(help="YAML of the study, such as experiments/countdown.yaml.")],
    fast: Annotated[bool, typer.Option(help="A much smaller run that only shows that everything works.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Jobs side by side; default: one a core.", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="Checkpoints and records; default: runs/replicate/STUDY.")] = None,
    results: Annotated[
        Path | None, typer.Option(help="Results and report; default: experiments/results/STUDY.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Try the settings of RL on the baseline arm alone, on seeds of their own.")
    ] = False,
    report: Annotated[
        bool, typer.Option(help="Run nothing; write the report again from the results there are, with today's notes.")
    ] = False,
) -> None:
    """The paper's experiment in miniature: several ways of SFT, the same RL from each, over seeds, and a report."""
    from pear.io import DataError, WriteError
    from pear.replicate import replicate as run
    from pear.replicate.graph import UnitError

    try:
        files = run(config, fast=fast, jobs=jobs, out=out, results=results, calibrate=calibrate, report=report)
    except (DataError, WriteError, UnitError) as error:
        raise _fail(error) from None
    for path in files:
        typer.echo(f"written: {path}")
