"""Teaching small models: which tokens count, against losses summed by hand, and what is learnt and drawn."""

import math
from collections import Counter
from random import Random

import pytest
import torch

from pear import countdown
from pear.generate import generate
from pear.pretrain import _encode, _pad, mixture, small_llama, teach

TOKENIZER = countdown.make_tokenizer()
EXAMPLE = ("3 7 2 = 42 :", "3 * 7 = 21 , 21 * 2 = 42 ; answer 3 * 7 * 2")
SHORT = ("1 2 = 3 :", "1 + 2 = 3 ; answer 1 + 2")


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    return small_llama(TOKENIZER, 16, 1, 2)


def examples(seed: int = 0):
    rng, problems = Random(seed), countdown.train_problems()[:50]
    return lambda: countdown.worked_example(rng, problems, "forward")


def by_hand(model, pairs) -> tuple[float, int]:
    """Sum of -log p over the words of the solutions and the ends of sequence after them, a row at a time."""
    total, tokens = 0.0, 0
    for prompt, solution in pairs:
        before = len(prompt.split(" "))
        ids = TOKENIZER(f"{prompt} {solution}")["input_ids"] + [TOKENIZER.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_p[t - 1, ids[t]].item() for t in range(before, len(ids)))
        tokens += len(ids) - before
    return total, tokens


def spaced(pair: tuple[str, str]) -> tuple[str, str]:
    """Every token a word, so that words can be counted."""
    return tuple(" ".join(TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"])) for text in pair)


# ---- what counts


def test_labels_stand_on_the_solution_alone():
    rows = _encode([EXAMPLE, SHORT], TOKENIZER)
    batch = _pad(rows, TOKENIZER, torch.device("cpu"))
    assert batch["input_ids"].shape == batch["labels"].shape
    for pair, ids, labels in zip((SHORT, EXAMPLE), batch["input_ids"], batch["labels"], strict=True):  # shortest first
        prompt, solution = (TOKENIZER(text)["input_ids"] for text in pair)
        whole = [*prompt, *solution, TOKENIZER.eos_token_id]
        assert ids[: len(whole)].tolist() == whole
        padding = len(ids) - len(whole)
        assert ids[len(whole) :].tolist() == [TOKENIZER.pad_token_id] * padding
        assert labels.tolist() == [-100] * len(prompt) + whole[len(prompt) :] + [-100] * padding
    assert (batch["labels"][0] == -100).sum() > len(TOKENIZER(SHORT[0])["input_ids"])  # there was padding


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_loss_is_the_mean_over_all_tokens_of_the_solutions(batch):
    # one step: the loss is that of the model as it was, over a batch that is computed in two parts
    model, drawn = tiny(), []
    draw = examples()

    def example() -> tuple[str, str]:
        drawn.append(draw() if len(drawn) % 2 else SHORT)
        return drawn[-1]

    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = teach(model, TOKENIZER, example, steps=1, batch=batch, learning_rate=1e-3)
    assert len(drawn) == batch
    start = tiny()
    assert all(torch.equal(before[name], p) for name, p in start.named_parameters())
    total, tokens = by_hand(start, map(spaced, drawn))
    assert loss == pytest.approx(total / tokens, rel=1e-5)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_prompts_teach_nothing():
    # what stands in a solution's place decides every gradient: another prompt of the same meaning to the model, none
    model = tiny()
    model.zero_grad()
    rows = _encode([EXAMPLE], TOKENIZER)
    model(**_pad(rows, TOKENIZER, model.device), num_items_in_batch=len(rows[0][1])).loss.backward()
    got = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    ids = torch.tensor([rows[0][0] + rows[0][1]])
    log_p = model(ids).logits[0].log_softmax(-1)
    first = len(rows[0][0])
    (-sum(log_p[t - 1, ids[0, t]] for t in range(first, ids.shape[1])) / len(rows[0][1])).backward()
    torch.testing.assert_close(got, model.get_input_embeddings().weight.grad)


# ---- what is learnt


def test_the_loss_falls():
    losses, told = [], []
    for steps in (1, 60):
        losses.append(
            teach(
                tiny(), TOKENIZER, examples(), steps=steps, batch=8, learning_rate=1e-2,
                progress=lambda done, total: told.append((done, total)),
            )
        )  # fmt: skip
    assert losses[0] == pytest.approx(math.log(len(TOKENIZER)), rel=0.1)  # knows nothing yet
    assert losses[1] < 0.7 * losses[0]  # its mean over the last 50 steps
    assert told == [(1, 1)] + [(step, 60) for step in range(1, 61)]


def test_a_tiny_model_memorises_one_example():
    model = tiny()
    teach(model, TOKENIZER, lambda: EXAMPLE, steps=150, batch=2, learning_rate=1e-2)
    total, tokens = by_hand(model.eval(), [spaced(EXAMPLE)])
    assert total / tokens < 0.05
    ((completion,),) = generate(model, TOKENIZER, [EXAMPLE[0]], temperature=0, max_new_tokens=40, progress=None)
    assert completion.finished and completion.text == spaced(EXAMPLE)[1]


def test_the_same_seed_gives_the_same_weights():
    def taught(seed: int, data: int) -> tuple[float, torch.Tensor]:
        model = tiny(seed)
        loss = teach(model, TOKENIZER, examples(data), steps=5, batch=4, learning_rate=1e-2)
        return loss, torch.cat([p.detach().flatten() for p in model.parameters()])

    loss, weights = taught(0, 0)
    again, same = taught(0, 0)
    assert loss == again and torch.equal(weights, same)
    for other in (taught(1, 0), taught(0, 1)):
        assert other[0] != loss and not torch.equal(other[1], weights)


def test_no_steps_leave_the_model_as_it_is():
    model = tiny()
    loss = teach(model, TOKENIZER, examples(), steps=0, batch=4, learning_rate=1e-2)
    assert math.isnan(loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny().parameters(), strict=True))


def test_a_small_llama_is_what_was_asked_for():
    model = small_llama(TOKENIZER, 24, 2, 3)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 2, 3)
    assert config.vocab_size == len(TOKENIZER) and config.eos_token_id == TOKENIZER.eos_token_id
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# ---- mixture


@pytest.mark.parametrize("shares", [{"a": 0.75, "b": 0.25}, {"a": 1, "b": 3, "c": 0}, {"only": 0.2}])
def test_a_mixture_draws_by_shares(shares):
    rng, draws = Random(0), 4000
    counts = Counter(mixture(rng, shares) for _ in range(draws))
    assert set(counts) == {name for name, share in shares.items() if share}
    for name, share in shares.items():
        p = share / sum(shares.values())
        assert abs(counts[name] / draws - p) <= 4.5 * (p * (1 - p) / draws) ** 0.5
