"""`python -m bench.scoring`: `pear score` beside the usual loop over full logits, whole runs from JSONL to JSONL.

Peers read the same rows with the same tokenizer and write their tokens and log-probs; the model is loaded before the
clock starts. The loops are what people write: `model(**batch).logits`, `log_softmax` in float32, `gather`, over batches
in the file's order, and, so that the head can be told from the padding, over the very batches that `pear score` makes.
It alone also finds the bytes of each token, seals its rows and keeps batches for a resumption. Every run is a process
of its own, in rounds around the peers; memory is the process's high-water mark above what it held before. The weights
are random, since neither time nor memory depends on them; log-probs of all peers are compared.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from statistics import median
from typing import NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench import machine
from bench.memory import resident, settle
from bench.report import table
from bench.store import write_text_whole
from pear.io import read_jsonl
from pear.models import load_model, load_tokenizer
from pear.rows import prompt_and_completion, tokenize_row
from pear.score import score
from pear.scoring.batches import batches
from pear.scoring.rows import Row

BATCH_TOKENS, BATCH_ROWS = 2048, 4  # of sorted batches; of batches in the file's order


class Case(NamedTuple):
    vocabulary: int
    hidden: int
    layers: int
    rows: int


CASES = {
    "tiny": Case(49152, 32, 1, 8),
    "49k": Case(49152, 576, 6, 24),
    "152k": Case(151936, 384, 6, 16),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="around the peers (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all but tiny")
    parser.add_argument("--results", type=Path, default=machine.ROOT / "bench" / "results")
    parser.add_argument("--note", default="", help="what a reader of the report should know, in a line")
    parser.add_argument("--child", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], Path(arguments.child[1]))))
        return
    found = {}
    for name in arguments.case or [name for name in CASES if name != "tiny"]:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run_case(CASES[name], Path(folder), arguments.rounds, arguments.threads)
    folder = write(found, arguments.results.resolve(), arguments.note)
    print((folder / "scoring.md").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# One run


def pear_score(model, tokenizer, data: Path, out: Path) -> None:
    score(model, data, out, tokenizer=tokenizer, batch_tokens=BATCH_TOKENS, progress=False)


def file_order(model, tokenizer, data: Path, out: Path) -> None:
    def cut(rows: list[Row]) -> Iterable[range]:
        return (range(i, min(i + BATCH_ROWS, len(rows))) for i in range(0, len(rows), BATCH_ROWS))

    logits_loop(model, tokenizer, data, out, cut)


def same_batches(model, tokenizer, data: Path, out: Path) -> None:
    logits_loop(model, tokenizer, data, out, lambda rows: batches(rows, BATCH_TOKENS))


@torch.no_grad()
def logits_loop(model, tokenizer, data: Path, out: Path, cut: Callable[[list[Row]], Iterable[Iterable[int]]]) -> None:
    """Log-probs the usual way."""
    texts, rows = [], []
    for line, text in read_jsonl(data):
        tokens = tokenize_row(prompt_and_completion(text, ""), tokenizer, "")
        ids, mask = torch.tensor(tokens.input_ids).numpy(), torch.tensor(tokens.completion_mask).bool().numpy()
        texts.append(text)
        rows.append(Row(line, ids, mask, tokens.prompt_cut, False))
    found: dict[int, list[float]] = {}
    for numbers in cut(rows):
        batch = [rows[i] for i in numbers]
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row.input_ids) for row in batch], batch_first=True)
        lengths = torch.tensor([len(row.input_ids) for row in batch])
        attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for i, row, values in zip(numbers, batch, logprobs, strict=True):
            found[i] = [0.0, *torch.where(torch.from_numpy(row.mask[1:]), values[: len(row.mask) - 1], 0).tolist()]
    with open(out, "w") as file:
        for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
            columns = {"input_ids": row.input_ids.tolist(), "completion_mask": row.mask.astype(int).tolist()}
            columns["behavior_logprobs"] = found[i]
            file.write(json.dumps(text | columns) + "\n")


PEERS = {
    "pear score": pear_score,
    "full logits, the same batches": same_batches,
    f"full logits, {BATCH_ROWS} rows in the file's order": file_order,
}


def measure(peer: str, folder: Path) -> dict[str, float]:
    """In this process: seconds, CPU seconds, and bytes at the peak above what was held before."""
    model, tokenizer = load_model(str(folder / "model"), dtype=torch.float32).eval(), load_tokenizer("smollm2")
    run, out = PEERS[peer], folder / f"{list(PEERS).index(peer)}.jsonl"
    run(model, tokenizer, folder / "short.jsonl", folder / "warm.jsonl")
    before, cpu, began = settle(), time.process_time(), time.perf_counter()
    run(model, tokenizer, folder / "data.jsonl", out)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "bytes": resident("VmHWM") - before}


# ---------------------------------------------------------------------------------------------------------------------
# A case


def run_case(case: Case, folder: Path, rounds: int, threads: int) -> dict:
    """Rows of every peer, how far their log-probs are apart, and what was scored."""
    prepare(case, folder)
    found: dict[str, list[dict]] = {peer: [] for peer in PEERS}
    loads = []
    for turn in range(rounds):
        loads.append(round(os.getloadavg()[0], 2))
        order = list(PEERS)
        for peer in order[turn % len(order) :] + order[: turn % len(order)]:
            command = [sys.executable, "-m", "bench.scoring", "--threads", str(threads), "--child", peer, str(folder)]
            done = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{peer}: {done.stderr[-2000:]}")
            found[peer].append(json.loads(done.stdout.splitlines()[-1]))
    lists = [[row for _, row in read_jsonl(folder / f"{i}.jsonl")] for i in range(len(PEERS))]
    apart = max(
        abs(a - b)
        for other in lists[1:]
        for x, y in zip(lists[0], other, strict=True)
        for a, b in zip(x["behavior_logprobs"], y["behavior_logprobs"], strict=True)
    )
    lengths = [len(row["input_ids"]) for row in lists[0]]
    return {
        **case._asdict(),
        "tokens": sum(lengths),
        "response_tokens": sum(sum(row["completion_mask"]) for row in lists[0]),
        "lengths": [min(lengths), int(median(lengths)), max(lengths)],
        "largest_difference": apart,
        "load_before_rounds": loads,
        "peers": found,
    }


def prepare(case: Case, folder: Path) -> None:
    """A model with random weights, and rows of very unlike lengths in no order."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers, num_attention_heads=max(1, case.hidden // 64),
        num_key_value_heads=max(1, case.hidden // 64), max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    rng, words = Random(0), "we add the two numbers and carry one so that this is what remains in the end".split()
    with open(folder / "data.jsonl", "w") as file:
        for n in range(case.rows):
            before, after = rng.randint(20, 120), min(900, round(30 + rng.lognormvariate(4.8, 0.9)))
            text = [" ".join(rng.choice(words) for _ in range(count)) for count in (before, after)]
            file.write(json.dumps({"prompt": f"{n}: {text[0]}", "completion": f" {text[1]}."}) + "\n")
    (folder / "short.jsonl").write_text(json.dumps({"prompt": "One and", "completion": " two."}) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The report


def write(found: dict[str, dict], results: Path, note: str) -> Path:
    facts = machine.facts("cpu")
    folder = results / machine.folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_whole(
        folder / "scoring.json", json.dumps({"machine": facts, "note": note, "cases": found}, indent=1) + "\n"
    )
    write_text_whole(folder / "scoring.md", text(facts, found, note))
    return folder


def text(facts: dict, found: dict[str, dict], note: str) -> str:
    lines = ["# Scoring", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [f"- note: {note}"] if note else []
    lines += ["", *(line.strip() for line in __doc__.split("\n\n", 1)[1].strip().splitlines())]
    lines += [
        "",
        "Tokens are those of prompts and responses; medians over the rounds, ratios within a round; less than 1",
    ]
    lines += ["in the ratio of times or of memory is better than `pear score`, more is worse."]
    for case in found.values():
        low, middle, high = case["lengths"]
        lines += ["", f"## V={case['vocabulary']}, D={case['hidden']}, {case['layers']} layers, float32", ""]
        lines += [f"{case['rows']} rows of {low} to {high} tokens (median {middle}), {case['tokens']} tokens in all, "]
        lines[-1] += f"{case['response_tokens']} of them of responses; load of the machine before the rounds: "
        lines[-1] += ", ".join(map(str, case["load_before_rounds"])) + "."
        ours, rows = case["peers"]["pear score"], []
        for peer, runs in case["peers"].items():
            seconds, memory = median(run["seconds"] for run in runs), median(run["bytes"] for run in runs)
            row = [peer, f"{seconds:.2f}", f"{case['tokens'] / seconds:.0f}", f"{memory / 2**20:.0f}"]
            for key in ("seconds", "cpu_seconds", "bytes"):
                row.append(f"{median(run[key] / own[key] for run, own in zip(runs, ours, strict=True)):.2f}")
            rows.append(row)
        head = ["", "s", "tokens/s", "extra memory, MiB", "time, of pear score", "CPU time, of it", "memory, of it"]
        lines += ["", *table(head, rows)]
        lines += ["", f"Log-probs are at most {case['largest_difference']:.1e} apart."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
