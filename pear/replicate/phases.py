"""What the jobs of a study do, one function a phase: `phase(tick, folder, needs, **arguments)` fills `folder`.

`needs` are the folders of the jobs before it; arguments are plain values, since a job's cache key is made of them.
"""

from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel

from pear.eval import evaluate as evaluate_model
from pear.io import DataError, read_jsonl, write_jsonl
from pear.models import load_model, load_tokenizer
from pear.pipeline import Tick, draw_traces, fine_tune, reinforce
from pear.pretrain import mixture, small_llama, teach
from pear.replicate.diagnostics import health, movement
from pear.replicate.study import RL, SFT, Evaluation, Model, Taught, Traces
from pear.seal import write_scored
from pear.tasks import Problem, load_task
from pear.worked import WORKED

Needs = Mapping[str, Path]  # the folders of other units, by name, such as "sft/pear-token/3"
FEWEST_TRACES = 4


def base(
    tick: Tick,
    folder: Path,
    needs: Needs,
    *,
    role: str,
    seed: int,
    task: str,
    config: dict,
    model: dict,
    taught: dict,
    cpu: bool,
) -> dict[str, Any]:
    """Student or behaviour policy ("student" or "teacher"), taught the task by worked solutions of the train split."""
    how, learnt = Model(**model), Taught(**taught)
    rng = Random(f"{role} {seed}")
    torch.manual_seed(rng.getrandbits(32))
    worked = WORKED[task]
    if how.start is None:
        tokenizer = worked.make_tokenizer()
        net = small_llama(tokenizer, how.hidden_size, how.layers, how.heads)
    else:
        net, tokenizer = _load(how.start, how.dtype, cpu), load_tokenizer(how.start)
        # problems are worded as the worked solutions word them, in this model's checkpoints too
        tokenizer.init_kwargs["prompt_format"] = "compact"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    if learnt.memorise is None:
        problems = worked.problems(config, 1_000 + seed)  # a stream of its own, as is that of the traces' problems
    else:
        problems = [worked.of(problem) for problem in load_task(task, "train", learnt.memorise, seed, **config)]
    loss = teach(
        net,
        tokenizer,
        lambda: worked.example(rng, problems, mixture(rng, learnt.styles)),
        steps=learnt.steps,
        batch=learnt.batch,
        learning_rate=learnt.learning_rate,
        progress=tick,
    )
    _store(folder, net, tokenizer)
    return {"parameters": net.num_parameters(), "loss": loss if learnt.steps else None}


