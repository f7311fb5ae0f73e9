"""`pear score`: teacher-forced log-probs of each response under the policy that wrote it, for `pear sft`."""

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pear.appending import holding, output_file
from pear.io import LOGPROB_COLUMNS, TOP_K_COLUMNS, DataError, write_error
from pear.long_rows import check_long_rows, rows_in_words, too_long
from pear.models import load_tokenizer, vocabulary_fingerprint
from pear.progress import progress as progress_of
from pear.rows import bare_text_in_words, prompt_cut_in_words
from pear.scoring.batches import TopK, batches, score_batch
from pear.scoring.choice import NONE
from pear.scoring.output import Written, write_out
from pear.scoring.policies import Policy, identity
from pear.scoring.processes import Processes
from pear.scoring.rows import Plan, Share, all_rows, read_plan, some_lines
from pear.scoring.side import SideFiles
from pear.scoring.spans import make_spans
from pear.seal import FORMAT
from pear.shown import one_line
from pear.tokenizer_options import changed_tokenizer

COLUMNS = (*LOGPROB_COLUMNS, "none")  # where log-probs may go


@holding(output_file, "out", streams=False)
def score(
    model: str | PreTrainedModel | None,
    data: str | os.PathLike,
    out: str | os.PathLike,
    *,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    drop_long_rows: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    resume: bool = True,
    dtype: str = "auto",
    device: str | None = None,
    progress: bool = True,
    column: str = "behavior_logprobs",
    top_k: int | None = None,
    top_k_temperature: float = 1.0,
    fallback: str | None = None,
    assistant_only_loss: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
) -> dict[str, Any]:
    """Score every row of `data` (JSONL) and write the rows to `out` with their log-probs (docs/scoring.md).

    An input row is `{"prompt", "completion"}`, strings or lists of chat messages, or `{"messages"}` that ends with the
    assistant's. An output row has, besides what it came with, `input_ids`, `completion_mask` and `behavior_logprobs`,
    lists of one length: `behavior_logprobs[t]` is log p(input_ids[t] | all before) where the mask is 1, else 0.0;
    `behavior_spans`, the bytes of the completion that each token stands for; `tokenizer` (a fingerprint), `model` and
    `behavior_policy` (the model's name); and a seal, `scored`, by which a later edit is found. Rows keep their order.

    With a `model`, it has written every row, and a row that names another as its `behavior_policy` is an error.
    Without, each row is scored by the model that it names, one model after another; a row that has sealed log-probs
    keeps them; and `fallback` says what a row is that names none: "none", text of no model, which gets no log-probs; or
    a model that estimates them (`behavior_estimated` is then true). Rows that say "none" themselves stay that.

    With `column="ref_logprobs"` the log-probs are a reference's: they go to `ref_logprobs`, the name to `ref_model`,
    and a row that was scored before keeps everything else that it has. Token columns that stay must be about the
    tokens that this model's tokenizer makes. `out` may be `data` itself.

    With `top_k`, there are also `top_k_ids` and `top_k_logprobs`, for each completion token the K tokens that the model
    holds most likely in its place, and their log-probs, descending (an empty list at other positions), and
    `top_k_temperature`, `top_k_model` (a name), `top_k_vocabulary` (the size of that model's head) and
    `top_k_tokenizer` (a fingerprint of its vocabulary).

    With `column="none"` the top-k are all that is written: a teacher that did not write the responses leaves every
    log-prob that a row has, and `model` and `ref_model`.

    Finished batches go to side files, `<out>.<hash>.<n>.partial`; after a kill, the same call (same data, models and
    settings) goes on from there. `out` appears whole at the end, and the side files go. Processes started together
    (`accelerate launch`) share the batches; all must see the folder of `out`. Numbers do not depend on how many they
    are, nor on kills; on a CPU they can depend on the number of threads, in their last bits.

    Args:
        model: a name for `load_model`; or a loaded model, which then needs `tokenizer`; or None, see above.
        batch_tokens: rows are sorted by length and padded in batches of at most this many tokens (a longer row alone).
        max_length: longer rows are left out of `out`; they are counted and listed in the result, never cut. None: the
            model's own context length, if its config tells. More than 1 % of such rows are an error.
        drop_long_rows: leave out any number of them.
        resume: False starts anew, whatever an earlier call left.
        dtype: "float32", "bfloat16", or "auto": float32 on a CPU, the checkpoint's dtype elsewhere. For names only.
        device: where to run; None takes the accelerator if there is one, each of several processes its own.
        column: where the log-probs go, "behavior_logprobs" or "ref_logprobs"; "none", with `top_k`: nowhere.
        top_k: K, at least 1 and less than the vocabulary; None for none of it.
        top_k_temperature: divides the logits that `top_k_logprobs` are taken of, and not those of `column`: that of the
            distillation they are for.
        fallback: "none" or a model's name, for rows that name no policy; only without a `model`.
        assistant_only_loss: the completion of `messages` is all turns of the assistant's, from its first answer on, and
            not the last one alone. What others say among them has mask 0, as in every completion.
        chat_template_path: a template (.jinja, .j2) or a model whose template is taken instead of the model's own. Give
            `pear sft` and `pear inspect` the same.
        eos_token: what ends a completion given as text, instead of the tokenizer's own EOS. Likewise.

    Returns:
        `rows` read; `scored`, of these by a model, and `resumed`, of these by an earlier call; `none` (rows without a
        policy), `passed` (rows that kept their log-probs), `estimated`; `policies`, rows of each behaviour policy;
        `too_long` and `too_long_lines`; `prompt_cut` (rows whose prompt changes at its end once the completion
        follows); `unaligned` (rows whose bytes and tokens cannot be matched, see docs/tokenizers.md) and
        `unaligned_reasons` (by line); `tokens` scored, `mean_logprob` (None without), `seconds`, `processes`,
        `max_length` (None with several models), `column`, `top_k`, `top_k_temperature`, `out`; `notes`, sentences on
        rows whose tokens are not what one may expect: text that the chat template leaves out, BOS or EOS twice, tokens
        with mask 0 in completions, turns that are not scored. In every process.

    Raises:
        DataError: a row without completion, a line that is no JSON, a `label` that is no boolean, other tokens than
            those of the columns that stay (with file and line), no row that fits; rows that do not fit, where `out`
            is `data`, which would lose them; a row that was edited after it was scored; rows that no model
            is given for.
        WriteError: the disk is full; the side files stay, so nothing scored is lost.
        OtherProcessFailed: (a DataError) another of the processes has failed; nothing scored is lost.
    """
    began = time.monotonic()
    wanted = _check_arguments(model, tokenizer, batch_tokens, max_length, column, top_k, top_k_temperature, fallback)
    processes = Processes(device)
    console = Console(stderr=True, quiet=not (progress and processes.main))
    if processes.warning:
        console.print(processes.warning, style="yellow", markup=False, highlight=False)
    options = {"chat_template_path": chat_template_path, "eos_token": eos_token}
    options = {name: value for name, value in options.items() if value is not None}
    if model is None and options:
        raise DataError(f"{next(iter(options))} is about the tokenizer of a model: give the model too")
    replaced = (column,) if wanted is None else (column, *TOP_K_COLUMNS)

    def open_policy(name: str | PreTrainedModel) -> Policy:
        where = processes.device if device is not None or isinstance(name, str) else None
        own = tokenizer
        if options:
            own = changed_tokenizer(load_tokenizer(name) if tokenizer is None else tokenizer, **options)
        return Policy(name, own, max_length, dtype, where)

    with processes.together():
        policy = None if model is None else open_policy(model)
        plan = read_plan(data, policy, fallback, column, replaced, open_policy, assistant_only_loss)
        _check_plan(plan, data, out, wanted, column, drop_long_rows)
    _tell_plan(plan, data, console)
    if len(set(processes.gather(plan.hash))) > 1:
        raise DataError(f"{data}: the processes of this run have read different data; do all see the same file?")

    sides: dict[str, SideFiles] = {}
    beside_top_k: dict[str, Any] = {}
    resumed = 0
    with contextlib.ExitStack() as held:
        for share in plan.shares:
            if model is None:
                console.print(f"{len(share.rows)} rows of {share.policy.name}", markup=False, highlight=False)
            with share.policy.loaded() as scorer:
                for row in share.rows:
                    share.policy.check_ids(row.input_ids, f"{data}:{row.line}")
                if wanted is not None:
                    beside_top_k = _about_top_k(wanted, share.policy, scorer.get_output_embeddings().weight.shape[0])
                header = _header(plan, share, wanted) | identity(scorer)
                side = sides[share.policy.name] = SideFiles(Path(out), header, share.rows, processes)
                held.enter_context(side.open(resume))
                resumed += len(side)
                if len(side):
                    console.print(
                        f"Going on from {side.path.name}: {len(side)} of {len(share.rows)} rows are scored already.",
                        markup=False,
                    )
                _score_share(share, scorer, side, processes, data, batch_tokens, wanted, console)
        if column == "behavior_logprobs":
            make_spans(data, plan, sides, processes)
        written = None
        processes.gather(None)  # all are done
        with processes.together():
            if processes.main:
                with _kept(out, sides):
                    written = write_out(out, data, plan, sides, column, beside_top_k)
    with processes.together():
        if processes.main:
            for side in sides.values():
                side.remove()
    summary = {
        **_counts(plan, resumed),
        "prompt_cut": sum(row.prompt_cut > 0 for row in all_rows(plan)),
        "max_length": max_length if len(plan.shares) != 1 else plan.shares[0].policy.max_length,
        "column": column,
        "top_k": top_k,
        "top_k_temperature": top_k_temperature,
        "out": str(out),
        "notes": plan.notes.in_words(),
        "processes": processes.count,
        "seconds": time.monotonic() - began,
    }
    return summary | processes.gather(None if written is None else _results(written))[0]


