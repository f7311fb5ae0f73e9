"""Run twice at once by test_distributed.py, as two processes of one job on a CPU; the argument is a folder."""

import json
import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer

BATCH, LENGTH, STEPS = 8, 12, 2
SHARDED = ((False, False), (True, False), (False, True))  # a tied head, a distilled loss
OBJECTIVES = {  # of `pear sft`, that log what is not averaged like the rest: a maximum, and means of wrong answers
    "iw-sft": {"weighting": "iw-sft", "iw_tau": 3.0},
    "negatives": {"negatives": True, "logprob_floor": -6.0},
    "distill": {"distill": "js"},
    "tolerance": {"weighting": "none", "gradient_tolerance": 0.05},
    "mixed": {"center": True},  # rows of several tokenizers and of nobody, in batches that may have none of a kind
}


def options(world: int) -> dict:
    """One optimiser step of BATCH rows, whatever the number of processes."""
    return dict(
        max_length=128, per_device_train_batch_size=BATCH // world // 2, gradient_accumulation_steps=2,
        max_steps=STEPS, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, optim="sgd",
        learning_rate=1e-2, max_grad_norm=0.0, lr_scheduler_type="constant", disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 300, (2, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.arange(LENGTH) < 4, -100)
    return {"input_ids": ids, "labels": labels, "behavior_logprobs": -3 * torch.rand(2, LENGTH, generator=generator)}


def loss_options(distilled: bool, vocabulary: int, rows: slice = slice(None)) -> dict:
    """Of `fused_head`: PEAR's, or a divergence from a teacher's hidden states of these rows of `batch`."""
    if not distilled:
        return {}
    from pear_kernels import Teacher

    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(2, LENGTH, 16, generator=generator)[rows]
    return {"divergence": "js", "teacher": Teacher(hidden, torch.randn(vocabulary, 16, generator=generator))}


def sharded(folder: Path) -> None:
    """FSDP2: each process one row of the batch; the gradients, gathered, must be those of the whole batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from pear.fused_head import add_fused_head

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for tied, distilled in SHARDED:
        model = make_model(make_tokenizer(), tied=tied).train()
        add_fused_head(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        rows = slice(dist.get_rank(), dist.get_rank() + 1)
        row = {name: x[rows] for name, x in batch().items()}
        tokens = (batch()["labels"] != -100).sum()
        divisor = tokens / dist.get_world_size()  # FSDP averages over processes
        more = loss_options(distilled, model.config.vocab_size, rows)
        output = model(**row, pear={"denominator": divisor, **more})
        output.loss.backward()
        gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        if dist.get_rank() == 0:
            torch.save(
                {"loss": loss / dist.get_world_size(), "gradients": gradients}, folder / f"tied-{tied}-{distilled}.pt"
            )


def trainer(folder: Path) -> None:
    from pear.scored import load_scored
    from pear.sft import PEARSFTTrainer
    from pear.sft_config import PEARSFTConfig

    tokenizer = make_tokenizer()
    data = load_scored(folder / "scored.jsonl", tokenizer)
    config = PEARSFTConfig(str(folder / "run"), **options(world=2))
    run = PEARSFTTrainer(make_model(tokenizer), config, train_dataset=data, processing_class=tokenizer)
    run.train()
    if run.accelerator.is_main_process:
        torch.save(run.model.state_dict(), folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(run.state.log_history))


def objective_trainer(folder: Path, name: str, world: int):
    from pear.scored import load_scored
    from pear.sft import PEARSFTTrainer
    from pear.sft_config import PEARSFTConfig

    tokenizer = make_tokenizer()
    config = PEARSFTConfig(str(folder / f"{name}-{world}"), **options(world), **OBJECTIVES[name])
    teacher = make_model(tokenizer, kind="qwen2", seed=2) if name == "distill" else None
    if name == "mixed":
        data = load_scored(folder / "mixed.jsonl", tokenizer, options=config.pear_options())
    else:
        data = load_scored(folder / "objectives.jsonl", tokenizer, columns=("sequence_label", "ref_logprobs"))
    if name in ("iw-sft", "distill", "tolerance"):
        data = data.remove_columns("sequence_label")
    return PEARSFTTrainer(
        make_model(tokenizer), config, teacher=teacher, train_dataset=data, processing_class=tokenizer
    )


def objectives(folder: Path) -> None:
    for name in OBJECTIVES:
        run = objective_trainer(folder, name, world=2)
        run.train()
        if run.accelerator.is_main_process:
            torch.save(run.model.state_dict(), folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps(run.state.log_history))


def rl_trainer(folder: Path, world: int):
    """GRPO whose completions and rewards are functions of the prompt and of a row's place in its group of BATCH.

    A group is one optimiser step's rows, drawn half by each of two processes, and used twice.
    """
    from datasets import Dataset

    from pear.rl import PEARGRPOTrainer
    from pear.rl_config import PEARGRPOConfig

    tokenizer = make_tokenizer()

    def rollouts(prompts, trainer):
        completions = []
        for i, prompt in enumerate(prompts):
            place = i + len(prompts) * trainer.accelerator.process_index
            generator = torch.Generator().manual_seed(100 * sum(map(ord, prompt)) + place)
            ids = torch.randint(5, 300, (1 + (7 * place) % 6,), generator=generator).tolist()
            completions.append(ids if place % 3 == 0 else [*ids, tokenizer.eos_token_id])
        completions[0] = completions[0] if trainer.accelerator.process_index else []
        return {
            "prompt_ids": [tokenizer(p)["input_ids"] for p in prompts],
            "completion_ids": completions,
            "logprobs": None,
        }

    def reward(prompts, completions, completion_ids, **_):
        return [math.nan if sum(ids) % 5 == 0 else (sum(ids) % 7) / 7 for ids in completion_ids]

    config = PEARGRPOConfig(
        str(folder / f"rl-{world}"), per_device_train_batch_size=BATCH // world // 2, gradient_accumulation_steps=2,
        num_generations=BATCH, num_iterations=2, max_completion_length=8, max_steps=2 * STEPS, logging_steps=1,
        save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, optim="sgd", learning_rate=1e-2,
        max_grad_norm=0.0, lr_scheduler_type="constant", disable_tqdm=True, dataloader_pin_memory=False,
        gradient_checkpointing=False, loss_type="dapo", keep_samples=4,
    )  # fmt: skip
    return PEARGRPOTrainer(
        make_model(tokenizer),
        reward,
        config,
        train_dataset=Dataset.from_dict({"prompt": [f"What is {n} plus {n * n}?" for n in range(8)]}),
        processing_class=tokenizer,
        rollout_func=rollouts,
    )


def reinforced(folder: Path) -> None:
    """The run, and once more from the middle of its second generation."""
    run = rl_trainer(folder, world=2)
    run.train()
    resumed = rl_trainer(folder, world=2)
    resumed.train(resume_from_checkpoint=str(folder / "rl-2" / "checkpoint-3"))
    if run.accelerator.is_main_process:
        torch.save([run.model.state_dict(), resumed.model.state_dict()], folder / "rl-weights.pt")
        (folder / "rl-log.json").write_text(json.dumps([run.state.log_history, resumed.state.log_history]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    sharded(Path(sys.argv[1]))
    trainer(Path(sys.argv[1]))
    objectives(Path(sys.argv[1]))
    reinforced(Path(sys.argv[1]))
    dist.destroy_process_group()
