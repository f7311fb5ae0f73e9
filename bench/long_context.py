"""`python -m bench.long_context`: the longest row that one GPU trains on, with the naive loss and with ours.

One training step (forward, backward, optimiser) on one row of L tokens, all of them targets; random bf16 weights in a
published shape, gradient checkpointing, sdpa attention, fused AdamW whose states are bf16 too, or LoRA of rank 16 on
the attention with all else frozen. "naive" is transformers' own forward with labels: full logits, and their copy in
float32. "pear" runs the same trunk and then `linear_pear_loss` at token level, which is more than the plain
cross-entropy beside it.

The longest row is found, not computed: memory of two lengths says where it should lie, and tries that end in a loss or
in an out-of-memory error close in on it. A try whose predicted time is over --step-seconds is not made: the row is then
longer than the table says. Every try is stored when it is made, and the same command goes on from there (exit code 75:
run me again). Positions go on past those that the models were trained for: neither memory nor time depends on that.
"""

import argparse
import functools
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # read when torch is loaded; less memory is lost between the allocator's blocks
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import Tensor

from bench import machine
from bench.cells import Cell
from bench.conftest import free, out_of_memory
from bench.report import table
from bench.store import Store, write_rows, write_text_whole
from pear.shapes import SHAPES
from pear_kernels import linear_pear_loss

QUESTION = "long-context"
RUN_ME_AGAIN = 75
HEADS = {"naive": "naive loss", "pear": "ours"}  # in this order: ours is also tried at the naive one's longest row
LORA = "-lora"
MODELS = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-8b" + LORA)
PACKAGES = ("transformers", "peft", "liger-kernel")
USABLE = 0.98  # of what is free, for a first guess: the rest is lost between the allocator's blocks
QUICK = 5.0  # seconds: a step that took less is done once more, and the second one's time is kept


class Rules(NamedTuple):
    """How a longest row is looked for."""

    multiple: int = 1024  # of tokens
    resolution: int = 32  # done where a row of 1/32 more does not fit
    probes: tuple[int, int] = (4096, 8192)
    step_seconds: float = 45.0  # no try that should take longer


class Trial(NamedTuple):
    tokens: int
    fits: bool
    bytes: int | None = None  # most allocated
    seconds: float | None = None  # of the step
    error: str | None = None  # another than of memory


class Case(NamedTuple):
    """Whose longest row: the key of a line in the report."""

    model: str
    trunk: str  # whose layers: "transformers", or "liger" (norms, rotary embedding and MLP)
    head: str

    def cell(self, tokens: int) -> Cell:
        return Cell(QUESTION, f"{self.model}/{self.trunk}/{tokens}", self.head)


# ---- which row next


def limits(trials: Iterable[Trial]) -> tuple[int, float]:
    """The longest row that fits (0: none did) and the shortest that does not (inf: all did)."""
    trials = list(trials)
    low = max((trial.tokens for trial in trials if trial.fits), default=0)
    return low, min((trial.tokens for trial in trials if not trial.fits), default=float("inf"))


