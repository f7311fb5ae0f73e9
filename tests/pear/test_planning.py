"""`pear plan` against what steps really take: resident memory, real optimizers, real autocast, real logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from bench.memory import measure_apart
from bench.shapes import SHAPES as BENCH_SHAPES
from pear import tracing
from pear.cli import app
from pear.io import DataError
from pear.planning import (
    LOSSES,
    OPTIMIZERS,
    USABLE,
    Setup,
    config_of,
    lines,
    naive_head_bytes,
    our_head_bytes,
    parse_gpu,
    plan,
    step_of,
)
from pear.shapes import SHAPES, shape_of

PUBLISHED = {  # parameters, as the hub counts them; of Gemma 3's larger ones it counts the images' part too
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "gemma-3-1b": 999_885_952,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}
PLAIN = Setup(bf16=False)
BF16 = Setup(dtype="bfloat16", bf16=False)


def make_config(kind: str = "qwen3", **changes):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16)
    sizes |= dict(num_key_value_heads=2, vocab_size=1000, max_position_embeddings=4096, tie_word_embeddings=False)
    return AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, **changes})


@pytest.fixture
def folder(tmp_path):
    make_config(vocab_size=30000).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# ---- against memory that was taken


@pytest.mark.slow
@pytest.mark.parametrize("case", ["cpu-small-4v", "cpu-4k"])
def test_head_takes_what_was_predicted(case):
    shape = BENCH_SHAPES[case]
    gradients = shape.gradient_bytes("both")
    measured = measure_apart(case, "naive-nll") + gradients
    assert naive_head_bytes(shape.tokens, shape.vocabulary) == pytest.approx(measured, rel=0.1)
    measured = measure_apart(case, "pear-token") + gradients
    predicted = our_head_bytes(shape.tokens, shape.vocabulary, shape.hidden, dtype=torch.float32, device="cpu")
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary, moment", [(500, "backward"), (16000, "head")])
def test_step_takes_what_was_predicted(tmp_path, vocabulary, moment):
    """As many heads of keys as of queries, and few: what a CPU's attention makes besides is not what a GPU's does.

    Every larger block is the system's own to take back (MALLOC_MMAP_THRESHOLD_), as it is not in malloc's heap.
    """
    sizes = dict(hidden_size=256, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=2, head_dim=32)
    config = make_config(**sizes, num_key_value_heads=2, vocab_size=vocabulary)
    config.save_pretrained(tmp_path)
    script = Path(__file__).with_name("step_memory.py")
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "2048"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    step = step_of(config, PLAIN)
    peak = step.peak("naive", 2048)
    assert peak.moment == moment
    assert peak.total - step.weights - step.states == pytest.approx(int(done.stdout), rel=0.1)


MEASURED = sorted((Path(__file__).parents[2] / "bench" / "results").glob("*/long_context.json"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen3-0.6b", "qwen3-4b"])
@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.parent.name)
def test_steps_of_a_gpu_took_what_is_predicted(path, model):
    rows = [row for row in json.loads(path.read_text())["rows"].values() if row["model"] == model and row["fits"]]
    for trunk in {row["trunk"] for row in rows}:
        step = step_of(config_of(model), BF16._replace(use_liger_kernel=trunk == "liger"))
        for row in rows:
            if row["trunk"] == trunk:
                loss = {"naive": "naive", "pear": "ours"}[row["head"]]
                assert step.peak(loss, row["tokens"]).total == pytest.approx(row["bytes"], rel=0.05), row


# ---- the trunk


def test_memory_is_a_line_over_the_tokens():
    model = tracing.model_without_data(make_config(), torch.bfloat16, checkpointing=True)
    held = tracing.trace(model)
    counted, forward = tracing._run(model, 5120, None)
    assert forward == held.head
    np.testing.assert_allclose(held.at(5120), counted, rtol=0, atol=1)


@pytest.mark.parametrize(
    "kind, checkpointing",
    [("qwen3", True), ("qwen3", False), ("gemma2", True), ("phi3", True), ("gpt_neox", False), ("qwen3_moe", True)],
)
def test_real_tensors_take_what_those_without_data_do(kind, checkpointing):
    """The same operations on a CPU, values and all, under the same counter."""
    more = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32) if kind == "qwen3_moe" else {}
    dtype = torch.bfloat16 if kind == "qwen3_moe" else torch.float32
    config = make_config(kind, **more)
    held = tracing.trace(tracing.model_without_data(config, dtype, checkpointing))
    counted, forward = counted_on_cpu(config, 256, checkpointing, dtype)
    assert forward == pytest.approx(held.head, abs=40)  # a mask, numbers of random states
    predicted, counted = held.at(256).sum(1), counted.sum(1)
    assert predicted[: held.head].max() == pytest.approx(counted[:forward].max(), rel=0.03)
    assert predicted[held.head :].max() == pytest.approx(counted[forward:].max(), rel=0.03)


def counted_on_cpu(config, tokens, checkpointing, dtype=torch.float32, autocast=False):
    """As `tracing._run`, with data; autocast is PyTorch's."""
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=tracing.ATTENTION)
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.train()
    counter = tracing._Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.ignore(tensor)
    with tracing._hooks(model, counter), counter:
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        forward = len(counter.rows)
        for parameter in model.get_output_embeddings().parameters():
            parameter.grad = torch.empty_like(parameter)
            counter.tag(parameter.grad, tracing.GRADIENTS)
        hidden.backward(torch.empty_like(hidden))
    return np.array(counter.rows, dtype=np.float64), forward


