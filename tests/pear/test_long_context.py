"""`pear sft` on long rows: their length, packs, offloading, liger-kernel and small optimisers, each against without."""

import copy
import importlib.util
import json
import sys
import types

import pytest
import torch
import transformers
from peft import LoraConfig
from tiny import forbid_logits, make_model
from training import assert_close, batch_of, gradients, make_config
from trl.models import activation_offloading

from pear import long_context
from pear.fused_head import add_fused_head
from pear.io import DataError
from pear.long_context import OPTIMIZERS, check_optimizer, liger_config, prepare_device_options
from pear.score import score
from pear.scored import load_scored
from pear.sft import PEARSFTTrainer, main


@pytest.fixture(scope="module")
def scored(tokenizer, tmp_path_factory):
    """Twelve rows of several lengths."""
    folder = tmp_path_factory.mktemp("scored")
    rows = [
        {"prompt": f"What is {n} plus {n}? ", "completion": f"It is {2 * n}. " + "Let us think." * (n % 4)}
        for n in range(1, 13)
    ]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    behavior = make_model(tokenizer, seed=1)
    score(behavior, folder / "in.jsonl", folder / "scored.jsonl", tokenizer=tokenizer, progress=False)
    return folder / "scored.jsonl"


@pytest.fixture(scope="module")
def dataset(scored, tokenizer):
    return load_scored(scored, tokenizer)


@pytest.fixture
def make_trainer(tokenizer, dataset, tmp_path):
    def make(model=None, **kwargs) -> PEARSFTTrainer:
        others = {name: kwargs.pop(name) for name in ("teacher", "peft_config", "eval_dataset") if name in kwargs}
        model = make_model(tokenizer) if model is None else model
        defaults = {"max_length": 128 if kwargs.get("packing") else None}
        args = make_config(tmp_path / "run", **defaults | kwargs)
        return PEARSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer, **others)

    return make


def longest(dataset) -> int:
    return max(map(len, dataset["input_ids"]))


# ---------------------------------------------------------------------------------------------------------------------
# Packs


@pytest.mark.parametrize("layout", ["packing", "padding_free"])
def test_a_model_that_cannot_pack_is_refused_and_trains_padded(tokenizer, make_trainer, layout):
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    model = transformers.FalconForCausalLM(config)
    with pytest.raises(DataError, match="FalconForCausalLM.*rows are padded then"):
        make_trainer(model, **{layout: True})
    assert make_trainer(model).train().training_loss > 0


def test_a_teacher_that_cannot_pack_is_refused(tokenizer, make_trainer):
    config = transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=len(tokenizer)
    )
    with pytest.raises(DataError, match="teacher FalconForCausalLM"):
        make_trainer(teacher=transformers.FalconForCausalLM(config), distill="forward", packing=True)


# ---------------------------------------------------------------------------------------------------------------------
# Rows longer than the model's positions


def test_a_row_beyond_the_models_positions_is_an_error(tokenizer, dataset, make_trainer):
    """Of the training data, of the evaluation's, for the teacher; not of one that max_length leaves out."""
    n = longest(dataset)

    def short(positions=n - 1):
        model = make_model(tokenizer)
        model.config.max_position_embeddings = positions
        return model

    with pytest.raises(
        DataError, match=rf"train dataset: a row of {n} tokens, but the model has positions for {n - 1}"
    ):
        make_trainer(short())
    rows = dataset.filter(lambda ids: len(ids) < n, input_columns="input_ids")
    trainer = make_trainer(short(), max_length=n - 1, drop_long_rows=True)
    assert longest(trainer.train_dataset) < n
    make_trainer(short(n))
    with pytest.raises(DataError, match=rf"eval dataset: a row of {n} tokens"):
        args = make_config(trainer.args.output_dir, max_length=None)
        PEARSFTTrainer(short(), args, train_dataset=rows, eval_dataset=dataset, processing_class=tokenizer)
    with pytest.raises(DataError, match=rf"a row of {n} tokens, but the teacher has positions for {n - 1}"):
        make_trainer(teacher=short(), distill="forward")


def test_a_pack_may_be_longer_than_the_models_positions(tokenizer, dataset, make_trainer):
    """And its loss is that of a model with positions for all of it."""
    n = longest(dataset)
    losses = []
    for positions in (n, 4096):
        model = make_model(tokenizer)
        model.config.max_position_embeddings = positions
        trainer = make_trainer(model, packing=True, max_length=3 * n)
        assert longest(trainer.train_dataset) > n
        losses.append(trainer.train().training_loss)
    assert losses[0] == losses[1]


def test_rope_scaling_makes_room(tokenizer, dataset, make_trainer):
    n = longest(dataset)
    model = make_model(tokenizer)
    model.config.max_position_embeddings = n // 2 + 1
    model.config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": n // 2 + 1
    }  # fmt: skip
    make_trainer(model)


