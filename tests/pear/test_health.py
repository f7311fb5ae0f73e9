"""Runs that go wrong without an error say so: once, with numbers, on the terminal and in log.jsonl."""

import json
import math

import pytest
from rl_training import LIMIT, make_grpo_trainer, rollouts
from tiny import make_model
from training import make_config

from pear.health import in_words
from pear.rl_health import log_in_words
from pear.rows import tokenize_row
from pear.scored import load_scored
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer

FINE = {"weight_mean": 1.0, "ratio_clipped_low": 0.4, "ratio_clipped_high": 0.3, "log_ratio_mean": -0.2, "tokens": 64}


@pytest.mark.parametrize(
    "stats, kind, words",
    [
        ({"weight_mean": 20.1}, "exploded", "The mean weight is 20.1, above 20"),
        ({"ratio_clipped_low": 0.995, "ratio_clipped_high": 0.0}, "clipped", "position alone"),
        ({"ratio_clipped_low": 0.6, "ratio_clipped_high": 0.395}, "clipped", "signs of the ratios alone"),
        # half of the tokens have a ratio, and all of these are clipped
        ({"ratio_clipped_low": 0.5, "ratio_clipped_high": 0.0, "ratio_tokens": 0.5}, "clipped", "(100.0% below, 0.0%"),
        ({"nll": math.nan}, "not_finite", "The nll is nan: the model's logits are not finite"),
        ({"tokens": 0}, "no_tokens", "No token of the last logged steps has a loss"),
    ],
)
def test_sft_in_words(tmp_path, stats, kind, words):
    args = make_config(tmp_path)
    assert not in_words(args, FINE) and not in_words(args, FINE | {"weight_mean": 20.0})
    found = in_words(args, FINE | stats)
    assert list(found) == [kind] and words in found[kind]


def test_ratios_mean_nothing_to_other_weightings(tmp_path):
    args = make_config(tmp_path, weighting="dft")
    stats = {"weight_mean": 0.5, "effective_sample_size": 0.6, "nll": 1.0, "tokens": 64}
    assert not in_words(args, stats)
    assert list(in_words(args, stats | {"weight_mean": 33.0})) == ["exploded"]


def warnings_of(trainer) -> list[str]:
    lines = map(json.loads, (trainer.run_log.path).read_text().splitlines())
    return [line["warning"] for line in lines if "warning" in line]


def test_sft_says_it_in_training_and_evaluation(tokenizer, tmp_path, caplog):
    rows = [{"prompt": f"What is {n}? ", "completion": f"It is {n}" + f", and again {n}" * 4} for n in range(8)]
    scored = []
    for row in rows:
        tokens = tokenize_row(row, tokenizer, "row")
        # likelier under the student by more than 20 nats a token: the weights lie on their ceiling, exp(5)
        own = {"input_ids": tokens.input_ids, "completion_mask": tokens.completion_mask, "behavior_policy": "far"}
        scored.append(row | own | {"behavior_logprobs": [-30.0 * counted for counted in tokens.completion_mask]})
    write_scored(tmp_path / "scored.jsonl", scored)
    dataset = load_scored(tmp_path / "scored.jsonl", tokenizer)
    args = make_config(tmp_path / "run", max_steps=2, gamma=1.0, learning_rate=0.0)
    trainer = PEARSFTTrainer(
        make_model(tokenizer), args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer
    )
    trainer.train()
    exploded, clipped = sorted(warnings_of(trainer), key=lambda text: "PEAR:" in text)
    assert "above 20: gradients are so many times" in exploded and "log_weight_clip" in exploded
    assert "100.0% of the log-ratios lie outside log_ratio_clip = [-0.08, 0.3]" in clipped
    assert "position alone" in clipped and "all at the high end" in clipped
    assert [record.message for record in caplog.records if record.name == "pear.run_log"] == warnings_of(trainer)
    trainer._said.clear()
    caplog.clear()
    trainer.evaluate()
    assert sum(record.message.startswith("Evaluation data: ") for record in caplog.records) == 2


@pytest.fixture(scope="module")
def policy(save_model) -> str:
    return str(save_model(seed=0))


def unended(prompts, trainer) -> dict:
    found = rollouts(prompts, trainer)
    return found | {"completion_ids": [[7 + i] * LIMIT for i in range(len(prompts))]}


@pytest.mark.parametrize(
    "reward, options, told",
    [
        (0.0, dict(), ["every advantage is 0, since all completions of a prompt have the same reward (mean reward 0)"]),
        (0.25, dict(beta=0.1), ["(mean reward 0.25). Nothing trains but the KL term"]),
        (None, dict(), ["the reward functions judged no completion"]),
        ("differs", dict(rollout_func=unended), [f"every completion was cut at max_completion_length = {LIMIT}"]),
        (
            "differs",
            dict(rollout_func=unended, mask_truncated_completions=True),
            ["every completion was cut", "no token has a loss: all are masked"],
        ),
        ("differs", dict(), []),
    ],
)
def test_rl_says_what_lasts_for_ten_steps(policy, tokenizer, tmp_path, caplog, reward, options, told):
    def judge(prompts, completions, **_):
        return [float(i) for i in range(len(prompts))] if reward == "differs" else [reward] * len(prompts)

    trainer = make_grpo_trainer(
        policy, tokenizer, output_dir=tmp_path, reward=judge, max_steps=12, **dict(rollout_func=rollouts) | options
    )
    trainer.train()
    found = warnings_of(trainer)
    assert len(found) == len(told)
    for text, words in zip(found, told, strict=True):
        assert text.startswith("Steps 1 to 10: ") and words in text and caplog.text.count(text) == 1
        assert f"Read the completions in {tmp_path}/samples" in text or "masked" in text


def test_rl_nine_steps_are_chance(policy, tokenizer, tmp_path):
    rewards = iter([0.0] * 9 + [1.0] + [0.0] * 8)

    def judge(prompts, completions, **_):
        value = next(rewards)
        return [value, *([0.0] * (len(prompts) - 1))]

    trainer = make_grpo_trainer(
        policy, tokenizer, output_dir=tmp_path, reward=judge, max_steps=18, rollout_func=rollouts, logging_steps=20
    )
    trainer.train()
    assert not warnings_of(trainer)


def test_rl_log_in_words():
    assert not log_in_words({"kl": 9.9, "pear/kl_old": 0.1, "clip_ratio/region_mean": 0.5, "loss": 1.0}, beta=0.1)
    found = log_in_words({"kl": 12.3, "pear/kl_old": math.inf, "clip_ratio/region_mean": 0.995}, beta=0.1)
    assert "from the reference is 12.3 nats a token" in found["kl"] and "raise beta" in found["kl"]
    assert "is inf nats" in found["pear/kl_old"] and "99.5%" in found["clipped"]
    assert not log_in_words({"kl": None}, beta=0.1)