def _check_arguments(
    model: str | PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_tokens: int,
    max_length: int | None,
    column: str,
    top_k: int | None,
    top_k_temperature: float,
    fallback: str | None,
) -> TopK | None:
    """Raise where they do not go together; what is to be kept of each distribution, if anything."""
    if batch_tokens < 1:
        raise DataError(f"batch_tokens must be at least 1, got {batch_tokens}")
    if max_length is not None and max_length < 2:
        raise DataError(f"max_length must be at least 2 (one token to predict another from), got {max_length}")
    if column not in COLUMNS:
        raise DataError(f"column must be one of {', '.join(COLUMNS)}, got {column!r}")
    wanted = _check_top_k(top_k, top_k_temperature)
    if column == "none" and wanted is None:
        raise DataError(
            "column = 'none' without top_k: there would be nothing to write. Give top_k, or the column that the "
            f"log-probs go to: {' or '.join(LOGPROB_COLUMNS)}"
        )
    if model == NONE:
        raise DataError(f"model = {NONE!r} is no model. For text that no model wrote: no model, and fallback {NONE!r}")
    if model is not None and fallback is not None:
        raise DataError(
            f"fallback = {fallback!r} does nothing beside a model, which scores every row; give one of them"
        )
    if model is None and tokenizer is not None:
        raise DataError("tokenizer is that of a model, and none is given; each policy that rows name has its own")
    if model is None and (column != "behavior_logprobs" or wanted is not None):
        what = f"column = {column!r}" if column != "behavior_logprobs" else "top_k"
        raise DataError(f"{what} needs a model: only behaviour log-probs can be of the policy that each row names")
    return wanted