def traces(
    tick: Tick,
    folder: Path,
    needs: Needs,
    *,
    seed: int,
    task: str,
    config: dict,
    traces: dict,
    model: dict,
    max_new_tokens: int,
    generate_batch: int,
    cpu: bool,
) -> dict[str, Any]:
    """The teacher's right completions, scored under it and under the student: train.jsonl and heldout.jsonl."""
    from pear.score import score

    wanted, role = Traces(**traces), _roles(needs)
    tokenizer = load_tokenizer(str(role["teacher"]))
    teacher = _load(role["teacher"], Model(**model).dtype, cpu)
    found = draw_traces(
        teacher,
        tokenizer,
        load_task(task, "train", wanted.problems, seed, **config),
        wanted.samples,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=generate_batch,
        progress=tick,
    )
    rows = found.rows
    Random(seed).shuffle(rows)
    rows = rows[: wanted.rows]
    if len(rows) < FEWEST_TRACES:
        raise DataError(
            f"the behaviour policy got only {found.right} of {found.drawn} completions right, {len(rows)} different "
            f"ones: fewer than {FEWEST_TRACES} are nothing to train on. Teach it longer, or draw more (traces.samples)"
        )
    write_jsonl(folder / "traces.jsonl", rows)
    summary = score(teacher, folder / "traces.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, progress=False)
    if summary["prompt_cut"]:
        raise DataError(
            f"{summary['prompt_cut']} of {len(rows)} prompts change at their end once the completion follows: text and "
            "tokens of these models do not agree, so the scores would be of other tokens than were sampled"
        )
    student = _load(role["student"], Model(**model).dtype, cpu)
    score(
        student, folder / "scored.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, column="ref_logprobs",
        progress=False,
    )  # fmt: skip
    scored = [row for _, row in read_jsonl(folder / "scored.jsonl")]
    heldout = max(1, round(wanted.heldout_share * len(scored)))
    write_scored(folder / "heldout.jsonl", scored[:heldout])
    write_scored(folder / "train.jsonl", scored[heldout:])
    (folder / "traces.jsonl").unlink()
    (folder / "scored.jsonl").unlink()
    return {
        "right": found.right,
        "drawn": found.drawn,
        "train": len(scored) - heldout,
        "heldout": heldout,
        "mean_tokens": summary["tokens"] / len(scored),
        "mean_logprob": summary["mean_logprob"],
        "example": {key: scored[heldout][key] for key in ("prompt", "completion")},
    }


def sft(
    tick: Tick, folder: Path, needs: Needs, *, seed: int, sft: dict, model: dict, options: dict, cpu: bool
) -> dict[str, Any]:
    """The student on the traces with the objective of `options`; all else is the same for every arm."""
    from pear.score import score

    how, settings, role = Model(**model), SFT(**sft), _roles(needs)
    tokenizer = load_tokenizer(str(role["student"]))
    net = _load(role["student"], how.dtype)
    train, heldout = role["traces"] / "train.jsonl", role["traces"] / "heldout.jsonl"
    trained = fine_tune(
        tick,
        net,
        tokenizer,
        folder,
        train,
        heldout,
        _lora(how),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=2 * settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_steps,
        logging_steps=5,
        eval_strategy="epoch",
        eval_on_start=True,
        seed=seed,
        bf16=False,
        use_cpu=cpu,
        **options,
    )
    weights = []
    if options.get("weighting", "pear") not in ("none", "idft"):  # idft's hang on entropies, which rows do not hold
        after = folder / "after.jsonl"
        score(
            _load(folder, how.dtype, cpu), train, after, tokenizer=tokenizer, column="ref_logprobs", progress=False
        )  # the trained model's log-probs in the place of the student's
        weights = [
            {"moment": moment, **health(path, train, options)} for moment, path in (("start", train), ("end", after))
        ]
        after.unlink()
    return {"log": trained.log, "warnings": trained.warnings, "weights": weights}


def rl(
    tick: Tick,
    folder: Path,
    needs: Needs,
    *,
    seed: int,
    task: str,
    config: dict,
    rl: dict,
    model: dict,
    max_new_tokens: int,
    cpu: bool,
) -> dict[str, Any]:
    """GRPO from the checkpoint after SFT: nothing here knows which arm it is."""
    how, settings, role = Model(**model), RL(**rl), _roles(needs)
    trainer = reinforce(
        tick,
        _load(role["sft"], how.dtype),
        load_tokenizer(str(role["sft"])),
        folder,
        load_task(task, "train", settings.problems, seed, **config),
        _lora(how),
        loss_type="grpo",
        max_steps=settings.rounds * settings.updates,
        per_device_train_batch_size=settings.prompts * settings.group // settings.updates,
        steps_per_generation=settings.updates,
        num_generations=settings.group,
        max_completion_length=max_new_tokens,
        learning_rate=settings.learning_rate,
        beta=settings.beta,
        lr_scheduler_type="constant",
        logging_steps=settings.updates,
        keep_samples=2,
        seed=seed,
        bf16=False,
        use_cpu=cpu,
    )
    return {"log": trainer.state.log_history}


def evaluate(
    tick: Tick,
    folder: Path,
    needs: Needs,
    *,
    seed: int,
    task: str,
    config: dict,
    evaluation: dict,
    model: dict,
    max_new_tokens: int,
    generate_batch: int,
    cpu: bool,
) -> dict[str, Any]:
    """Right completions of each held-out problem; the problems are the same for all, the sampling follows the seed."""
    wanted = Evaluation(**evaluation)
    (model_folder,) = needs.values()
    result = evaluate_model(
        _load(model_folder, Model(**model).dtype, cpu),
        load_tokenizer(str(model_folder)),
        test_problems(task, config, wanted),
        max(wanted.ks),
        wanted.samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        batch_size=generate_batch,
        progress=tick,
    )
    return {
        "samples": wanted.samples,
        "correct": [problem["correct"] for problem in result["problems"]],
        "mean_tokens": result["mean_tokens"],
        "finished": result["finished"],
        "example": result["problems"][0]["example"],
    }


def diagnose(
    tick: Tick,
    folder: Path,
    needs: Needs,
    *,
    seed: int,
    task: str,
    config: dict,
    evaluation: dict,
    model: dict,
    max_new_tokens: int,
    generate_batch: int,
    cpu: bool,
) -> dict[str, Any]:
    """How far SFT and RL moved the policy, and whether in one direction (see `movement`)."""
    dtype, role = Model(**model).dtype, _roles(needs)
    return movement(
        *(_load(role[name], dtype, cpu) for name in ("student", "sft", "rl")),
        load_tokenizer(str(role["student"])),
        test_problems(task, config, Evaluation(**evaluation)),
        max_new_tokens=max_new_tokens,
        batch_size=generate_batch,
        seed=seed,
        tick=tick,
    )


def test_problems(task: str, config: dict[str, Any], evaluation: Evaluation) -> list[Problem]:
    return load_task(task, "test", evaluation.problems, evaluation.seed, **config)


def _roles(needs: Needs) -> dict[str, Path]:
    """Folders by what is in them: "student", "traces", "sft", ..., the first part of a unit's name."""
    return {name.split("/")[0]: path for name, path in needs.items()}


def _load(name: str | Path, dtype: str, cpu: bool = True) -> PreTrainedModel:
    device = "cpu" if cpu or not torch.cuda.is_available() else "cuda"
    return load_model(str(name), dtype=getattr(torch, dtype)).to(device)


def _lora(how: Model):
    if not how.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=how.lora_rank, lora_alpha=2 * how.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _store(folder: Path, model: PreTrainedModel, tokenizer) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