@pytest.mark.parametrize("checkpointing", [True, False])
def test_autocast_is_that_of_pytorch(checkpointing):
    config = make_config(hidden_size=128, intermediate_size=512)
    model = tracing.model_without_data(config, torch.float32, checkpointing)
    held = tracing.trace(model, autocast=torch.bfloat16)
    without = tracing.trace(model)
    counted, forward = counted_on_cpu(config, 1024, checkpointing, autocast=True)
    mine, plain = held.at(1024).sum(1), without.at(1024).sum(1)
    assert mine[held.head - 1] == pytest.approx(counted[forward - 1].sum(), rel=0.03)
    assert mine.max() == pytest.approx(counted.sum(1).max(), rel=0.03)
    assert abs(mine.max() / plain.max() - 1) > 0.1, "else the test could not tell"


# ---- the loss, and what a step has besides


@pytest.mark.parametrize("setup", [PLAIN, BF16])
def test_naive_head_is_what_the_models_own_loss_makes(setup):
    """transformers' forward with labels, on tensors without data, counted as the trunk is."""
    config = make_config(vocab_size=20000)
    step = step_of(config, setup)
    tokens, model = 1024, step.model
    counter = tracing._Counter()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.ignore(tensor)
    with counter:
        ids = torch.empty(1, tokens, dtype=torch.int64, device="meta")
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counted = np.array(counter.rows).sum(1).max()
    peak = step.peak("naive", tokens)
    assert peak.moment == "head"
    assert peak.total - step.weights - step.states == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_parameters(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert config_of(f"Qwen/{name.replace('qwen', 'Qwen').replace('b', 'B')}").to_dict() == config_of(name).to_dict()


def make_optimizer(name, parameters):
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters)
    if name in ("adamw_torch_8bit", "adamw_torch_4bit"):
        optim = pytest.importorskip("torchao.optim")
        return {"adamw_torch_8bit": optim.AdamW8bit, "adamw_torch_4bit": optim.AdamW4bit}[name](parameters)
    return torch.optim.SGD(parameters) if name == "sgd" else torch.optim.AdamW(parameters)


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd", "adamw_torch_8bit", "adamw_torch_4bit"])
def test_states_are_those_of_the_optimizer(name):
    parameters = [nn.Parameter(torch.randn(shape, dtype=torch.bfloat16)) for shape in ((96, 128), (3, 64, 32), (50,))]
    optimizer = make_optimizer(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    held = [getattr(state, field) for state in states for field in getattr(state, "tensor_attrs", ["data"])]
    taken = sum(tensor.nbytes for tensor in held if tensor.numel() > 1 and tensor.numel() not in (16, 256))
    assert sum(OPTIMIZERS[name](parameter, False) for parameter in parameters) == taken


def test_states_of_bitsandbytes_are_bytes_but_for_embeddings():
    of = OPTIMIZERS["adamw_8bit"]
    weight = torch.empty(1024, 1024, device="meta")
    assert of(weight, False) == 2 * 2**20 + 2 * 4 * 2**20 // 256
    assert of(weight, True) == 8 * 2**20
    step = step_of(make_config(tie_word_embeddings=True), BF16._replace(optim="adamw_8bit"))
    assert step.states > 8 * 1000 * 64, "the tied head is an embedding"


def test_lora_has_gradients_and_states_of_adapters_alone():
    modules = ("q_proj", "v_proj")
    step = step_of(make_config(), BF16._replace(use_peft=True, lora_r=8, lora_target_modules=modules))
    adapters = 3 * 8 * ((64 + 4 * 16) + (64 + 2 * 16))  # layers, rank, and in + out of both; PEFT holds them in float32
    assert step.gradients == 4 * adapters and step.states == 2 * step.gradients
    full = step_of(make_config(), BF16)
    assert step.weights == full.weights + 4 * adapters
    assert full.gradients == full.weights - sum(buffer.nbytes for buffer in full.model.buffers())
    big = make_config(vocab_size=30000)
    lora = step_of(big, BF16._replace(use_peft=True)).peak("ours", 512).parts["head"]
    assert lora == step_of(big, BF16).peak("ours", 512).parts["head"] - 4 * 30000 * 64, "a frozen head has no dW"


def test_offloading_keeps_six_hidden_states():
    config = make_config(num_hidden_layers=8)
    plain, moved = (
        step_of(config, BF16._replace(activation_offloading=on)).peak("ours", 65536) for on in (False, True)
    )
    one = 65536 * 64 * 2
    assert plain.parts["hidden states"] >= 7 * one and moved.parts["hidden states"] == 6 * one
    assert moved.total < plain.total


def test_accumulated_gradients_are_there_all_the_time():
    once, more = (step_of(make_config(), BF16._replace(gradient_accumulation_steps=n)) for n in (1, 4))
    for loss in LOSSES:
        assert more.peak(loss, 30000).parts["gradients"] == more.gradients
        assert once.peak(loss, 30000).parts["gradients"] < once.gradients


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("batch", [1, 4])
def test_longest_fits_and_one_more_does_not(loss, batch):
    step = step_of(make_config(), Setup())
    capacity = 200 << 20
    longest = step.longest(loss, capacity, batch)
    assert longest > 50
    assert step.peak(loss, longest * batch).total <= capacity < step.peak(loss, (longest + 1) * batch).total
    assert step.longest(loss, step.weights) == 0


# ---- the command


def test_plan_says_what_fits_and_why(folder):
    found = plan(folder, None, "0.5GB")
    assert found["capacity_bytes"] == int(USABLE * 2**29)
    naive, ours = found["losses"]["naive"], found["losses"]["ours"]
    assert naive["longest_context"] == naive["longest_context_by_memory"] < 4096 and naive["decided_by"] == "the head"
    assert ours["longest_context"] == 4096 < ours["longest_context_by_memory"]
    assert ours["decided_by"] == "the model's positions"
    assert naive["fits"] and sum(naive["parts"].values()) == naive["total_bytes"] <= found["capacity_bytes"]
    head = our_head_bytes(4096, 30000, 64, dtype=torch.bfloat16) + 2 * 64 * (30000 + 4096)  # and autocast's copies
    assert ours["head_bytes"] == head < naive["head_bytes"] == 12 * naive["longest_context"] * 30000
    stretched = plan(folder, None, "0.5GB", rope_factor=100)["losses"]["ours"]
    assert stretched["longest_context"] == ours["longest_context_by_memory"]
    assert stretched["decided_by"] in ("activations (backward)", "hidden states (backward)")
    at = plan(folder, 4000, "0.5GB")["losses"]
    assert not at["naive"]["fits"] and at["ours"]["fits"]


def test_scaled_rope_has_more_positions(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "rope_theta": 1e6}
    make_config(rope_parameters=rope).save_pretrained(tmp_path)
    assert plan(str(tmp_path), 16384, "80GB")["positions"] == 16384


@pytest.mark.parametrize(
    "options, said",
    [
        ({"context": 5000}, "context 5000 is longer than the model's 4096 positions .max_position_embeddings.*rope"),
        ({"context": 1}, "context must be 2 tokens or more"),
        ({"gpu": "80 apples"}, "gpu '80 apples' is neither an amount of memory .80GB, 79.6GiB, 24. nor a known card"),
        ({"gpu": "0GB"}, "is neither an amount of memory"),
        ({"rope_factor": 0.5}, "rope_factor must be 1 or more"),
        ({"setup": Setup(optim="sofia")}, "optim 'sofia' is not planned; those that are: adamw_torch_fused"),
        ({"setup": Setup(dtype="int8")}, "dtype must be one of float32, bfloat16, float16"),
        ({"setup": Setup(per_device_train_batch_size=0)}, "per_device_train_batch_size must be 1 or more"),
        ({"setup": Setup(gradient_checkpointing=False, activation_offloading=True)}, "is not planned"),
        ({"setup": Setup(use_liger_kernel=True), "kind": "gemma2"}, "use_liger_kernel is not planned for .*'gemma2'"),
        ({"setup": Setup(use_peft=True, lora_target_modules=("nothing",))}, "lora_target_modules: .*nothing"),
        ({"setup": Setup(use_peft=True, lora_target_modules=("lm_head",))}, "adapter on the LM head"),
        ({"setup": Setup(use_peft=True), "kind": "smollm3"}, "no modules .* of type 'smollm3': give .* all-linear"),
    ],
)
def test_what_cannot_be_planned_is_said(folder, options, said):
    options = dict(options)
    make_config(options.pop("kind", "qwen3")).save_pretrained(folder)
    with pytest.raises(DataError, match=said):
        plan(folder, **{"gpu": "24GB", **options})


def test_gpu_is_needed_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match="pass --gpu, such as --gpu 80GB"):
        parse_gpu(None)
    assert parse_gpu("80GB") == parse_gpu(" 80 gib ") == parse_gpu("80") == 80 * 2**30
    assert parse_gpu("79.5G") == 79.5 * 2**30 and parse_gpu("A100 40GB") == 40 * 2**30
    assert parse_gpu("h100") == parse_gpu("NVIDIA H100") == 81559 << 20 and parse_gpu("RTX 4090") == 24564 << 20
    assert parse_gpu("rtx4090") == parse_gpu("24564MiB") == 24564 << 20
    for wrong in ("0GB", "h900", "-3", "much"):
        with pytest.raises(DataError, match="neither an amount of memory .* nor a known card .*h200"):
            parse_gpu(wrong)


