"""What was trained is never lost: saving, what fails around it, a second run in one folder, resume, upload."""

import errno
import json
import os
import pickle
import shutil
import signal
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from tiny import make_model
from training import make_config
from transformers import AutoModelForCausalLM, TrainerCallback

import pear.save
from pear.adapters import MergeError, logits
from pear.appending import output_folder
from pear.checkpoints import repair_generation_config
from pear.io import DataError, WriteError
from pear.models import load_model
from pear.runs import read_run
from pear.save import Extras, evaluate_saved, save_final, train
from pear.score import score
from pear.scored import load_scored
from pear.sft import PEARSFTTrainer, main

LORA = "--use_peft --lora_r 4 --lora_target_modules q_proj embed_tokens --learning_rate 0.05".split()


@pytest.fixture(scope="module")
def student(save_model):
    return save_model(seed=0, tied=True)


@pytest.fixture(scope="module")
def scored(tokenizer, student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    rows = [{"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}."} for n in range(1, 9)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score(str(student), folder / "in.jsonl", folder / "scored.jsonl", progress=False)
    return folder / "scored.jsonl"


def argv(folder, scored, out, *more) -> list[str]:
    flags = (
        f"--model {folder} --data {scored} --output_dir {out} --max_steps 2 --report_to none --logging_steps 1 "
        "--per_device_train_batch_size 2 --disable_tqdm true --save_strategy no --dataloader_pin_memory false"
    )
    return [*flags.split(), *more]


@pytest.fixture
def make_trainer(tokenizer, scored, tmp_path):
    def make(model=None, **kwargs) -> PEARSFTTrainer:
        return PEARSFTTrainer(
            make_model(tokenizer) if model is None else model,
            make_config(tmp_path / "run", **kwargs),
            train_dataset=load_scored(scored, tokenizer),
            eval_dataset=load_scored(scored, tokenizer),
            processing_class=tokenizer,
        )

    return make


def same(folder, model) -> None:
    torch.testing.assert_close(logits(load_model(str(folder))), logits(model), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What can be checked before training


@pytest.mark.parametrize(
    "given, left, said",
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"temperature": 0.9, "top_p": 0.6, "do_sample": True}, "do_sample is set"),
        ({"temperature": 0.0}, {"temperature": None}, "temperature = 0.0 has no effect"),
        ({"num_beams": 1, "length_penalty": 2.0, "top_k": 9}, {"top_k": 9, "do_sample": True}, "length_penalty = 2.0"),
        ({"output_scores": True}, {"output_scores": None}, "output_scores = True has no effect"),
        ({"temperature": 0.9, "do_sample": True}, {"temperature": 0.9, "do_sample": True}, ""),
    ],
)
def test_a_generation_config_is_made_one_that_can_be_saved(model, tmp_path, caplog, given, left, said):
    for name, value in given.items():
        setattr(model.generation_config, name, value)
    repair_generation_config(model)
    model.generation_config.pad_token_id = 5  # as the trainer does
    model.generation_config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / "generation_config.json").read_text())
    assert {name: found.get(name) for name in left} == left
    assert said in caplog.text and bool(caplog.text) == bool(said)


def test_what_cannot_be_repaired_is_refused_before_training(make_trainer, monkeypatch):
    trainer = make_trainer()
    trainer.model.generation_config.num_return_sequences = 2
    with pytest.raises(
        DataError, match=r"generation_config\.json of the model cannot be saved again: .*num_return_seq"
    ):
        trainer.train()
    trainer.model.generation_config.num_return_sequences = 1
    monkeypatch.setattr(type(trainer.model.config), "save_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(DataError, match="the model's config cannot be saved, .*: ZeroDivisionError"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_model_without_a_parameter_to_train_is_refused(make_trainer):
    trainer = make_trainer()
    trainer.model.requires_grad_(False)
    with pytest.raises(DataError, match="no parameter of the model is to be trained"):
        trainer.train()


def test_a_number_in_a_string_is_refused(model):
    model.generation_config.temperature = "0.7"
    with pytest.raises(DataError, match="generation_config.json of the model: temperature must be a number, got '0.7'"):
        repair_generation_config(model)


def test_adapter_options_name_modules_as_they_are_called(student, scored, tmp_path):
    """One name means what each of several means; what PEFT and TRL refuse is one line."""
    line = argv(student, scored, tmp_path / "out", "--use_peft", "--save_strategy", "no", "--lora_target_modules")
    trainer = main([*line, "q_proj"])
    assert {name.split(".")[-3] for name, p in trainer.model.named_parameters() if "lora" in name} <= {"q_proj"}
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    for modules, said in (("lm_head", "adapter to `lm_head` is not supported"), ("nothing", "nothing.* not found")):
        with pytest.raises(DataError, match=said):
            main([*line, modules, "--overwrite_output_dir"])


def test_a_tracker_that_is_not_there_and_a_held_folder_stop_before_the_model(tmp_path):
    line = argv("no/model", "none.jsonl", tmp_path / "out", "--report_to")
    with pytest.raises(DataError, match="report_to: no tracker 'wandbb'; known are none, all, .*wandb"):
        main([*line, "wandbb"])
    with pytest.raises(DataError, match="report_to: neptune is not installed: pip install neptune"):
        main([*line, "neptune"])
    with pytest.raises(DataError, match="hub_strategy = 'checkpoint': the finished model alone is uploaded"):
        main([*line, "none", "--push_to_hub", "--hub_strategy", "checkpoint"])
    assert os.listdir(tmp_path) == []
    with output_folder(tmp_path / "out"), pytest.raises(DataError, match="output_dir: another run is at work in"):
        main([*line, "none"])
    for name, said in (("", "output_dir is empty"), ("n" * 300, "too long")):
        with pytest.raises((DataError, WriteError), match=said):
            main([*line, "none", "--output_dir", name])
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="output_dir: .*out is a file; give a folder to write to"):
        main([*line, "none"])