def _check_top_k(top_k: int | None, temperature: float) -> TopK | None:
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise DataError(f"top_k_temperature must be a positive number, got {temperature!r}")
    if top_k is None:
        if temperature != 1:
            raise DataError(f"top_k_temperature = {temperature} does nothing without top_k; give top_k too")
        return None
    if not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1:
        raise DataError(f"top_k must be a whole number of tokens, at least 1, got {top_k!r}")
    return TopK(top_k, float(temperature))


def _check_plan(
    plan: Plan, data: str | os.PathLike, out: str | os.PathLike, wanted: TopK | None, column: str, drop_long_rows: bool
) -> None:
    rows = plan.written + len(plan.too_long)
    if not rows:
        raise DataError(f"{data}: no rows in it")
    check_long_rows(str(data), list(plan.too_long), rows, _limit(plan), drop=drop_long_rows)
    if plan.too_long and os.path.exists(out) and os.path.samefile(data, out):
        raise DataError(
            f"{_too_long_message(plan, data)} They would be lost, since out is the same file: give another out, or a "
            "larger max_length."
        )
    if wanted is not None and plan.none and column == "behavior_logprobs":
        raise DataError(
            f"{data}: rows without a policy get no log-probs ({some_lines(sorted(plan.none))}), and so no top_k beside "
            "them. Score without top_k; then write the top-k of every row by column 'none'."
        )


def _header(plan: Plan, share: Share, wanted: TopK | None) -> dict[str, Any]:
    """What a policy's log-probs depend on, but for the weights, and which rows they are of."""
    lines = np.array([row.line for row in share.rows], dtype="<i8").tobytes()
    header = {
        "format": FORMAT,
        "data": plan.hash,
        "lines": hashlib.sha256(lines).hexdigest()[:16],
        "model": share.policy.name,
        "tokenizer": share.policy.fingerprint,
    }
    if plan.all_turns:
        header["assistant_only_loss"] = True
    if wanted is not None:
        header |= {"top_k": wanted.k, "top_k_temperature": wanted.temperature}
    return header


def _about_top_k(wanted: TopK, policy: Policy, vocabulary: int) -> dict[str, Any]:
    """What stands in each row beside the top-k."""
    if wanted.k >= vocabulary:
        raise DataError(f"top_k must be less than the model's vocabulary of {vocabulary} tokens, got {wanted.k}")
    return {
        "top_k_temperature": wanted.temperature,
        "top_k_model": policy.name,
        "top_k_vocabulary": vocabulary,
        "top_k_tokenizer": vocabulary_fingerprint(policy.tokenizer),
    }


