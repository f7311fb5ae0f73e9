"""Batched generation against an uncached loop of our own; draws against the model's distribution."""

import pytest
import torch
from conftest import make_model
from transformers import GenerationConfig

from pear.countdown import make_tokenizer
from pear.generate import encode_prompt, generate

PROMPTS = ["3 7 2 = 42 :", "1 = :", "5 5 5 = 15 : 5 + 5 = 10 , 10 + 5 =", "9", "3 7 2 = 42 : 3 * 7 ="]


@pytest.fixture(scope="module")
def small():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, scale=0.5), tokenizer


def greedy_without_cache(model, ids: list[int], stop: int, length: int) -> list[int]:
    """One sequence, no padding, no cache: a full forward pass for each token."""
    made = []
    with torch.no_grad():
        while len(made) < length and (not made or made[-1] != stop):
            made.append(model(torch.tensor([ids + made])).logits[0, -1].argmax().item())
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_batched_left_padded_greedy_is_unbatched_greedy(kind, batch_size):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, kind=kind, scale=0.5)
    drawn = generate(model, tokenizer, PROMPTS, max_new_tokens=20, temperature=0, batch_size=batch_size, progress=None)
    for prompt, (completion,) in zip(PROMPTS, drawn, strict=True):
        ids = tokenizer(prompt).input_ids
        assert completion.ids == greedy_without_cache(model, ids, tokenizer.eos_token_id, 20), prompt


def test_a_completion_ends_at_its_end_of_sequence(small):
    model, tokenizer = small
    stop = tokenizer.eos_token_id
    with torch.no_grad():  # raise the end's probability, so that rows end at different places
        saved = model.lm_head.weight.clone()
        model.lm_head.weight[stop] *= 3
    try:
        drawn = generate(model, tokenizer, PROMPTS, samples=40, max_new_tokens=10, seed=1, progress=None)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)
    lengths = set()
    for completion in (c for each in drawn for c in each):
        assert completion.finished == (completion.ids[-1] == stop)
        assert completion.ids.count(stop) == int(completion.finished)
        assert completion.finished or len(completion.ids) == 10
        assert completion.text == tokenizer.decode([i for i in completion.ids if i > 2])
        assert "<" not in completion.text
        lengths.add(len(completion.ids))
    assert len(lengths) > 3


def test_sampling_repeats_by_seed_and_leaves_the_model_as_it_was(small):
    model, tokenizer = small
    model.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        generate(model, tokenizer, PROMPTS, samples=3, max_new_tokens=8, seed=seed, progress=None) for seed in (7, 7, 8)
    )
    assert first == again != other
    assert model.training
    assert torch.equal(torch.rand(3), expected)  # PyTorch's own stream went on undisturbed
    model.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_models_distribution_whatever_its_folder_recommends(temperature):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, scale=0.3)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=3.0
    )
    recommended = model.generation_config
    prompt = "3 7 2 = 42 :"
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
    probability = torch.softmax(logits.double() / temperature, 0)
    n = 6000
    (drawn,) = generate(
        model, tokenizer, [prompt], samples=n, max_new_tokens=1, temperature=temperature, batch_size=2000, progress=None
    )
    counts = torch.bincount(torch.tensor([c.ids[0] for c in drawn]), minlength=len(tokenizer)).double()
    expected = n * probability
    likely = expected > 5
    assert likely.sum() > 20  # more than a top-k of 2 would leave
    chi2 = ((counts - expected) ** 2 / expected)[likely].sum()
    degrees = likely.sum().item()
    assert chi2 < degrees + 5 * (2 * degrees) ** 0.5
    assert model.generation_config is recommended


def test_chat_models_get_their_template(model, tokenizer):
    text = "What is 3 plus 4?"
    ids = encode_prompt(tokenizer, text)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert ids == encode_prompt(tokenizer, [{"role": "user", "content": text}])
    (one,), (two,) = generate(
        model, tokenizer, [text, [{"role": "user", "content": text}]], max_new_tokens=5, temperature=0, progress=None
    )
    assert one == two
    assert one.ids == greedy_without_cache(model, ids, tokenizer.eos_token_id, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samples=0), "samples must be at least 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(batch_size=-1), "batch_size must be at least 1, got -1"),
        (dict(temperature=-0.5), "temperature must be 0 .* got -0.5"),
        (dict(temperature=float("nan")), "temperature must be 0 .* got nan"),
        (dict(max_new_tokens=251), r"prompts\[0\] has 6 tokens.*256 positions; lower max_new_tokens"),
    ],
)
def test_errors_name_the_argument(small, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*small, ["3 7 2 = 42 :"], progress=None, **options)


def test_an_empty_prompt_is_refused(small):
    with pytest.raises(ValueError, match=r"prompts\[1\] has no tokens: ''"):
        generate(*small, ["3 7", ""], max_new_tokens=5, progress=None)


def test_no_prompts_give_no_completions(small):
    assert generate(*small, [], progress=None) == []