def test_where_nothing_fits_the_plan_says_what_would(folder):
    """float32 weights, gradients and AdamW's states are too much for the card; bfloat16 or LoRA are not."""
    step = step_of(config_of(folder), PLAIN)
    fixed = step.weights + step.gradients + step.states
    found = plan(folder, gpu=f"{0.7 * fixed / 2**30 / USABLE:.6f}GB", setup=PLAIN)
    assert not found["losses"]["ours"]["fits"]
    half = step_of(config_of(folder), PLAIN._replace(dtype="bfloat16")).longest("ours", found["capacity_bytes"])
    assert found["would_fit"]["--dtype bfloat16"] == min(half, 4096) > 0
    assert f"would fit with --dtype bfloat16: {min(half, 4096):,} tokens with ours" in lines(found)
    assert plan(folder, gpu="80GB", setup=PLAIN)["would_fit"] == {}
    make_config("phi3", vocab_size=30000).save_pretrained(folder)  # for which PEFT has no modules of its own
    found = plan(folder, gpu=f"{0.7 * fixed / 2**30 / USABLE:.6f}GB", setup=PLAIN)["would_fit"]
    assert "--use_peft --lora_target_modules all-linear" in found and "--use_peft" not in found


def test_names_on_the_hub_mean_a_shape():
    for name in ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"):
        assert shape_of(name) is SHAPES["llama-3.1-8b"]
    assert shape_of("google/gemma-3-1b-it") is SHAPES["gemma-3-1b"] and shape_of("some/qwen3-8b/folder") is None


