"""`python docs/_site/response.py`: the response that the pictures of docs/method.md are drawn from, in response.json.

Real numbers of a toy: a Llama of 3 layers learns this repository's own pages (3 minutes on one core) and is kept at a
few steps. The last of these writes a response, which it and the earlier ones score: the earlier ones are students, each
less sure than the policy that wrote the text. Pages change, and with them what comes out.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pear.generate import generate
from pear.pretrain import small_llama
from pear_kernels import linear_logprobs

HERE = Path(__file__).resolve().parent
KEPT = (600, 500, 300)  # steps; the first wrote the response
PROMPT = "PEAR compares the model in training with the policy that wrote the data, so"
TOKENS, WINDOW, BATCH, RATE = 400, 192, 8, 3e-3


def main() -> None:
    torch.set_num_threads(1)
    text = "\n".join(path.read_text() for path in sorted(HERE.parent.glob("*.md")))
    tokenizer = bytes_and_merges(text)
    policies = train(torch.tensor(tokenizer(text)["input_ids"]), tokenizer)

    prompt = tokenizer(PROMPT)["input_ids"]
    [[response]] = generate(policies[KEPT[0]], tokenizer, [PROMPT], max_new_tokens=TOKENS, seed=0, progress=None)
    ids = torch.tensor([*prompt, *response.ids])
    scored = {str(steps): logprobs(model, ids)[len(prompt) - 1 :].tolist() for steps, model in policies.items()}
    found = {"prompt": PROMPT, "text": response.text, "ids": response.ids, "logprobs": scored}
    (HERE / "response.json").write_text(json.dumps(found, indent=None) + "\n")
    for steps, values in scored.items():
        print(f"{steps} steps: {len(values)} tokens, mean log-prob {sum(values) / len(values):.3f}")


def bytes_and_merges(text: str) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 1,500 tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<pad>", "<end>"], initial_alphabet=alphabet)
    backend.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def train(ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> dict[int, torch.nn.Module]:
    """The model at each of KEPT steps of one run; `ids` (n,) is all text."""
    torch.manual_seed(0)
    model = small_llama(tokenizer, hidden_size=160, layers=3, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    kept, steps = {}, max(KEPT)
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - WINDOW, (BATCH,))
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 30) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
        if step in KEPT:
            kept[step] = small_llama(tokenizer, hidden_size=160, layers=3, heads=4).eval()
            kept[step].load_state_dict(model.state_dict())
    return dict(sorted(kept.items(), reverse=True))


@torch.no_grad()
def logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(n - 1,) of the ids (n,) from the second on."""
    hidden = model.model(input_ids=ids[None]).last_hidden_state[0]
    return linear_logprobs(hidden[:-1], model.lm_head.weight, ids[1:])


if __name__ == "__main__":
    main()