def is_closed(trials: Iterable[Trial], rules: Rules) -> bool:
    low, high = limits(trials)
    return high - low <= max(rules.multiple, low // rules.resolution // rules.multiple * rules.multiple)


def predicted_tokens(trials: Iterable[Trial], capacity: int) -> int | None:
    """Where the line through the two longest rows that fit meets the capacity.

    Memory over length is convex, being the most of several moments of a step, each a line: what is predicted from
    short rows is too long rather than too short.
    """
    fitted = sorted(trial for trial in trials if trial.fits)[-2:]
    if len(fitted) < 2 or fitted[1].bytes <= fitted[0].bytes:
        return None
    (a, _, bytes_a, *_), (b, _, bytes_b, *_) = fitted
    return int(b + (capacity - bytes_b) * (b - a) / (bytes_b - bytes_a))


def predicted_seconds(trials: Iterable[Trial], tokens: int, work: Callable[[int], float]) -> float:
    """Of a step, from the longest row that fits: as its products and its attention grow."""
    longest = max((trial for trial in trials if trial.fits and trial.seconds), default=None)
    return 0.0 if longest is None else longest.seconds * work(tokens) / work(longest.tokens)


def step_flops(config: dict, tokens: int) -> float:
    """Floating-point operations of a step: products forward, again, and twice backward; the head's without the second.

    Attention makes each of its two products over half the square, and in the backward pass two and a half times.
    """
    hidden, layers, d = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    layer = hidden * (2 * heads + 2 * key_heads) * d + 3 * hidden * config["intermediate_size"]
    products = 2 * (4 * layers * layer + 3 * hidden * config["vocab_size"])
    return tokens * (products + 4.5 * layers * 2 * heads * d * tokens)


def next_tokens(trials: Iterable[Trial], capacity: int, rules: Rules, work: Callable[[int], float]) -> int | None:
    """The next row to try; None: the longest is known, or the time limit stands before it, or a try ended in an error.

    Args:
        trials: those that were made, of one case.
        capacity: bytes that there are for tensors.
        work: of a row, in any unit, to which the time of a step is proportional.
    """
    trials = list(trials)
    low, high = limits(trials)
    if is_closed(trials, rules) or any(trial.error for trial in trials):
        return None
    untried = [tokens for tokens in rules.probes if low < tokens < high]
    guess = predicted_tokens(trials, capacity)
    if guess is None and untried:
        return untried[0]
    if guess is None:
        guess = 2 * low
    if guess > 3 * low:  # from rows so short it may be far off: an eighth of the time tells more
        guess = max(guess * 2 // 5, low + rules.multiple)
    tokens = guess - guess % rules.multiple
    if tokens <= low:
        tokens = low + max(low // rules.resolution // rules.multiple, 1) * rules.multiple
    if tokens >= high:
        tokens = (low + int(high)) // 2
        tokens = max(tokens - tokens % rules.multiple, low + rules.multiple)
    wanted = tokens
    while tokens > low and predicted_seconds(trials, tokens, work) > rules.step_seconds:
        tokens -= rules.multiple
    if tokens < wanted and tokens < low + low // 8:  # nothing much is left to learn within the time limit
        return None
    return tokens


# ---- a step


class Rig:
    """One model with its optimiser on a device, its states made, ready for steps on rows of any length."""

    def __init__(self, config: dict, device: str, *, dtype: torch.dtype = torch.bfloat16, lora: bool = False):
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        config = AutoConfig.for_model(**config, use_cache=False)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model, self.causal_lm, self.device = model, model, device
        if lora:
            from peft import LoraConfig, get_peft_model

            adapter = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
            self.model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})  # by its name from transformers 6 on, or before
        self.model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # so small a rate leaves bf16 weights as they are, and the step is done all the same
        self.optimizer = torch.optim.AdamW(trained, lr=1e-8, weight_decay=0.0, fused=True)

    def batch(self, tokens: int) -> tuple[Tensor, Tensor]:
        """input_ids, all of them labels too, and behavior log-probs: (1, tokens) each."""
        generator = torch.Generator(self.device).manual_seed(tokens)
        shape, vocabulary = (1, tokens), self.causal_lm.config.vocab_size
        ids = torch.randint(vocabulary, shape, generator=generator, device=self.device)
        return ids, -2 * math.log(vocabulary) * torch.rand(shape, generator=generator, device=self.device)

    def loss(self, head: str, ids: Tensor, behavior: Tensor) -> Tensor:
        if head == "naive":
            return self.model(input_ids=ids, labels=ids).loss
        hidden = self.causal_lm.model(input_ids=ids, use_cache=False).last_hidden_state  # (1, L, D)
        target = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        behavior = torch.nn.functional.pad(behavior[:, 1:], (0, 1))
        return linear_pear_loss(hidden, self.causal_lm.lm_head.weight, target, behavior).loss

    def step(self, head: str, tokens: int) -> None:
        try:
            self.loss(head, *self.batch(tokens)).backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def trial(self, head: str, tokens: int) -> Trial:
        free()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = self.timed(head, tokens)
            if seconds < QUICK:
                seconds = self.timed(head, tokens)
        except Exception as error:  # what a library does with rows so long is part of the answer
            failed = Trial(tokens, False, error=None if out_of_memory(error) else in_a_line(error))
        else:
            return Trial(tokens, True, torch.cuda.max_memory_allocated(), seconds)
        free()
        return failed

    def timed(self, head: str, tokens: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.step(head, tokens)
        torch.cuda.synchronize()
        return time.perf_counter() - began


def gpu_rig(model: str) -> Rig:
    rig = Rig(SHAPES[model.removesuffix(LORA)], "cuda", lora=model.endswith(LORA))
    for head in HEADS:  # compiles kernels, loads libraries and makes the optimiser's states
        rig.step(head, 2048)
    return rig


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


TINY = SHAPES["qwen3-0.6b"] | {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


class TinyRig(Rig):
    """The real steps of a tiny model on a CPU, and a stand-in for its memory: the most of two lines for each head."""

    capacity = 1_000_000
    lines = {"naive": ((200_000, 1000), (300_000, 800)), "pear": ((200_000, 200), (100_000, 300))}

    def __init__(self, model: str):
        super().__init__(TINY, "cpu", dtype=torch.float32, lora=model.endswith(LORA))

    def bytes(self, head: str, tokens: int) -> int:
        return max(at_zero + a_token * tokens for at_zero, a_token in self.lines[head])

    def trial(self, head: str, tokens: int) -> Trial:
        if self.bytes(head, tokens) > self.capacity:
            return Trial(tokens, False)
        began = time.perf_counter()
        self.step(head, tokens)
        return Trial(tokens, True, self.bytes(head, tokens), time.perf_counter() - began)


# ---- all cases, resumed


def trials_of(store: Store, case: Case) -> list[Trial]:
    rows = [row for row in store.rows.values() if all(row[name] == value for name, value in case._asdict().items())]
    return [trial_of(row) for row in rows]


def trial_of(row: dict) -> Trial:
    return Trial(**{name: row.get(name) for name in Trial._fields})


def rules_of(store: Store, case: Case, rules: Rules) -> Rules:
    """Ours is also tried at the naive loss's longest row, so that the two can be compared there."""
    beside = limits(trials_of(store, case._replace(head="naive")))[0] if case.head == "pear" else 0
    return rules._replace(probes=(rules.probes[0], beside)) if beside > rules.probes[0] else rules


def measure_all(
    store: Store, models: Iterable[str], trunk: str, rules: Rules, make_rig: Callable[[str], Rig], deadline: float
) -> bool:
    """Makes the tries that are missing; returns whether none is left at the deadline (seconds since the epoch)."""
    for model in models:
        rig = None
        for head in HEADS:
            case = Case(model, trunk, head)
            while True:
                trials = trials_of(store, case)
                capacity = int(USABLE * store.facts["capacity"])
                work = functools.partial(step_flops, SHAPES[model.removesuffix(LORA)])
                tokens = next_tokens(trials, capacity, rules_of(store, case, rules), work)
                if tokens is None:
                    break
                if time.time() + predicted_seconds(trials, tokens, work) > deadline:
                    return False
                store.start(case.cell(tokens))
                try:
                    rig = rig or make_rig(model)
                    trial = rig.trial(head, tokens)
                except Exception as error:
                    trial = Trial(tokens, False, error=f"no model to try it on: {in_a_line(error)}")
                known = {name: value for name, value in trial._asdict().items() if value is not None}
                store.finish(case.cell(tokens), {**case._asdict(), **known})
                print(f"{model}, {trunk}, {head}: {in_words(trial)}", flush=True)
                if trial.error:
                    stop_if_broken()
        rig = None
        gc.collect()
        free()
    return True


def in_words(trial: Trial) -> str:
    if not trial.fits:
        return f"{trial.tokens} tokens: {trial.error or 'out of memory'}"
    return f"{trial.tokens} tokens, {trial.bytes / 2**30:.1f} GiB, {trial.seconds:.2f} s"


def stop_if_broken() -> None:
    """After some errors every later call on the device fails too; the next process may go on."""
    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device is not usable any more in this process: {error}", flush=True)
            sys.exit(RUN_ME_AGAIN)


# ---- the report


def place(row: dict) -> tuple[int, bool]:
    """In the tables."""
    return MODELS.index(row["model"]), row["trunk"] == "liger"


def label(model: str, trunk: str) -> str:
    return model if trunk == "transformers" else f"{model}, {trunk.capitalize()}'s layers"


def gib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**30:.1f}"


def text(facts: dict, rows: Iterable[dict], rules: Rules, left: bool, picture: str) -> str:
    facts = {**facts, "memory": f"{facts['capacity'] / 2**30:.2f} GiB free for tensors"}
    del facts["capacity"]
    lines = ["# The longest row that fits", "", *(f"- {name}: {value}" for name, value in facts.items())]
    lines += [f"- time limit of a step: {rules.step_seconds:g} s", ""]
    lines += [line.strip() for line in __doc__.split("\n\n", 1)[1].strip().splitlines()]
    if left:
        lines += ["", "**Not complete: tries are left.**"]
    if picture:
        lines += ["", f"![{picture}]({picture})"]
    lines += ["", "## Longest rows", ""]
    lines += ["In tokens; `>`: the longest that was tried, since a limit of time (of a step or of the run) ended the"]
    lines += ["search, not memory; `a to b`: a fits and b does not, and the run ended before more was known."]
    lines += ["Both losses at the naive one's longest row, and ours at its own.", ""]
    found = longest(rows, rules)
    head = ["", "naive", "ours", "ratio", "naive, GiB", "ours there, GiB", "naive, s", "ours there, s"]
    head += ["ours at its longest, GiB", "s"]
    body, notes = [], []
    for (model, trunk), heads in found.items():
        (naive, naive_end, _), (ours, ours_end, there) = heads["naive"], heads["pear"]
        row = [label(model, trunk), bracket(naive.tokens, naive_end), bracket(ours.tokens, ours_end)]
        row += [f"{ours.tokens / naive.tokens:.1f}" if naive.tokens else ""]
        for pair in ((naive, there), (ours,)):
            row += [gib(trial and trial.bytes) for trial in pair]
            row += ["" if trial is None or trial.seconds is None else f"{trial.seconds:.2f}" for trial in pair]
        body.append(row)
    for row in rows:
        if "error" in row:
            notes.append(f"- {row['model']}, {row['trunk']}, {row['head']}, {row['tokens']} tokens: {row['error']}")
    lines += [*table(head, body), *([""] + notes if notes else [])]
    lines += ["", "## Every try", ""]
    head = ["", "loss", "tokens", "most allocated, GiB", "s", "tokens/s"]
    body = []
    for row in sorted(rows, key=lambda row: (*place(row), row["head"], row["tokens"])):
        cells = [label(row["model"], row["trunk"]), HEADS[row["head"]], str(row["tokens"])]
        if row["fits"]:
            cells += [gib(row["bytes"]), f"{row['seconds']:.2f}", f"{row['tokens'] / row['seconds']:.0f}"]
        else:
            cells += ["error" if "error" in row else "out of memory", "", ""]
        body.append(cells)
    lines += table(head, body)
    return "\n".join(lines) + "\n"


def bracket(tokens: int, end: float | None) -> str:
    """A longest row in words; `end`: the shortest that does not fit (inf: none is known), None where that is close."""
    if end is None:
        return f"{tokens or 'none'}"
    return f"> {tokens}" if end == math.inf else f"{tokens} to {end}"


def longest(rows: Iterable[dict], rules: Rules) -> dict[tuple[str, str], dict[str, tuple]]:
    """By model and trunk, and by head: the longest try that fits, the shortest that does not (None: the search ended
    between them, inf: all fit), and the try at the naive loss's longest row (None: not made)."""
    trials: dict[tuple[str, str], dict[str, list[Trial]]] = {}
    for row in sorted(rows, key=place):
        heads = trials.setdefault((row["model"], row["trunk"]), {head: [] for head in HEADS})
        heads[row["head"]].append(trial_of(row))
    found: dict[tuple[str, str], dict[str, tuple]] = {}
    for key, heads in trials.items():
        beside = limits(heads["naive"])[0]
        found[key] = {}
        for head, made in heads.items():
            best = max((trial for trial in made if trial.fits), default=Trial(0, False))
            there = next((trial for trial in made if trial.fits and trial.tokens == beside), None)
            found[key][head] = (best, None if is_closed(made, rules) else limits(made)[1], there)
    return found


def draw(rows: Iterable[dict], rules: Rules, path: Path) -> str:
    """Longest rows as bars, and memory over length."""
    from bench.pictures import OWN_COLOR, PEER_COLOR, plt, save

    found = longest(rows, rules)
    colors = {"naive": PEER_COLOR, "pear": OWN_COLOR}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 1.2 + 0.8 * max(len(found), 4)), layout="constrained")
    labels = [label(model, trunk).replace(", ", "\n") for model, trunk in found][::-1]
    for shift, head in ((0.2, "naive"), (-0.2, "pear")):
        best = [heads[head] for heads in found.values()][::-1]
        values = [trial.tokens for trial, *_ in best]
        bars = left.barh([i + shift for i in range(len(values))], values, 0.38, color=colors[head], label=HEADS[head])
        marks = [bracket(trial.tokens, end) for trial, end, _ in best]
        left.bar_label(bars, marks, padding=3, fontsize=9)
    left.set_yticks(range(len(labels)), labels)
    left.set_xlim(0, 1.2 * max(trial.tokens for heads in found.values() for trial, *_ in heads.values()) or 1)
    left.set_title("longest row, tokens", fontsize=11)
    left.legend(frameon=False)
    for marker, (model, trunk) in zip("osD^vPX*hp" * 9, found, strict=False):
        for head in HEADS:
            mine = [row for row in rows if (row["model"], row["trunk"], row["head"]) == (model, trunk, head)]
            points = sorted((row["tokens"], row["bytes"] / 2**30) for row in mine if row["fits"])
            if points:
                name = label(model, trunk) if head == "pear" else None
                right.plot(*zip(*points, strict=True), marker=marker, markersize=4, color=colors[head], label=name)
    right.set_xscale("log", base=2)
    right.set_xlabel("tokens of the row")
    right.set_title("most memory of a step, GiB", fontsize=11)
    right.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)