def test_models_that_cannot_be_planned_are_refused(tmp_path):
    AutoConfig.for_model("bart", d_model=64, decoder_layers=1, decoder_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="BartForCausalLM cannot be patched: its forward makes its loss by itself"):
        plan(str(tmp_path), gpu="24GB")
    AutoConfig.for_model("t5", d_model=64, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="T5"):
        plan(str(tmp_path), gpu="24GB")
    AutoConfig.for_model("bloom", hidden_size=64, n_layer=1, n_head=4, vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="BloomForCausalLM: the memory of its decoder does not grow in proportion"):
        plan(str(tmp_path), gpu="24GB", setup=BF16)
    AutoConfig.for_model("falcon", hidden_size=64, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="'falcon': its attention cannot be replaced"):
        plan(str(tmp_path), gpu="24GB")
    make_config(architectures=["Qwen3Model"]).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="is a Qwen3Model.*no head"):
        plan(str(tmp_path), gpu="24GB")
    make_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}).save_pretrained(tmp_path)
    with pytest.raises(DataError, match="quantised weights are not planned"):
        plan(str(tmp_path), gpu="24GB")
    with pytest.raises(DataError, match="no such folder"):
        plan(str(tmp_path / "none"), gpu="24GB")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"lora_r": 4}, "do nothing without use_peft"),
        ({"lora_target_modules": ("q_proj",)}, "do nothing without use_peft"),
        ({"workspace_bytes": 0}, "workspace_bytes must be 1 or more, got 0"),
    ],
)
def test_options_that_make_no_sense_are_errors(folder, changes, said):
    with pytest.raises(DataError, match=said):
        plan(folder, gpu="24GB", setup=PLAIN._replace(**changes))


def test_the_command_prints_what_was_found(folder):
    command = ["plan", "--model", folder, "--gpu", "0.5GB", "--context", "2048", "--batch", "2", "--dtype", "bfloat16"]
    result = CliRunner().invoke(app, [*command, "--json"])
    setup = Setup(dtype="bfloat16", per_device_train_batch_size=2)
    assert result.exit_code == 0, result.output
    found = plan(folder, 2048, "0.5GB", setup)
    assert json.loads(result.stdout) == json.loads(json.dumps(found))
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    for loss, name in LOSSES.items():
        of = found["losses"][loss]
        assert f"longest context with {name}: {of['longest_context']:,} tokens, decided by" in result.stdout
        assert f"{of['total_bytes'] / 2**30:,.2f}" in result.stdout
    failed = CliRunner().invoke(app, ["plan", "--model", folder, "--gpu", "0.5GB", "--context", "9999"])
    assert failed.exit_code == 1 and "positions" in failed.output