def _score_share(
    share: Share,
    scorer: PreTrainedModel,
    side: SideFiles,
    processes: Processes,
    data: str | os.PathLike,
    batch_tokens: int,
    wanted: TopK | None,
    console: Console,
) -> None:
    """This process's part of the batches that are left."""
    left = []
    for batch in batches(share.rows, batch_tokens):
        if todo := [row for i in batch if (row := share.rows[i]).line not in side]:
            left.append(todo)
    mine = left[processes.rank :: processes.count]
    with progress_of(f"scoring{processes.which}", sum(map(len, mine)), "rows", console=console) as advance:
        for rows in mine:
            side.append(rows, score_batch(scorer, rows, data, wanted))
            advance(len(rows))


@contextlib.contextmanager
def _kept(out: str | os.PathLike, sides: dict[str, SideFiles]) -> Iterator[None]:
    """If `out` cannot be written, say what of the work is still there."""
    try:
        yield
    except OSError as error:
        kept = ", ".join(side.path.name for side in sides.values())
        kept = f"The scores are kept in {kept} beside it; the same command goes on from there." if kept else ""
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise write_error(out, cause, kept=kept) from error


# ---------------------------------------------------------------------------------------------------------------------
# What is told


def _counts(plan: Plan, resumed: int) -> dict[str, Any]:
    return {
        "rows": plan.written + len(plan.too_long),
        "scored": plan.written - len(plan.none) - len(plan.passed),
        "resumed": resumed,
        "none": len(plan.none),
        "passed": len(plan.passed),
        "too_long": len(plan.too_long),
        "too_long_lines": list(plan.too_long),
    }


def _results(written: Written) -> dict[str, Any]:
    return {
        "policies": dict(written.policies),
        "estimated": written.estimated,
        "unaligned": len(written.unaligned),
        "unaligned_reasons": written.unaligned,
        "tokens": written.tokens,
        "mean_logprob": written.total / written.tokens if written.tokens else None,
    }


def _tell_plan(plan: Plan, data: str | os.PathLike, console: Console) -> None:
    if plan.too_long:
        console.print(_too_long_message(plan, data), style="yellow", markup=False, highlight=False)
    if cut := sum(row.prompt_cut > 0 for row in all_rows(plan)):
        console.print(f"{prompt_cut_in_words(cut)}.", style="yellow")
    if plan.text:
        told = bare_text_in_words(plan.text, plan.written, plan.shares[0].policy.tokenizer)
        console.print(one_line(f"{data}: {told}."), style="yellow", markup=False, highlight=False)
    for sentence in plan.notes.in_words():
        said = one_line(f"{data}: {sentence}.")
        console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)


def summary_text(summary: dict[str, Any]) -> str:
    """What `score` returned, in a few lines."""
    top = ""
    if summary["top_k"]:
        top = f", each with the {summary['top_k']} most likely at temperature {summary['top_k_temperature']:g}"
    mean = "" if summary["mean_logprob"] is None else f", mean log-prob {summary['mean_logprob']:.4f}"
    lines = [
        f"{summary['out']}: {summary['scored']} of {summary['rows']} rows scored ({summary['resumed']} of them by an "
        f"earlier call); {summary['tokens']} response tokens{top}{mean}, {summary['seconds']:.1f} s"
    ]
    if summary["none"] or summary["passed"] or summary["estimated"] or len(summary["policies"]) > 1:
        lines.append("rows of each behaviour policy: " + ", ".join(f"{n} {k}" for k, n in summary["policies"].items()))
        lines.append(
            f"{summary['none']} of no policy (weight 1), {summary['estimated']} estimated by a model that did not "
            f"write them, {summary['passed']} kept the log-probs they had"
        )
    if summary["unaligned"]:
        reasons = summary["unaligned_reasons"]
        first = next(iter(reasons))
        lines.append(
            f"{len(reasons)} rows do not round-trip between text and tokens ({some_lines(list(reasons))}), so that no "
            f"student of another tokenizer can use them; of line {first}: {reasons[first]}"
        )
    long = summary["too_long_lines"]
    limit = "their model's positions" if summary["max_length"] is None else summary["max_length"]
    lines.append(rows_in_words("Wrote", summary["rows"] - len(long), {too_long(long, limit): len(long)}))
    return "\n".join(map(one_line, lines))


def _limit(plan: Plan) -> str:
    return " or ".join(map(str, sorted(set(plan.too_long.values()))))


def _too_long_message(plan: Plan, data: str | os.PathLike) -> str:
    rows = plan.written + len(plan.too_long)
    return f"{data}: left out {len(plan.too_long)} of {rows} rows, {too_long(list(plan.too_long), _limit(plan))}."