def write(facts: dict, rows: dict[str, dict], rules: Rules, left: bool, results: Path) -> Path:
    """long_context.md and .json and, where matplotlib is, .png, in `results`/<device>/, which it returns."""
    folder = results / machine.folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    commits = ", ".join(sorted({row["commit"] for row in rows.values()})) or facts["commit"]
    facts, picture = {**facts, "commit": commits}, ""
    try:
        picture = draw(rows.values(), rules, folder / "long_context.png") if rows else ""
    except ImportError:
        pass  # --report draws it elsewhere
    kept = {**facts, "step_seconds": rules.step_seconds, "complete": not left}
    write_rows(folder / "long_context.json", kept, rows)
    write_text_whole(folder / "long_context.md", text(facts, list(rows.values()), rules, left, picture))
    return folder


def facts_of(device: str, capacity: int) -> dict:
    """`machine.facts`, with the libraries that run the trunk, and the bytes that there are."""
    found = machine.facts(device)
    more = [f"{name} {version}" for name in PACKAGES if (version := machine.installed(name))]
    return {**found, "versions": ", ".join([found["versions"], *more]), "capacity": capacity}


def use_liger() -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_qwen3

    apply_liger_kernel_to_qwen3(cross_entropy=False, fused_linear_cross_entropy=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.long_context", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=machine.ROOT / "runs" / "long_context", help="what is resumed")
    parser.add_argument("--results", type=Path, help="folder for the report (default bench/results)")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after so long (default 8)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all, in this order")
    parser.add_argument("--step-seconds", type=float, default=45.0, help="no try that should take longer (default 45)")
    parser.add_argument("--liger", action="store_true", help="Liger's norms, rotary embedding and MLP in the trunk")
    parser.add_argument("--retry", action="store_true", help="try again what ended in another error than of memory")
    parser.add_argument("--device", choices=("cuda", "tiny"), default="cuda", help="tiny: try the machinery on a CPU")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="write the report of its long_context.json anew")
    arguments = parser.parse_args()
    if arguments.report:
        kept = json.loads((arguments.report / "long_context.json").read_text())
        facts, rows = kept["machine"], kept["rows"]
        rules = Rules(step_seconds=facts.pop("step_seconds"))
        left = not facts.pop("complete")
        picture = draw(rows.values(), rules, arguments.report / "long_context.png")
        write_text_whole(arguments.report / "long_context.md", text(facts, list(rows.values()), rules, left, picture))
        return
    deadline = time.time() + 60 * arguments.minutes
    rules, on_gpu = Rules(step_seconds=arguments.step_seconds), arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device. To try this command on a CPU: --device tiny")
    if arguments.liger:
        use_liger()
    if on_gpu:
        capacity = torch.cuda.mem_get_info()[0]
    else:
        rules, capacity = rules._replace(multiple=16, probes=(64, 128)), TinyRig.capacity
    facts = facts_of(arguments.device, capacity)
    store = Store(arguments.out, facts)
    if arguments.retry:
        store.forget_errors()
    trunk = "liger" if arguments.liger else "transformers"
    done = measure_all(store, arguments.models, trunk, rules, gpu_rig if on_gpu else TinyRig, deadline)
    results = arguments.results or (machine.ROOT / "bench" / "results" if on_gpu else arguments.out)
    folder = write(facts, store.rows, rules, not done, results.resolve())
    print(f"\n{(folder / 'long_context.md').read_text()}\nwritten to {folder}")
    sys.exit(0 if done else RUN_ME_AGAIN)


if __name__ == "__main__":
    main()