# ---------------------------------------------------------------------------------------------------------------------
# What fails later


def test_a_merged_folder_is_the_trained_model_with_adapters_on_one_of_two_tied_modules(student, scored, tmp_path):
    main(argv(student, scored, tmp_path / "out", *LORA))
    start = load_model(str(student))
    before = logits(start)
    from peft import PeftModel

    trained = logits(PeftModel.from_pretrained(start, tmp_path / "out" / "adapter"))
    written = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (trained - before).abs().max() > 0.1
    torch.testing.assert_close(written, trained, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_cannot_be_merged_is_the_result_and_trains_on(student, scored, tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise MergeError("no such form")

    monkeypatch.setattr(pear.save, "merge", refuse)
    trainer = main(argv(student, scored, tmp_path / "out", *LORA))
    assert "The adapter stays unmerged in" in caplog.text and "no such form" in caplog.text
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "adapter").exists()
    same(tmp_path / "out", trainer.model)
    monkeypatch.undo()
    trainer = main(argv(tmp_path / "out", scored, tmp_path / "again"))  # a folder that holds an adapter alone
    same(tmp_path / "again", trainer.model)
    line = argv(tmp_path / "out", scored, tmp_path / "second", *LORA, "--no_merge_adapter")
    same(tmp_path / "second", main(line).model)  # an adapter of an adapter folder


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("error", [ValueError("not so"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_weights(student, scored, tmp_path, monkeypatch, lora, error):
    def fail(self, *args, **kwargs):
        raise error

    kind = type(load_model(str(student)))
    seen = []
    original = pear.save.save_final
    monkeypatch.setattr("pear.sft.save_final", lambda trainer, **kw: (seen.append(trainer), original(trainer, **kw)))
    monkeypatch.setattr(kind, "save_pretrained", fail)
    if isinstance(error, ValueError):
        message = r"could not be saved to .*out \(ValueError: not so\)\. The trained weights are whole in .*/rescued"
        expected = pytest.raises(WriteError, match=message)
    else:
        expected = pytest.raises(KeyboardInterrupt)
    with expected:
        main(argv(student, scored, tmp_path / "out", *(LORA if lora else [])))
    same(tmp_path / "out" / "rescued", seen[0].model)
    assert set(os.listdir(tmp_path / "out")) <= {"rescued", "log.jsonl"}


@pytest.mark.parametrize("writes", ["moving in", "saving"])
def test_a_folder_that_refuses_a_file_leaves_the_weights(make_trainer, tmp_path, monkeypatch, writes):
    trainer, replace = make_trainer(), os.replace

    def refuse(*args, **kwargs):
        if writes == "saving" or Path(args[1]).name == "tokenizer.json":  # others are in their place by then
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        replace(*args)

    if writes == "saving":
        monkeypatch.setattr(type(trainer.model), "save_pretrained", refuse)
    else:
        monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match="Permission denied.* The model, whole, is in .*rescued"):
        save_final(trainer)
    same(tmp_path / "run" / "rescued", trainer.model)


def test_ctrl_c_waits_for_the_model(make_trainer, monkeypatch, tmp_path):
    trainer = make_trainer()
    original = type(trainer.model).save_pretrained

    def interrupted(self, *args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(trainer.model), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_final(trainer)
    same(tmp_path / "run", trainer.model)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_that_fails_between_checkpoints_leaves_the_weights(make_trainer, tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyError("a reward function's")

    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    trainer.add_callback(Fails())
    with pytest.raises(KeyError) as error:
        train(trainer, None)
    assert "after step 3" in error.value.__notes__[0] and f"{tmp_path}/run/rescued" in error.value.__notes__[0]
    same(tmp_path / "run" / "rescued", trainer.model)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_what_follows_the_save_is_tried_and_told_at_the_end(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer()
    saved = save_final(trainer)
    monkeypatch.setattr(trainer, "evaluate", lambda: 1 / 0)
    extras = Extras(trainer.args.output_dir, alone=True)
    with extras("the evaluation"):
        evaluate_saved(trainer, saved)
    with extras("writing run.json"):
        raise OSError("no space")
    message = (
        r"whole in .*run, but the evaluation failed \(ZeroDivisionError: .*; writing run.json failed \(OSError: no"
    )
    with pytest.raises(WriteError, match=message):
        extras.close()
    same(tmp_path / "run", trainer.model)


# ---------------------------------------------------------------------------------------------------------------------
# Upload


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for a repository: what HfApi.upload_folder would put there."""
    there = tmp_path / "hub"

    class Url(str):
        repo_id = "me/model"

    def upload(self, *, folder_path, allow_patterns=None, ignore_patterns=None, **kwargs):
        names = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, there / name)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: Url("https://hub/me/model"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return there


def test_the_finished_folder_is_uploaded_and_nothing_else(student, scored, tmp_path, hub):
    out = tmp_path / "out"
    more = [*LORA, "--push_to_hub", "--save_strategy", "steps", "--save_steps", "1"]
    trainer = main(argv(student, scored, out, *more))
    found = {str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    model |= {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "run.json", "README.md"}
    assert model <= found and not any("checkpoint" in name or name.endswith((".bin", ".pt", ".lock")) for name in found)
    same(hub, trainer.model)
    assert (out / "checkpoint-2").is_dir()


def test_an_upload_that_fails_leaves_the_folder_and_the_command(student, scored, tmp_path, hub, monkeypatch):
    def fail(self, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(WriteError, match="whole in .*out, but the upload failed .*no route; .*hf upload me/model"):
        main(argv(student, scored, tmp_path / "out", "--push_to_hub"))
    assert read_run(tmp_path / "out").kind == "sft"
    load_model(str(tmp_path / "out"))


# ---------------------------------------------------------------------------------------------------------------------
# A folder is one run's


def test_a_folder_is_one_run_s(student, scored, tmp_path, save_model, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("no run's")
    steps = "--save_strategy steps --save_steps 1 --lr_scheduler_type constant".split()
    line = argv(student, scored, out, *steps)
    main(line)
    weights = (out / "model.safetensors").read_bytes()
    with pytest.raises(DataError, match="output_dir: .*out holds the model of an earlier run. .*--overwrite_output"):
        main(line)
    again = [*line, "--resume_from_checkpoint"]  # alone, as with "true"
    other = tmp_path / "other.jsonl"
    other.write_text("".join(Path(scored).read_text().splitlines(keepends=True)[:-1]))
    differ = {
        "learning_rate is 2e-05 there, 0.5 now": ["--learning_rate", "0.5"],
        "gradient_tolerance is 0.0 there, 0.01 now": ["--gradient_tolerance", "0.01"],
        'level is "token" there, "sequence" now': ["--level", "sequence"],
        "rows of a step is 2 there, 4 now": ["--gradient_accumulation_steps", "2"],
        "its data is ": ["--data", str(other)],
        "its model is ": ["--model", str(save_model(seed=1, tied=True))],
        "use_peft is false there, true now": ["--use_peft"],
        "seed is 42 there, 3 now": ["--seed", "3"],
        r"log_ratio_clip is \[-0.08, 0.3\] there, \[-1.0, 1.0\] now": ["--log_ratio_clip", "-1", "1"],
    }
    for message, flags in differ.items():
        with pytest.raises(DataError, match=f"checkpoint-2 is of another run: .*{message}"):
            main([*again, *flags])
    caplog.clear()
    main(again)  # nothing is left to do
    assert (out / "model.safetensors").read_bytes() == weights
    free = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_steps", "3"]
    trainer = main([*again, "--max_steps", "3", *free])
    assert trainer.state.global_step == 3 and "not checked" not in caplog.text and "no step is left" in caplog.text
    (out / "checkpoint-3" / "pear.json").unlink()
    main([*again, "--max_steps", "3"])
    assert "checkpoint-3 has no pear.json" in caplog.text
    (out / "eval").mkdir()
    (out / "eval" / "after.json").write_text("{}")  # of the run that goes
    once = argv(student, scored, tmp_path / "once", "--save_strategy", "no")
    main(once)
    made = (tmp_path / "once" / "model.safetensors").read_bytes()
    for flags in ("--max_steps 1", "--gamma 0.9", "--seed 3"):
        with pytest.raises(DataError, match="holds the model of an earlier run"):
            main([*once, *flags.split()])
    main([*once, "--per_device_eval_batch_size", "3"])  # the same run once more
    assert (tmp_path / "once" / "model.safetensors").read_bytes() == made
    main([*line, "--overwrite_output_dir", "--max_steps", "1", "--seed", "3"])
    assert not (out / "eval" / "after.json").exists()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"] and (out / "notes.txt").is_file()


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_poisoned_checkpoint_is_a_sentence(make_trainer, tmp_path, name):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for content in (pickle.dumps(Attack(tmp_path / "ran")), b"PK\3\4 torn"):
        (checkpoint / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"resume_from_checkpoint: the state of the .* in {checkpoint} cannot be"):
            trainer.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "ran").exists()
