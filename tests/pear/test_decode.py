"""Sampling in stages against one call of `model.generate`, against exact probabilities, and in its two users' hands."""

import copy
import itertools
from collections import Counter

import peft
import pytest
import torch
from datasets import Dataset
from tiny import make_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer

import pear.decode
from pear.decode import decode, decoding_in_stages
from pear.rl import PEARGRPOTrainer
from pear.rl_config import PEARGRPOConfig

WIDTH, LENGTH = 9, 22
SIZES = dict(
    vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=False, pad_token_id=0,
    eos_token_id=1, bos_token_id=None,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "windows": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "windows and all": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=6)),
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
}


def make(kind: str = "llama"):
    rng = torch.Generator().manual_seed(1)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:  # wide, for distributions that are not flat
                p.normal_(0, 0.3, generator=rng)
    return model


@pytest.fixture
def model():
    return make()


def prompts(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, WIDTH) ids and mask, padded on the left."""
    ids = torch.randint(2, 40, (rows, WIDTH), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(WIDTH) >= torch.arange(rows)[:, None] % 6).long()
    return ids * mask, mask


def lengths(new: torch.Tensor, ends: list[int]) -> list[int]:
    """Tokens of each row, its end included; one more than there are where it has none."""
    return [next((t + 1 for t, token in enumerate(row) if token in ends), len(row) + 1) for row in new.tolist()]


def greedy(**options) -> GenerationConfig:
    return GenerationConfig(**dict(max_new_tokens=LENGTH, do_sample=False, pad_token_id=0) | options)


def best_end(model, ids, mask) -> int:
    """The token with which greedy completions end at the most different places."""
    free = model.generate(input_ids=ids, attention_mask=mask, generation_config=greedy(eos_token_id=999))
    free = free[:, ids.shape[1] :]
    return max(free.unique().tolist(), key=lambda end: len(set(lengths(free, [end]))))


class Counting:
    """A `generate`, with the number of rows and of new tokens of each call."""

    def __init__(self, generate):
        self.generate, self.calls = generate, []

    def __call__(self, **kwargs):
        out = self.generate(**kwargs)
        self.calls.append((len(kwargs["input_ids"]), out.shape[1] - kwargs["input_ids"].shape[1]))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Greedy: the tokens are those of one call


@pytest.mark.parametrize("stage", [1, 5, 16])
@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_that_of_one_call(monkeypatch, kind, stage):
    monkeypatch.setattr(pear.decode, "STAGE", stage)
    model = make(kind)
    ids, mask = prompts()
    end = best_end(model, ids, mask)
    for length in (1, 7, LENGTH):
        config = greedy(eos_token_id=end, max_new_tokens=length)
        expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        assert torch.equal(decode(model, ids, mask, config), expected)
    assert len(set(lengths(expected[:, WIDTH:], [end]))) > 2


@pytest.mark.parametrize("stage", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        dict(),  # no row ends
        dict(eos_token_id=[3, 5, 8, 13]),
        dict(pad_token_id=7),
        dict(repetition_penalty=1.4),
    ],
    ids=["no end", "several ends", "another pad", "penalty"],
)
def test_greedy_with_options(monkeypatch, model, stage, options):
    monkeypatch.setattr(pear.decode, "STAGE", stage)
    ids, mask = prompts()
    end = best_end(model, ids, mask) if options else 999
    config = greedy(**dict(eos_token_id=end) | options)
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert torch.equal(decode(model, ids, mask, config), expected)


@pytest.mark.parametrize("stage", [1, 3])
def test_one_row_and_rows_that_end_together(monkeypatch, model, stage):
    monkeypatch.setattr(pear.decode, "STAGE", stage)
    ids, mask = prompts()
    end = best_end(model, ids, mask)
    config = greedy(eos_token_id=end)
    for row in range(0, len(ids), 2):
        for rows in (1, 3):
            same, its_mask = (x[row : row + 1].repeat(rows, 1) for x in (ids, mask))
            expected = model.generate(input_ids=same, attention_mask=its_mask, generation_config=config)
            assert torch.equal(decode(model, same, its_mask, config), expected)


def test_each_call_is_for_the_rows_that_go_on(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    ids, mask = prompts()
    end = best_end(model, ids, mask)
    config = greedy(eos_token_id=end)
    counting = Counting(model.generate)
    out = decode(model, ids, mask, config, generate=counting)
    ended = lengths(out[:, WIDTH:], [end])
    going = [sum(n > start for n in ended) for start in range(0, LENGTH, 4)]
    assert [rows for rows, _ in counting.calls] == going
    assert [tokens for _, tokens in counting.calls] == [4, 4, 4, 4, 4, 2]
    assert going[0] == 12 and len(set(going)) > 2
    assert config.max_new_tokens == LENGTH


# ---------------------------------------------------------------------------------------------------------------------
# Sampled: another stream of random numbers, the same distribution


@pytest.mark.parametrize("stage", [1, 3])
def test_sampled_completions_follow_the_exact_probabilities(monkeypatch, stage):
    monkeypatch.setattr(pear.decode, "STAGE", stage)
    length, end, temperature, draws = 4, 1, 0.8, 6000
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SIZES | dict(vocab_size=5, initializer_range=0.15))).eval()
    starts = [[2, 3, 4, 2], [3]]
    ids = torch.tensor([[2, 3, 4, 2], [0, 0, 0, 3]]).repeat_interleave(draws, 0)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]]).repeat_interleave(draws, 0)
    config = GenerationConfig(
        max_new_tokens=length, do_sample=True, temperature=temperature, top_k=0, eos_token_id=end, pad_token_id=0
    )
    with torch.no_grad():
        out = decode(model, ids, mask, config)[:, 4:].tolist()
        for start, drawn in zip(starts, (out[:draws], out[draws:]), strict=True):
            counts = Counter(tuple(row[: row.index(end) + 1] if end in row else row) for row in drawn)
            probability = {}
            rest = torch.tensor(list(itertools.product(range(5), repeat=length)))  # every sequence, after its end too
            logits = model(torch.cat([torch.tensor([start] * len(rest)), rest], dim=1)).logits[:, len(start) - 1 : -1]
            logprobs = (logits.double() / temperature).log_softmax(-1).gather(-1, rest[..., None])[..., 0]
            for row, logprob in zip(rest.tolist(), logprobs, strict=True):
                n = row.index(end) + 1 if end in row else length
                probability[tuple(row[:n])] = logprob[:n].sum().exp().item()
            assert sum(probability.values()) == pytest.approx(1)
            assert counts.keys() <= probability.keys()
            likely = {key: draws * p for key, p in probability.items() if draws * p > 5}
            assert len(likely) > 40 and {len(key) for key in likely} == {1, 2, 3, 4}
            chi2 = sum((counts[key] - n) ** 2 / n for key, n in likely.items())
            assert chi2 < len(likely) + 5 * (2 * len(likely)) ** 0.5


def test_sampling_repeats_by_seed(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 3)
    ids, mask = prompts()
    config = GenerationConfig(max_new_tokens=LENGTH, do_sample=True, top_k=0, eos_token_id=1, pad_token_id=0)
    drawn = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        drawn.append(decode(model, ids, mask, config).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


# ---------------------------------------------------------------------------------------------------------------------
# What is left to one call


@pytest.mark.parametrize("where", ["the call's", "the model's"])
@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=2),
        dict(min_new_tokens=9),
        dict(min_length=WIDTH + 9),
        dict(use_cache=False),
        dict(no_repeat_ngram_size=2),
        dict(cache_implementation="static", disable_compile=True),
        dict(forced_eos_token_id=0),
        dict(num_return_sequences=2, do_sample=True, top_k=1),
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_would_mean_something_else_in_stages(monkeypatch, model, where, options):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    ids, mask = prompts()
    config = greedy(eos_token_id=best_end(model, ids, mask))
    if "do_sample" in options:
        config.do_sample = None
    for name, value in options.items():
        setattr(config if where == "the call's" else model.generation_config, name, value)
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    counting = Counting(model.generate)
    assert torch.equal(decode(model, ids, mask, config, generate=counting), expected)
    assert len(counting.calls) == 1


@pytest.mark.parametrize(
    "options, given",
    [
        (dict(eos_token_id=None), dict()),
        (dict(pad_token_id=None), dict()),
        (dict(max_new_tokens=None, max_length=WIDTH + LENGTH), dict()),
        (dict(), dict(stopping_criteria=[])),
        (dict(), dict(token_type_ids=None)),
    ],
    ids=["no end", "no pad", "max_length", "criteria", "other inputs"],
)
def test_what_stages_cannot_do_without_and_what_they_do_not_know(monkeypatch, model, options, given):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    calls = []
    config = greedy(**dict(eos_token_id=1) | options)
    assert decode(model, *prompts(), config, generate=lambda **kwargs: calls.append(kwargs), **given) is None
    (call,) = calls
    assert call.keys() == {"input_ids", "attention_mask", "generation_config"} | given.keys()
    assert call["generation_config"] is config


def test_options_that_are_off_and_what_a_folder_recommends_are_staged(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1, max_length=512, use_cache=True,
        output_scores=False, return_dict_in_generate=False,
    )  # fmt: skip
    ids, mask = prompts()
    config = greedy(eos_token_id=best_end(model, ids, mask))
    expected = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    counting = Counting(model.generate)
    assert torch.equal(decode(model, ids, mask, config, generate=counting), expected)
    assert len(counting.calls) == 6


def test_several_processes_call_once_each(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes, expected in ((1, 6), (2, 1)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_, n=processes: n)
        counting = Counting(model.generate)
        decode(model, *prompts(), greedy(eos_token_id=999), generate=counting)
        assert len(counting.calls) == expected


# ---------------------------------------------------------------------------------------------------------------------
# decoding_in_stages


def test_within_generate_is_staged_and_afterwards_the_models_own(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    ids, mask = prompts()
    config = greedy(eos_token_id=best_end(model, ids, mask))
    given = dict(input_ids=ids, attention_mask=mask, generation_config=config)
    expected = model.generate(**given)
    seen = []
    monkeypatch.setattr(pear.decode, "decode", lambda *args, **kwargs: seen.append(kwargs) or decode(*args, **kwargs))
    with decoding_in_stages(model):
        assert torch.equal(model.generate(**given), expected)
        assert len(seen) == 1
        for args, kwargs in (
            ((ids,), dict(attention_mask=mask, generation_config=config)),
            ((), dict(input_ids=ids, attention_mask=mask, max_new_tokens=3)),
            ((), dict(given, attention_mask=None)),
        ):
            model.generate(*args, **kwargs)
        assert len(seen) == 1
    assert "generate" not in vars(model)
    assert torch.equal(model.generate(**given), expected)
    assert len(seen) == 1


def test_the_model_is_restored_after_an_error(model):
    with pytest.raises(RuntimeError, match="stop"), decoding_in_stages(model):
        raise RuntimeError("stop")
    assert "generate" not in vars(model)


def test_a_generate_that_somebody_else_put_there_is_used_and_comes_back(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    model.generate = counting = Counting(model.generate)
    ids, mask = prompts()
    given = dict(input_ids=ids, attention_mask=mask, generation_config=greedy(eos_token_id=999))
    with decoding_in_stages(model), decoding_in_stages(model):
        model.generate(**given)
    assert counting.calls == [(12, 4)] * 5 + [(12, 2)]
    assert model.generate is counting


def test_adapters_reach_the_base(monkeypatch, model):
    monkeypatch.setattr(pear.decode, "STAGE", 4)
    ids, mask = prompts()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ).eval()
    config = greedy(eos_token_id=best_end(adapted, ids, mask))
    given = dict(input_ids=ids, attention_mask=mask, generation_config=config)
    expected = adapted.generate(**given)
    base = adapted.get_base_model()
    base.generate = counting = Counting(base.generate)
    with decoding_in_stages(base):
        assert torch.equal(adapted.generate(**given), expected)
    assert len(counting.calls) > 2


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "LoRA"])
def test_rollouts_are_staged_and_are_trl_s(monkeypatch, tokenizer, tmp_path, adapter):
    monkeypatch.setattr(pear.decode, "STAGE", 3)
    texts = [f"What is {n} plus {n * n}?" for n in range(12)]
    base = make_model(tokenizer)
    encoded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    end = best_end(base, encoded["input_ids"], encoded["attention_mask"])
    swapped = [tokenizer.eos_token_id, end]  # where it would have said this token, it ends
    with torch.no_grad():
        base.lm_head.weight[swapped] = base.lm_head.weight[swapped[::-1]]
    calls, drawn = [], {}

    def spy(model, generate, **kwargs):
        counting = Counting(generate)
        out = decode(model, generate=counting, **kwargs)
        calls.append(counting.calls)
        return out

    monkeypatch.setattr(pear.decode, "decode", spy)
    for kind, config in ((GRPOTrainer, GRPOConfig), (PEARGRPOTrainer, PEARGRPOConfig)):
        drawn[kind] = {}

        def reward(prompts, completion_ids, kind=kind, **_):
            drawn[kind].update(zip(prompts, completion_ids, strict=True))
            return [float(sum(ids) % 7) for ids in completion_ids]

        trainer = kind(
            copy.deepcopy(base),
            reward,
            config(
                str(tmp_path), per_device_train_batch_size=24, num_generations=2, max_completion_length=LENGTH,
                max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, bf16=False,
                gradient_checkpointing=False, dataloader_pin_memory=False, generation_kwargs=dict(do_sample=False),
            ),
            train_dataset=Dataset.from_dict({"prompt": texts}),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]) if adapter else None,
        )  # fmt: skip
        trainer.train()
        assert len(calls) == (kind is PEARGRPOTrainer)
    (stages,) = calls
    assert stages[0] == (24, 3) and stages[-1][0] < 24 and len(stages) > 2
    assert drawn[PEARGRPOTrainer] == drawn[GRPOTrainer]
    assert drawn[GRPOTrainer].keys() == set(texts)
    assert len(set(map(len, drawn[GRPOTrainer].values()))) > 2
    policy = trainer.accelerator.unwrap_model(trainer.model)
    assert "generate" not in vars(policy.get_base_model() if adapter else policy)
