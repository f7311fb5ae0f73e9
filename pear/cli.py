"""The command `pear`: score, import, sft, rl, eval, compare, inspect, plan, demo, replicate.

Heavy imports wait inside, so that --help is quick.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from pear.command_line import PearCommand, PearGroup
from pear.shown import many_lines, one_line, say


class _App(typer.Typer):
    def command(self, name: str | None = None, **kwargs):
        return super().command(name, cls=PearCommand, **kwargs)


app = _App(
    cls=PearGroup,
    help="Fine-tune language models with PEAR weights: score -> sft -> rl -> eval.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

# Which rows fit, as `pear sft` has it.
MAX_LENGTH = Annotated[
    int | None,
    typer.Option(help="Tokens of the longest row; default: the model's positions. More than 1 % longer: an error."),
]
CHAT_TEMPLATE_PATH = Annotated[
    str | None, typer.Option(help="Chat template instead of the model's: .jinja, .j2, or a model that has it.")
]
EOS_TOKEN = Annotated[str | None, typer.Option(help="EOS instead of the tokenizer's, at the end of text rows.")]
DROP_LONG_ROWS = Annotated[bool, typer.Option(help="Leave out any number of longer rows.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"pear {version('pear-kernels')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _fail(error: Exception) -> typer.Exit:
    """A mistake in the input is told in a sentence, without a traceback."""
    message = Text(one_line(f"error: {error}"), style="red")
    Console(stderr=True).print(message, soft_wrap=True)
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
    max_length: MAX_LENGTH = None,
    drop_long_rows: DROP_LONG_ROWS = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU, else as stored.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run; default: the accelerator, if any.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from what an earlier, killed call has scored.")] = True,
    column: Annotated[
        str,
        typer.Option(
            help="Where the log-probs go: behavior_logprobs, or ref_logprobs beside what a row has; none: nowhere, for "
            "the --top_k of a teacher that did not write the responses."
        ),
    ] = "behavior_logprobs",
    top_k: Annotated[
        int | None, typer.Option(help="Write the K most likely tokens at each response token too, for distillation.")
    ] = None,
    top_k_temperature: Annotated[
        float, typer.Option(help="Temperature of the top-k log-probs: that of the distillation.")
    ] = 1.0,
    assistant_only_loss: Annotated[
        bool,
        typer.Option(help="messages: score all turns of the assistant, not the last one alone."),
    ] = False,
    chat_template_path: CHAT_TEMPLATE_PATH = None,
    eos_token: EOS_TOKEN = None,
) -> None:
    """Score each response under the policy that wrote it: the behaviour log-probs that `pear sft` needs.

    Shared by several processes: accelerate launch -m pear score ...
    """
    from pear.io import DataError, WriteError
    from pear.score import score as run
    from pear.score import summary_text
    from pear.scoring.processes import is_main, leave_group

    try:
        summary = run(
            model,
            data,
            out,
            batch_tokens=batch_tokens,
            max_length=max_length,
            drop_long_rows=drop_long_rows,
            dtype=dtype,
            device=device,
            resume=resume,
            column=column,
            top_k=top_k,
            top_k_temperature=top_k_temperature,
            fallback=fallback,
            assistant_only_loss=assistant_only_loss,
            chat_template_path=chat_template_path,
            eos_token=eos_token,
        )
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    if is_main():
        for line in summary_text(summary).splitlines():
            say(line)
    leave_group()


@app.command("import")
def import_(
    source: Annotated[str, typer.Option(help="What the data is of: vllm, sglang, openai or jsonl (docs/import.md).")],
    data: Annotated[Path, typer.Option(help="JSONL: a record a line; with --url, rows to generate from or to score.")],
    out: Annotated[Path, typer.Option(help="JSONL of scored rows to write; rejects and report go beside it.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="The behaviour policy's: smollm2, a transformers folder or a hub name.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="The behaviour policy's name, where the data has none.")] = None,
    strict: Annotated[bool, typer.Option(help="Stop at the first record that fails a check.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from what an earlier, killed call has imported.")] = True,
    prompt_column: Annotated[str | None, typer.Option(help="jsonl: default prompt.")] = None,
    completion_column: Annotated[str | None, typer.Option(help="jsonl: default completion.")] = None,
    logprobs_column: Annotated[str | None, typer.Option(help="jsonl: default logprobs.")] = None,
    ids_column: Annotated[str | None, typer.Option(help="jsonl: the completion's token ids, one a log-prob.")] = None,
    tokens_column: Annotated[str | None, typer.Option(help="jsonl: the completion's tokens as text or bytes.")] = None,
    policy_column: Annotated[str | None, typer.Option(help="jsonl: who wrote it; default behavior_policy.")] = None,
    logprobs_of: Annotated[
        str | None,
        typer.Option(help="raw, tempered or processed: what the log-probs are of, if not the source's usual."),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server, up to /v1: ask it for each row.")
    ] = None,
    server_model: Annotated[
        str | None, typer.Option(help="The server's name for the model; default: the one that it lists.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of sampling: asked for (1), or what the data had.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of sampling: asked for (1), or what the data had.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of sampling: what the data had.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Of sampling: what the data had.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest response asked for; default 1024.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling; the row on line i is asked for with seed + i.")] = None,
    n: Annotated[int, typer.Option(help="Responses to ask for, for each prompt.")] = 1,
    extra_body: Annotated[
        str | None, typer.Option(help='Further fields of each request, as JSON: {"stop": ["END"]}.')
    ] = None,
    jobs: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds for one whole answer.")] = 600.0,
    retries: Annotated[int, typer.Option(help="Tries after the first; then the row is set aside.")] = 5,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key; default OPENAI_API_KEY, if set.")
    ] = None,
) -> None:
    """Log-probs that came with a generation, or that a server gives: checked, and written as scored rows."""
    from pear.importing.command import run
    from pear.io import DataError, WriteError

    columns = {"prompt": prompt_column, "completion": completion_column, "logprobs": logprobs_column}
    columns |= {"ids": ids_column, "tokens": tokens_column, "policy": policy_column}
    try:
        lines, rejected = run(
            source,
            data,
            out,
            columns={name: column for name, column in columns.items() if column is not None},
            sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p},
            url=url,
            api_key_env=api_key_env,
            timeout=timeout,
            retries=retries,
            max_tokens=max_tokens,
            seed=seed,
            extra_body=extra_body,
            tokenizer=tokenizer,
            policy=policy,
            strict=strict,
            resume=resume,
            logprobs_of=logprobs_of,
            server_model=server_model,
            n=n,
            jobs=jobs,
        )
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    for line in lines:
        say(line)
    if rejected:
        raise typer.Exit(3)


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
        files = run(runs, out, name, show=lambda text: typer.echo(many_lines(text)))
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    for path in files:
        say(f"written: {path}")


@app.command()
def inspect(
    data: Annotated[Path, typer.Option(help="Scored rows, of `pear score` or `pear import`.")],
    model: Annotated[str, typer.Option(help="The student: smollm2, a transformers folder or a hub name.")],
    level: Annotated[str, typer.Option(help="token, block or sequence, as `pear sft --level`.")] = "token",
    block_size: Annotated[int, typer.Option(help="Response tokens in a block, at level block.")] = 4,
    gamma: Annotated[float, typer.Option(help="Discount in (0, 1], at levels token and block.")] = 0.999,
    log_ratio_clip: Annotated[
        tuple[float, float], typer.Option(help="Clip of each token's log-ratio.", metavar="LOW HIGH")
    ] = (-0.08, 0.3),
    log_weight_clip: Annotated[
        tuple[float, float], typer.Option(help="Clip of each weight's logarithm.", metavar="LOW HIGH")
    ] = (-10.0, 5.0),
    clip_blocks: Annotated[bool, typer.Option("--clip_blocks", help="Clip blocks, not tokens (ours).")] = False,
    center: Annotated[bool, typer.Option("--center", help="Subtract each response's mean delta (ours).")] = False,
    clip_length: Annotated[
        int | None, typer.Option(help="Narrow the log-ratio's clip in responses longer than this (ours).")
    ] = None,
    normalize: Annotated[
        str | None, typer.Option(help="Weights of mean 1 over each 'sequence' or the 'batch' (ours).")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Page with pictures and coloured text to write.")] = None,
    json: Annotated[Path | None, typer.Option(help="JSON report to write.")] = None,
    rows: Annotated[int, typer.Option(help="Rows to show with their text.")] = 12,
    max_length: MAX_LENGTH = None,
    drop_long_rows: DROP_LONG_ROWS = False,
    sample: Annotated[int | None, typer.Option(help="Look at so many rows only, drawn at random.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    roles: Annotated[
        Path | None, typer.Option(help="YAML of structural tokens that mean the same, as `pear sft --roles`.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in a batch, at most.")] = 8192,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or auto: float32 on a CPU, else as stored.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to run; default: the accelerator, if any.")] = None,
    chat_template_path: CHAT_TEMPLATE_PATH = None,
    eos_token: EOS_TOKEN = None,
) -> None:
    """Before any training: what PEAR's weights will do to scored data, in numbers, pictures and advice."""
    from pear.align import read_roles
    from pear.inspecting import inspect as run
    from pear.io import DataError, WriteError
    from pear_kernels.options import PEAROptions

    try:
        report = run(
            data,
            model,
            options=PEAROptions(
                level=level,
                block_size=block_size,
                gamma=gamma,
                log_ratio_clip=log_ratio_clip,
                log_weight_clip=log_weight_clip,
                clip_blocks=clip_blocks,
                center=center,
                clip_length=clip_length,
                normalize=normalize,
            ),
            html=html,
            json_report=json,
            rows=rows,
            max_length=max_length,
            drop_long_rows=drop_long_rows,
            sample=sample,
            seed=seed,
            batch_tokens=batch_tokens,
            dtype=dtype,
            device=device,
            chat_template_path=chat_template_path,
            eos_token=eos_token,
            console=Console(),
            **({} if roles is None else {"roles": read_roles(roles)}),
        )
    except (DataError, WriteError, ValueError) as error:  # ValueError: an option out of range
        raise _fail(error) from None
    for path in (html, json):
        if path is not None:
            say(f"written: {path}")
    say(report["data"]["in_words"])


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Option(
            help="smollm2, a transformers folder, a hub name, or a built-in shape (no network): qwen3-8b, qwen2.5-7b, "
            "llama-3.1-8b, gemma-3-4b, mistral-7b-v0.3, phi-4, smollm3-3b, ... (docs/plan.md)."
        ),
    ],
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row; default: the longest that fits, with each loss.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="Memory or name: 80GB, h100; default: the GPU that is here.")] = None,
    batch: Annotated[int, typer.Option("--batch", "--per_device_train_batch_size", help="Rows of a micro-batch.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    bf16: Annotated[bool, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16.")] = True,
    optim: Annotated[str, typer.Option(help="Transformers' name of the optimizer.")] = "adamw_torch_fused",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient_checkpointing/--no_gradient_checkpointing", help="Of the layers.")
    ] = True,
    activation_offloading: Annotated[
        bool, typer.Option("--offload", "--activation_offloading", help="Hidden states between layers to the host.")
    ] = False,
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient_accumulation_steps", help="Micro-batches of an optimizer step.")
    ] = 1,
    use_liger_kernel: Annotated[
        bool, typer.Option("--use_liger_kernel", help="Liger's norms, rotary embedding and SwiGLU in the trunk.")
    ] = False,
    use_peft: Annotated[bool, typer.Option("--use_peft", help="LoRA, all else frozen.")] = False,
    lora_r: Annotated[int, typer.Option("--lora_r", help="LoRA: its rank.")] = 16,
    lora_target_modules: Annotated[
        list[str] | None,
        typer.Option("--lora_target_modules", help="LoRA: a module's name, or all-linear; default: PEFT's own choice."),
    ] = None,
    workspace_bytes: Annotated[
        int | None, typer.Option("--workspace_bytes", help="Of our head: size of the chunk of logits.")
    ] = None,
    rope_factor: Annotated[
        float, typer.Option("--rope_factor", help="Positions are so many times the config's, by RoPE scaling to come.")
    ] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print it for machines: bytes and tokens.")] = False,
) -> None:
    """Before any GPU is rented: a training step's memory by part, and the longest context, with both losses.

    Options with underscores, --dtype, --bf16 and --optim are those of `pear sft`, with its defaults.
    """
    from json import dumps

    from pear.io import DataError, WriteError
    from pear.planning import Setup, lines, table
    from pear.planning import plan as run

    setup = Setup(
        dtype=dtype,
        bf16=bf16,
        optim=optim,
        gradient_checkpointing=gradient_checkpointing,
        activation_offloading=activation_offloading,
        gradient_accumulation_steps=gradient_accumulation_steps,
        per_device_train_batch_size=batch,
        use_liger_kernel=use_liger_kernel,
        use_peft=use_peft,
        lora_r=lora_r,
        lora_target_modules=tuple(lora_target_modules or ()),
        workspace_bytes=workspace_bytes,
    )
    try:
        found = run(model, context, gpu, setup, rope_factor)
    except (DataError, WriteError) as error:
        raise _fail(error) from None
    if json:
        typer.echo(dumps(found, indent=1))
        return
    Console().print(table(found))
    for line in lines(found):
        say(line)


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
        say(f"written: {path}")