def test_the_commands_say_so_before_any_weights_are_read(tokenizer, scored, dataset, save_model, tmp_path):
    n = longest(dataset)
    folder = save_model()
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": n - 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    arguments = ["--model", str(folder), "--data", str(scored), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(DataError, match=f"1 of 12 rows are longer than max_length = {n - 1} tokens .*--drop_long_rows"):
        main([*arguments, "--report_to", "none"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(DataError, match=f"max_length = {n}.*positions for {n - 1}"):
        score(str(folder), scored, tmp_path / "out.jsonl", max_length=n, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpointing and offloading


class OnTheCPU(activation_offloading.OffloadActivations):
    """TRL's offloading with this machine's memory for the accelerator's; `shapes` of what it moved."""

    def __init__(self, model):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            super().__init__(use_pin_memory=False, use_streams=False, min_offload_size=1)
        self.device_module = types.SimpleNamespace(
            stream=torch.cpu.stream, current_stream=torch.cpu.current_stream, empty_cache=lambda: None
        )
        self.update_model_params(model)
        self.shapes: list[tuple[int, ...]] = []
        pack = self.pack_hook

        def counted(tensor):
            key = pack(tensor)
            if self.tracker[key][1]:
                self.shapes.append(tuple(tensor.shape))
            return key

        self.pack_hook = counted


@pytest.mark.parametrize("layout", ["padded", "packing", "lora"])
def test_checkpointing_and_offloading_change_no_bit(make_trainer, layout):
    """Loss and every gradient, beside a step that keeps all activations; the head's gradients stay where they are."""
    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if layout == "lora" else None
    found = {}
    for name in ("kept", "checkpointed", "checkpointed, offloaded", "offloaded", "offloaded, head too"):
        torch.manual_seed(3)  # of the adapter
        trainer = make_trainer(
            gradient_checkpointing="checkpointed" in name, packing=layout == "packing", peft_config=adapter
        )
        model = trainer.model
        base = model.get_base_model() if layout == "lora" else model
        if "checkpointed" in name:  # as Trainer.train() does
            model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        if "offloaded" in name:
            trainer.maybe_activation_offload_context = OnTheCPU(model)
            add_fused_head(base, offloaded="head" not in name)
        model.train()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(model, batch_of(trainer, range(1 if layout == "packing" else 4)))
        found[name] = loss, gradients(model)
        if "offloaded" in name:
            shapes = trainer.maybe_activation_offload_context.shapes
            head_moved = tuple(base.get_output_embeddings().weight.shape) in shapes
            assert shapes and head_moved == ("head" in name and layout != "lora")  # LoRA's head has no gradient
    kept_loss, kept = found["kept"]
    assert kept_loss > 0 and kept
    for name, (loss, others) in found.items():
        assert torch.equal(loss, kept_loss), name
        assert others.keys() == kept.keys() and all(torch.equal(others[key], kept[key]) for key in kept), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_offloading_changes_no_bit(make_trainer):
    found = [
        make_trainer(gradient_checkpointing=True, activation_offloading=offloaded, max_steps=2, bf16=False)
        for offloaded in (False, True)
    ]
    for trainer in found:
        trainer.train()
    kept, offloaded = (dict(trainer.model.named_parameters()) for trainer in found)
    assert all(torch.equal(kept[name], offloaded[name]) for name in kept)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_offloading_and_liger_are_left_out(make_trainer, caplog):
    trainer = make_trainer(activation_offloading=True, use_liger_kernel=True)
    assert "activation_offloading is left out" in caplog.text and "use_liger_kernel is left out" in caplog.text
    assert not trainer.args.activation_offloading and not trainer.args.use_liger_kernel
    assert trainer.train().training_loss == make_trainer().train().training_loss


# ---------------------------------------------------------------------------------------------------------------------
# liger-kernel


class Scaled(torch.nn.Module):
    """Stands for a norm of liger-kernel's: the same numbers, and it counts its calls."""

    calls = 0

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        Scaled.calls += 1
        return self.norm(x)


def patch_like_liger(model, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=True):
    """What `_apply_liger_kernel_to_instance` does to an instance, with its defaults."""
    if fused_linear_cross_entropy:
        model.forward = types.MethodType(lambda *_, **__: pytest.fail("liger-kernel's forward was called"), model)
    assert not cross_entropy
    if rms_norm:
        model.model.norm = Scaled(model.model.norm)


@pytest.fixture
def liger(monkeypatch):
    """A stand-in package, on a machine that is taken for one with an accelerator."""
    package, module = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    package.__spec__ = importlib.util.spec_from_loader("liger_kernel", None)
    module._apply_liger_kernel_to_instance = patch_like_liger
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "is_liger_kernel_available", lambda: True, raising=False)
    monkeypatch.setattr(long_context, "has_accelerator", lambda args: True)


@pytest.mark.filterwarnings("ignore:.*use_liger_kernel=True. is deprecated")
def test_liger_replaces_the_trunk_and_not_our_head(tokenizer, make_trainer, liger):
    Scaled.calls = 0
    trainer, plain = make_trainer(use_liger_kernel=True), make_trainer()
    forbid_logits(trainer.model)
    losses = [each.train().training_loss for each in (trainer, plain)]
    assert Scaled.calls > 0 and losses[0] == losses[1]
    assert trainer.args.liger_kernel_config == {"cross_entropy": False, "fused_linear_cross_entropy": False}


@pytest.mark.parametrize("name", ["cross_entropy", "fused_linear_cross_entropy"])
def test_a_loss_of_ligers_is_refused(tokenizer, make_trainer, liger, name):
    with pytest.raises(DataError, match=f"liger_kernel_config: {name} does not go with"):
        make_trainer(use_liger_kernel=True, liger_kernel_config={name: True})


def test_ligers_own_patch_leaves_our_forward(tokenizer, monkeypatch):
    """The package itself, if it is there: its patch of a model with our options, kernels not run."""
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed", exc_type=ImportError)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    llama = transformers.models.llama.modeling_llama
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # replaced for every model to come; put back
        monkeypatch.setattr(llama, name, getattr(llama, name))
    model = make_model(tokenizer)
    add_fused_head(model)
    forward = model.forward
    loss = torch.nn.functional.cross_entropy
    _apply_liger_kernel_to_instance(model=model, **liger_config(None))
    assert model.forward == forward and torch.nn.functional.cross_entropy is loss
    assert "Liger" in str(model.model.norm.forward) or "liger" in model.model.norm.forward.__module__


def test_liger_that_is_not_installed_is_said_before_a_model_is_loaded(make_trainer, monkeypatch):
    monkeypatch.setattr(long_context, "has_accelerator", lambda args: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    args = types.SimpleNamespace(use_liger_kernel=True, activation_offloading=False, liger_kernel_config=None)
    with pytest.raises(DataError, match=r"liger-kernel.*pip install 'pear-kernels\[liger\]'"):
        prepare_device_options(args)


# ---------------------------------------------------------------------------------------------------------------------
# Optimisers


@pytest.mark.parametrize("package", OPTIMIZERS)
def test_an_optimizer_whose_package_is_missing_is_said_at_once(monkeypatch, scored, tmp_path, package):
    """By `pear sft`, of a model that is not even looked for; the extra is one of ours."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    for name in OPTIMIZERS[package]:
        with pytest.raises(DataError, match=rf"optim = '{name}'.*pip install 'pear-kernels\[{package}\]'"):
            check_optimizer(name)
    with pytest.raises(DataError, match="optim_args must be name=value,name=value, got 'a=1,b'"):
        check_optimizer("adafactor", "a=1,b")
    with pytest.raises(DataError, match=rf"optim.*{package}"):
        main(
            ["--model", "./no", "--data", str(scored), "--output_dir", str(tmp_path), "--optim", OPTIMIZERS[package][0]]
        )


def test_bitsandbytes_that_a_model_needs_is_said_before_it_is_loaded(monkeypatch, scored, save_model, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "bitsand" in name else find(name, *a))
    folder = save_model()
    arguments = ["--model", str(folder), "--data", str(scored), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(DataError, match=r"load_in_4bit.*pip install 'pear-kernels\[bitsandbytes\]'"):
        main([*arguments, "--load_in_4bit", "true"])
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"quantised by bitsandbytes.*pip install 'pear-kernels\[bitsandbytes\]'"):
        main(arguments)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_head_is_refused_before_it_is_loaded(tokenizer, scored, tmp_path):
    make_model(tokenizer).base_model.save_pretrained(tmp_path / "trunk")
    tokenizer.save_pretrained(tmp_path / "trunk")
    arguments = ["--model", str(tmp_path / "trunk"), "--data", str(scored), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(DataError, match="is a LlamaModel.*no head that predicts tokens"):
        main(arguments)
    assert not (tmp_path / "run").exists()


def test_the_names_are_those_that_transformers_asks_these_packages_for():
    from transformers import trainer_optimizer as theirs

    assert set(OPTIMIZERS["bitsandbytes"]) == {str(n.value) for n in theirs._BITSANDBYTES_OPTIMIZERS}
    assert set(OPTIMIZERS["torchao"]) == {str(n.value) for n in theirs._TORCHAO_OPTIMIZERS}


@pytest.mark.parametrize("package, name", [("bitsandbytes", "adamw_8bit"), ("torchao", "adamw_torch_8bit")])
def test_a_step_with_small_states_is_near_adamws(tokenizer, make_trainer, package, name):
    pytest.importorskip(package, reason=f"{package} is not installed")
    start = make_model(tokenizer)
    found = {}
    for optim in ("adamw_torch", name):
        trainer = make_trainer(copy.deepcopy(start), optim=optim, max_steps=3)
        trainer.train()
        before = dict(start.named_parameters())
        moved = {key: p.detach() - before[key] for key, p in trainer.model.named_parameters()}
        found[optim] = {key: x for key, x in moved.items() if x.norm() > 0}
    assert_close(found[name], found["adamw_torch"], 0.2)
