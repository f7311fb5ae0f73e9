"""`pear sft --weighting`, `--negatives`, `--distill`: losses against full logits, in every layout; resume, errors."""

import copy
import math
import shutil

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import forbid_logits, make_model, make_tokenizer
from training import OPTIONS, assert_close, batch_of, gradients, make_config

from pear.io import DataError, read_jsonl
from pear.models import vocabulary_fingerprint
from pear.runs import read_run
from pear.score import score
from pear.scored import load_scored
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer, main
from pear.teacher import HeldTeacher, _common_rows

K = 6
FLOOR = -6.0
TAU, MAX = 2.0, 1.05
TEMPERATURE = {"top_k": 1.0, "top_k_warm": 2.0}

# name -> options of the trainer; `memory` asks for a teacher beside the student
WEIGHTED = {name: {"weighting": name} for name in ("none", "dft", "psft", "asft", "idft")}
WEIGHTED |= {"iw-sft": {"weighting": "iw-sft", "iw_tau": TAU, "iw_max": MAX}}
WEIGHTED["psft"] |= {"psft_clip": 0.02}
WEIGHTED["asft"] |= {"asft_kl": 0.7}
WEIGHTED["asft-memory"] = WEIGHTED["asft"] | {"memory": True}
WEIGHTED["idft"] |= {"idft_clip": [0.3, 1.1]}
NEGATIVES = {
    f"negatives-{level}": {"negatives": True, "negative_lambda": 0.4, "logprob_floor": FLOOR, "level": level}
    for level in ("token", "sequence")
}
WARM = {"distill_temperature": 2.0, "nll_coef": 0.3}
DISTILLED = {
    "forward-memory": {"distill": "forward", "memory": True},
    "reverse-memory": {"distill": "reverse", "memory": True, "weighting": "none"},
    "js-memory": {"distill": "js", "memory": True, "js_beta": 0.2, **WARM},
    "forward-top_k": {"distill": "forward", "weighting": "none"},
    "reverse-top_k": {"distill": "reverse", "level": "block", "nll_coef": 0.5},
    "js-top_k_warm": {"distill": "js", "weighting": "none", **WARM},
}
OBJECTIVES = WEIGHTED | NEGATIVES | DISTILLED


def perturbed(model, spread: float, seed: int):
    """A close relative: log-ratios of all sizes around the clips."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def student(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    """Of another kind and width than the student; the vocabulary is the same."""
    return make_model(tokenizer, kind="qwen2", seed=5)


def logits_of(model, ids: list[int]) -> torch.Tensor:
    """(L, V) float64."""
    return model(input_ids=torch.tensor([ids])).logits[0].double()


@pytest.fixture(scope="module")
def rows(tokenizer, student, teacher):
    """Eight scored rows of several lengths with all columns, written by full logits; three are wrong answers."""
    from pear.models import tokenizer_fingerprint
    from pear.rows import tokenize_row

    behavior, before = perturbed(student, 0.003, 1), perturbed(student, 0.003, 2)
    made = []
    for n in range(8):
        text = {
            "prompt": "" if n == 3 else f"What is {n} plus {n}? ",
            "completion": f"It is {2 * n}." + " Why? " * (n % 4),
        }
        ids, mask, *_ = tokenize_row(text, tokenizer, "here")
        row = {**text, "input_ids": ids, "completion_mask": mask, "tokenizer": tokenizer_fingerprint(tokenizer)}
        row["behavior_policy"] = "behavior"
        with torch.no_grad():
            for name, model in (("behavior_logprobs", behavior), ("ref_logprobs", before)):
                logprobs = logits_of(model, ids).log_softmax(-1)
                row[name] = [logprobs[t - 1, ids[t]].item() if mask[t] else 0.0 for t in range(len(ids))]
            for name, temperature in TEMPERATURE.items():
                top = (logits_of(teacher, ids) / temperature).log_softmax(-1).float().topk(K)
                for what, values in (("ids", top.indices), ("logprobs", top.values)):
                    row[f"{name}_{what}"] = [values[t - 1].tolist() if mask[t] else [] for t in range(len(ids))]
        if n % 3 == 0:
            row["label"] = n == 6  # wrong, right, wrong; the others have none and are right
        if n == 5:
            row["label"] = False
        made.append(row)
    return made


def write(path, rows, options=None, **changes):
    """A file with the columns that `options` ask for."""
    options = options or {}
    warm = options.get("distill_temperature", 1.0) == 2.0
    made = []
    for row in rows:
        row = {**row, **changes}
        if warm:
            row |= {"top_k_ids": row["top_k_warm_ids"], "top_k_logprobs": row["top_k_warm_logprobs"]}
        row["top_k_temperature"] = 2.0 if warm else 1.0
        if not options.get("negatives"):
            row.pop("label", None)
        made.append({name: value for name, value in row.items() if "warm" not in name})
    write_scored(path, made)
    return path


@pytest.fixture
def make_trainer(tokenizer, student, teacher, rows, tmp_path):
    """make_trainer(name of OBJECTIVES, **more options); `student`, `teacher` and `data` may be others."""

    def make(name, *, student=student, teacher=teacher, data=None, peft_config=None, **more) -> PEARSFTTrainer:
        options = OBJECTIVES[name] | more
        in_memory = options.pop("memory", False)
        args = make_config(options.pop("output_dir", tmp_path / "run"), **options)
        columns = args.more_columns(in_memory)
        path = write(tmp_path / "scored.jsonl", rows, options) if data is None else data
        trainer = PEARSFTTrainer(
            copy.deepcopy(student),
            args,
            teacher=copy.deepcopy(teacher) if in_memory else None,
            train_dataset=load_scored(path, tokenizer, columns=columns, temperature=args.distill_temperature),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.model.train()
        return trainer

    return make


# ---------------------------------------------------------------------------------------------------------------------
# The formulas once more, row by row from full float64 logits, sharing no code


def pear_weight(delta: list[float], level: str) -> list[float]:
    """G_t of one response from its log-ratios, with the options of every test here."""
    low, high = OPTIONS["log_ratio_clip"]
    delta, n, gamma = [min(max(d, low), high) for d in delta], len(delta), OPTIONS["gamma"]
    if level == "sequence":
        return [math.exp(sum(delta))] * n
    size = 1 if level == "token" else OPTIONS["block_size"]
    ends = [min((t // size + 1) * size, n) for t in range(n)]
    return [math.exp((n - end) * math.log(gamma) + sum(delta[end:])) for end in ends]


def weights_of(name: str, picked, logprobs, ref):
    """w_t (n,) of a weighting, and asft's extra term."""
    p, extra = picked.detach().exp(), 0
    if name == "none":
        return torch.ones_like(p), extra
    if name == "dft":
        return p, extra
    if name == "idft":
        entropy = torch.tensor([-sum(float(v) * math.exp(v) for v in line) for line in logprobs.detach()]).double()
        low, high = OBJECTIVES["idft"]["idft_clip"]
        return p ** torch.exp(-(picked.detach() + entropy)).clip(low, high), extra
    ratio = p / ref.exp()
    if name == "iw-sft":
        return torch.full_like(p, min((TAU * ratio.log().mean()).exp().item(), MAX)), extra
    if name == "psft":
        return torch.where(ratio <= 1.02, ratio, 0.0), extra
    q, p_live = ref.exp(), picked.exp()
    return p, 0.7 * (q * (q / p_live).log() + (1 - q) * ((1 - q) / (1 - p_live)).log())


def divergence_of(name: str, student, teacher, beta: float):
    """D_t (n,) between probabilities (n, outcomes)."""

    def kl(a, b):
        return (a * (a.log() - b.log())).sum(-1)

    if name == "forward":
        return kl(teacher, student)
    if name == "reverse":
        return kl(student, teacher)
    middle = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, middle) + (1 - beta) * kl(student, middle)


def outcomes(probabilities, ids):
    """(n, V) -> (n, K + 1): the K tokens and all others together."""
    top = probabilities.gather(-1, ids)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)


def naive(model, rows, name, teacher=None):
    """(sum of the losses of all tokens, statistics) of an objective."""
    options = OPTIONS | {"weighting": "pear", "distill": "none", "nll_coef": 0, "js_beta": 0.5} | OBJECTIVES[name]
    total, seen = 0.0, {"nll": [], "wrong_nll": [], "log_ratio_mean": [], "divergence": [], "weights": []}
    for row in rows:
        where = [t for t, bit in enumerate(row["completion_mask"]) if bit]
        before = [t - 1 for t in where]
        logits = logits_of(model, row["input_ids"])[before]
        logprobs = logits.log_softmax(-1)
        picked = logprobs.gather(-1, torch.tensor(row["input_ids"])[where][:, None])[:, 0]
        behavior, ref = (torch.tensor(row[c]).double()[where] for c in ("behavior_logprobs", "ref_logprobs"))
        delta = (picked.detach() - behavior).tolist()
        right = not options.get("negatives") or row.get("label", True)
        seen["nll" if right else "wrong_nll"] += (-picked).tolist()
        seen["log_ratio_mean"] += delta if right else []
        if not right:
            weight = pear_weight(delta, "sequence")[0]
            total = total - 0.4 * weight * torch.minimum(-picked, torch.tensor(-FLOOR).double()).sum()
            continue
        if options["weighting"] == "pear":
            weights, extra = torch.tensor(pear_weight(delta, options["level"])).double(), 0
        else:
            weights, extra = weights_of(options["weighting"], picked, logprobs, ref)
        if teacher is not None:
            their_logits = logits_of(teacher, row["input_ids"])[before][:, : logits.shape[-1]].detach()
        if options["weighting"] == "asft" and options.get("memory"):  # the whole KL
            theirs = their_logits.log_softmax(-1)
            extra = 0.7 * F.kl_div(logprobs, theirs, log_target=True, reduction="none").sum(-1)
        seen["weights"] += weights.tolist()
        losses = -picked
        if options["distill"] != "none":
            temperature = options.get("distill_temperature", 1.0)
            own = (logits / temperature).softmax(-1)
            theirs = (their_logits / temperature).softmax(-1)
            if not options.get("memory"):
                ids = theirs.topk(K).indices
                own, theirs = outcomes(own, ids), outcomes(theirs, ids)
            found = divergence_of(options["distill"], own, theirs.detach(), options["js_beta"])
            seen["divergence"] += found.tolist()
            losses = found + options["nll_coef"] * losses
        total = total + (weights * losses + extra).sum()
    return total, seen


def mean(values):
    return sum(values) / len(values)


# ---------------------------------------------------------------------------------------------------------------------
# The losses


@pytest.mark.parametrize("layout", ["padded", "packing", "padding_free"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_those_of_full_logits(student, teacher, rows, make_trainer, name, layout):
    """In micro-batches of unlike numbers of tokens, and packs padded to a multiple of 8."""
    more = {} if layout == "padded" else {layout: True, "max_length": 96, "pad_to_multiple_of": 8}
    trainer = make_trainer(name, **more)
    n = len(trainer.train_dataset)
    assert (n < len(rows)) == (layout == "packing")
    losses = []
    for first in range(0, n, 3):
        batch = batch_of(trainer, range(first, min(first + 3, n)))
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50)))
        losses[-1].backward()
    plain = copy.deepcopy(student)
    total, seen = naive(plain, rows, name, teacher)
    (total / 50).backward()
    assert sum(losses).item() == pytest.approx(total.item() / 50, rel=2e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    check_statistics(trainer._read_stats("train"), seen, name)


def check_statistics(found, seen, name):
    options = OBJECTIVES[name]
    expected = {"nll": mean(seen["nll"]), "log_ratio_mean": mean(seen["log_ratio_mean"]), "tokens": len(seen["nll"])}
    weights = torch.tensor(seen["weights"], dtype=torch.float64)
    if options.get("weighting", "pear") != "none" and name != "asft":  # whose weights have the KL's gradient in them
        expected["weight_mean"] = weights.mean().item()
        expected["effective_sample_size"] = (weights.sum() ** 2 / len(weights) / weights.square().sum()).item()
    if name in WEIGHTED and name not in ("none", "asft"):
        expected |= {"weight_max": weights.max().item(), "weight_zero": (weights == 0).double().mean().item()}
    if name == "iw-sft":
        expected["weight_ceiling"] = (weights == MAX).double().mean().item()
        assert 0 < expected["weight_ceiling"] < 1 and found["pear/weight_floor"] == 0
    if name == "psft":
        assert 0 < found["pear/weight_zero"] < 1
    assert ("pear/ref_log_ratio_mean" in found) == (name in ("iw-sft", "psft", "asft"))  # none of a model in memory
    if "negatives" in options:
        below = mean([nll >= -FLOOR for nll in seen["wrong_nll"]])
        expected |= {"wrong_nll": mean(seen["wrong_nll"]), "wrong_tokens": len(seen["wrong_nll"])}
        expected |= {"wrong_below_floor": below}
        assert 0 < below < 1
    if "distill" in options:
        expected["divergence"] = mean(seen["divergence"])
    for key, value in expected.items():
        assert found[f"pear/{key}"] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    if options.get("weighting") == "none":
        assert "pear/weight_mean" not in found


@pytest.mark.parametrize("name", OBJECTIVES)
def test_first_step_with_accumulation(student, teacher, rows, make_trainer, name):
    """All rows in one step of four micro-batches: the loss that is logged, and where plain gradient descent goes."""
    trainer = make_trainer(name, per_device_train_batch_size=2, gradient_accumulation_steps=4, learning_rate=1.0)
    plain = copy.deepcopy(student)
    trainer.train()
    total, seen = naive(plain, rows, name, teacher)
    tokens = len(seen["nll"]) + len(seen["wrong_nll"])
    (total / tokens).backward()
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(total.item() / tokens, rel=1e-4)
    check_statistics(logged, seen, name)
    before, after = plain.state_dict(), trainer.model.state_dict()
    steps = {key: before[key] - after[key] for key in gradients(plain)}
    assert_close(steps, gradients(plain), 1e-3)


def test_a_teacher_in_memory_needs_the_whole_gradient(make_trainer):
    message = (
        "gradient_tolerance = 0.01 does not go with weighting = 'asft' towards a teacher in memory, whose gradient"
    )
    with pytest.raises(DataError, match=message):
        make_trainer("asft-memory", gradient_tolerance=0.01)


@pytest.mark.parametrize("layout", ["padded", "packing"])
def test_first_step_of_asft_with_a_model_in_memory(student, teacher, rows, make_trainer, tmp_path, layout):
    """The loss that is logged, from data without `ref_logprobs`; twice, and the reference is what it was."""
    more = {"packing": True, "max_length": 96} if layout == "packing" else {}
    path = write(tmp_path / "no_ref.jsonl", drop(rows, "ref_logprobs"))
    trainer = make_trainer(
        "asft-memory", data=path, per_device_train_batch_size=8, learning_rate=0.1, max_steps=2, **more
    )
    trainer.train()
    total, seen = naive(student, rows, "asft-memory", teacher)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(total.item() / len(seen["nll"]), rel=1e-4)
    assert trainer.state.log_history[1]["loss"] < logged["loss"]
    for parameter, before in zip(trainer._teacher.model.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(parameter, before)


@pytest.mark.parametrize("name", ["dft", "negatives-token", "forward-memory", "asft-memory", "js-top_k_warm"])
def test_no_logits_are_made_and_evaluation_reports_plain_nll(student, teacher, rows, make_trainer, name):
    trainer = make_trainer(name, per_device_eval_batch_size=3, learning_rate=0.0)
    for model in [trainer.model] + ([trainer._teacher.model] if trainer._teacher else []):
        forbid_logits(model)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    total, seen = naive(student, rows, name, teacher)
    logged = trainer.state.log_history[-1]
    assert logged["eval_pear/nll"] == pytest.approx(mean(seen["nll"]), rel=1e-5)
    if name == "negatives-token":
        assert logged["eval_pear/wrong_nll"] == pytest.approx(mean(seen["wrong_nll"]), rel=1e-5)


@pytest.mark.parametrize("name", ["psft", "idft", "asft-memory", "negatives-sequence", "js-memory", "reverse-top_k"])
def test_bf16_autocast_stays_near_float32(make_trainer, teacher, rows, student, name):
    trainer = make_trainer(name, bf16=True, use_cpu=True)
    batch = batch_of(trainer, range(len(rows)))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    loss.backward()
    assert loss.dtype == torch.float32 and {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(naive(student, rows, name, teacher)[0].item() / 50, rel=0.1, abs=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(trainer.model).values())


@pytest.mark.parametrize("name", ["asft", "asft-memory", "negatives-token", "forward-memory"])
def test_lora_trains_the_adapter_alone(make_trainer, student, teacher, rows, name):
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = make_trainer(name, peft_config=lora)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(8)), num_items_in_batch=torch.tensor(50))
    loss.backward()
    plain = peft.get_peft_model(copy.deepcopy(student), lora)
    plain.load_state_dict(trainer.model.state_dict())
    total, _ = naive(plain, rows, name, teacher)
    (total / 50).backward()
    assert loss.item() == pytest.approx(total.item() / 50, rel=2e-5)
    assert_close(gradients(trainer.model), gradients(plain), 1e-4)
    assert all("lora" in key for key in gradients(trainer.model))


def test_wrong_answers_are_pushed_away_and_right_ones_learned(make_trainer):
    """The same rows without their labels' sign would lower the NLL of all."""
    trainer = make_trainer("negatives-token", max_steps=12, learning_rate=0.05, per_device_train_batch_size=8,
                           negative_lambda=1.0, logprob_floor=-30.0)  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["pear/nll"] < logs[0]["pear/nll"] and logs[-1]["pear/wrong_nll"] > logs[0]["pear/wrong_nll"]


@pytest.mark.parametrize("name", ["forward-memory", "reverse-top_k", "js-top_k_warm"])
def test_distillation_nears_the_teacher(make_trainer, name):
    trainer = make_trainer(name, max_steps=8, learning_rate=0.05, per_device_train_batch_size=8, nll_coef=0.0)
    trainer.train()
    logs = [entry["pear/divergence"] for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1] < logs[0]


# ---------------------------------------------------------------------------------------------------------------------
# The teacher


def test_teacher_is_frozen_and_nowhere_in_checkpoint_or_optimiser(make_trainer, teacher, tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=2, optim="adamw_torch")
    with_teacher = make_trainer("forward-memory", output_dir=tmp_path / "a", **options)
    without = make_trainer("none", output_dir=tmp_path / "b", **options)
    for trainer in (with_teacher, without):
        trainer.train()
    held = with_teacher._teacher.model
    assert not held.training and not any(p.requires_grad or p.grad is not None for p in held.parameters())
    for parameter, before in zip(held.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(parameter, before)
    own = {id(p) for p in with_teacher.model.parameters()}
    assert {id(p) for group in with_teacher.optimizer.param_groups for p in group["params"]} <= own
    sizes = [{f.name: f.stat().st_size for f in (tmp_path / run / "checkpoint-2").iterdir()} for run in "ab"]
    assert sizes[0].keys() == sizes[1].keys() and sizes[0]["model.safetensors"] == sizes[1]["model.safetensors"]
    assert sizes[0]["optimizer.pt"] == pytest.approx(sizes[1]["optimizer.pt"], rel=0.01)


def test_teachers_that_cannot_teach_are_refused(tokenizer, make_trainer, student, teacher):
    size = len(tokenizer)
    message = (
        f"one vocabulary: the teacher's head has {size} tokens, the student's {size + 5}, of which it cannot judge"
    )
    with pytest.raises(DataError, match=f"{message} the last 5. Give a teacher with a head of at least that size"):
        make_trainer("forward-memory", student=padded_head(student, 5))
    message = (
        f"one vocabulary: the teacher's head has {size} tokens, the student's {size - 1}, but the tokenizer {size}"
    )
    with pytest.raises(DataError, match=f"{message}, so more than padding would be cut off"):
        make_trainer("forward-memory", student=padded_head(student, -1))
    for name in ("none", "dft", "psft"):
        with pytest.raises(DataError, match=f"a teacher is given, but distill is 'none' and weighting '{name}', which"):
            make_trainer(name, memory=True)
    with pytest.raises(DataError, match="this is the student itself"):
        HeldTeacher(student, student, tokenizer, torch.device("cpu"))


def padded_head(model, rows: int, mean: float = 1.0, spread: float = 1.0):
    """A copy with so many rows more, of any size, as nobody has trained them."""
    model = copy.deepcopy(model)
    size = model.config.vocab_size
    with torch.no_grad():
        model.resize_token_embeddings(size + rows)
        for layer in (model.lm_head, model.get_input_embeddings()):
            more = torch.randn(max(rows, 0), layer.weight.shape[1], generator=torch.manual_seed(3))
            layer.weight[size:] = mean + spread * more
    return model


def with_bias(model):
    model = copy.deepcopy(model)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size, generator=torch.manual_seed(4)))
    return model


@pytest.mark.parametrize("layout", ["padded", "packing"])
@pytest.mark.parametrize("name", ["forward-memory", "reverse-memory", "js-memory", "asft-memory"])
def test_longer_head_of_the_teacher_is_cut(student, teacher, rows, tokenizer, make_trainer, caplog, name, layout):
    """As in a family that pads its heads differently: 5 rows of padding are the student's, 13 the teacher's."""
    small, large = padded_head(student, 5), with_bias(padded_head(teacher, 13))
    more = {"packing": True, "max_length": 96} if layout == "packing" else {}
    trainer = make_trainer(name, student=small, teacher=large, **more)
    loss = trainer.compute_loss(
        trainer.model, batch_of(trainer, range(len(trainer.train_dataset))), num_items_in_batch=torch.tensor(50)
    )
    loss.backward()
    total, _ = naive(small, rows, name, large)
    (total / 50).backward()
    assert loss.item() == pytest.approx(total.item() / 50, rel=2e-5)
    assert_close(gradients(trainer.model), gradients(small), 1e-4)
    size = len(tokenizer)
    message = f"The teacher's head has {size + 13} rows and the student's {size + 5}, for a tokenizer of {size} tokens"
    assert caplog.text.count(message) == 1
    assert trainer._teacher.model.lm_head.weight.shape[0] == size + 13  # views of it, and no copy
    held = trainer._teacher({"input_ids": torch.tensor([[1, 2]])})
    assert held.weight.data_ptr() == trainer._teacher.model.lm_head.weight.data_ptr()
    caplog.clear()
    make_trainer(name)
    assert "head has" not in caplog.text


def test_padding_is_told_from_tokens_by_the_largest_id():
    """A tokenizer that leaves ids out has tokens beyond its length."""

    class Gaps:
        def get_vocab(self):
            return {"a": 0, "b": 1, "c": 9}

        def __len__(self):
            return 3

    assert _common_rows(12, 10, Gaps()) == 10
    with pytest.raises(DataError, match="has 12 tokens, the student's 9, but the tokenizer 10"):
        _common_rows(12, 9, Gaps())


def test_softcap_and_scale_of_the_teacher_are_its_own(tokenizer, student, rows, make_trainer, teacher):
    """A teacher whose forward caps its logits: the divergence is to the capped distribution."""
    capped = copy.deepcopy(teacher)
    capped.lm_head.register_forward_hook(lambda _module, _inputs, logits: 1.5 * torch.tanh(logits / 1.5))
    trainer = make_trainer("reverse-memory", teacher=capped)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, [0, 1]), num_items_in_batch=torch.tensor(1))
    expected = 0.0
    for i in (0, 1):
        row = trainer.train_dataset[i]
        where = [t - 1 for t, label in enumerate(row["labels"]) if label != -100]
        where = [t for t in where if t >= 0]
        with torch.no_grad():
            own = logits_of(student, row["input_ids"])[where].softmax(-1)
            theirs = (1.5 * torch.tanh(logits_of(teacher, row["input_ids"])[where] / 1.5)).softmax(-1)
        expected += divergence_of("reverse", own, theirs, 0.5).sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Data that does not fit the options


def drop(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.parametrize("name", ["iw-sft", "psft", "asft"])
def test_missing_ref_logprobs_name_the_command(tokenizer, rows, tmp_path, name):
    path = write(tmp_path / "s.jsonl", drop(rows, "ref_logprobs"))
    command = f"pear score --column ref_logprobs --model <initial student> --data {path} --out {path}"
    with pytest.raises(
        DataError, match=f"s.jsonl:1: no `ref_logprobs`: `{command}` writes it; or, with weighting asft"
    ):
        load_scored(path, tokenizer, columns=make_config(tmp_path, **OBJECTIVES[name]).more_columns())
    assert "ref_logprobs" not in load_scored(path, tokenizer).column_names


def test_wrong_answers_are_never_trained_on_silently(tokenizer, rows, make_trainer, tmp_path, caplog):
    path = write(tmp_path / "s.jsonl", rows, {"negatives": True})
    with pytest.raises(DataError, match=r'3 of 8 rows have "label": false \(lines 1, 4, 6\).*Pass --negatives'):
        load_scored(path, tokenizer)
    with pytest.raises(DataError, match="label"):
        load_scored(write(tmp_path / "l.jsonl", rows, {"negatives": True}, label="no"), tokenizer)
    data = load_scored(path, tokenizer, columns=("sequence_label",))
    with pytest.raises(DataError, match="train dataset: 3 of 8 rows are wrong answers, and negatives is off"):
        PEARSFTTrainer(
            make_model(tokenizer), make_config(tmp_path / "run"), train_dataset=data, processing_class=tokenizer
        )
    make_trainer("negatives-token")
    assert "no row of the training data" not in caplog.text
    make_trainer("negatives-token", data=write(tmp_path / "r.jsonl", rows))
    assert 'no row of the training data has "label": false: this is plain PEAR' in caplog.text


def test_top_k_that_is_missing_or_at_another_temperature(tokenizer, rows, tmp_path):
    columns = make_config(tmp_path, distill="forward").more_columns()
    path = write(tmp_path / "s.jsonl", drop(rows, "top_k_ids", "top_k_logprobs"))
    command = f"pear score --column none --top_k K --top_k_temperature 2 --model <teacher> --data {path} --out {path}"
    message = rf"s.jsonl:1: no `top_k_ids`: `{command}` writes it, and every log-prob stays .*; or pass --teacher"
    with pytest.raises(DataError, match=message):
        load_scored(path, tokenizer, columns=columns, temperature=2.0)
    path = write(tmp_path / "s.jsonl", rows)
    message = "s.jsonl:1: .*at top_k_temperature = 1, but distill_temperature = 2: pass --distill_temperature 1"
    message += ", or score again with `pear score --column none --top_k K --top_k_temperature 2`"
    with pytest.raises(DataError, match=message):
        load_scored(path, tokenizer, columns=columns, temperature=2.0)
    data = load_scored(path, tokenizer, columns=columns)
    with pytest.raises(DataError, match="top_k_temperature = 1, but distill_temperature = 2"):
        PEARSFTTrainer(
            make_model(tokenizer),
            make_config(tmp_path / "run", distill="forward", distill_temperature=2.0),
            train_dataset=data,
            processing_class=tokenizer,
        )


def test_top_k_of_another_vocabulary(tokenizer, rows, tmp_path, make_trainer):
    columns = make_config(tmp_path, distill="forward").more_columns()
    path = write(tmp_path / "s.jsonl", rows, tokenizer="0123")
    fingerprint = rows[0]["tokenizer"]
    with pytest.raises(DataError, match=f"s.jsonl:1: .*fingerprint '0123', the student's is '{fingerprint}'"):
        load_scored(path, tokenizer, columns=columns)
    changed = copy.deepcopy(rows)
    changed[4]["top_k_ids"][-1][2] = 5000
    with pytest.raises(DataError, match=f"top_k_ids go up to 5000, the student's head has {len(tokenizer)} tokens"):
        make_trainer("forward-top_k", data=write(tmp_path / "v.jsonl", changed))
    size = len(tokenizer)
    changed = [row | {"top_k_vocabulary": size} for row in rows]
    del changed[0]["top_k_vocabulary"]  # a row that does not tell
    make_trainer("forward-top_k", data=write(tmp_path / "h.jsonl", changed))
    changed[5]["top_k_vocabulary"] = size + 13  # its ids are all below the student's, but nothing tells its tokenizer
    with pytest.raises(DataError, match=f"top_k_vocabulary is {size + 13}, the student's head has {size} tokens"):
        make_trainer("forward-top_k", data=write(tmp_path / "h.jsonl", changed))
    data = load_scored(tmp_path / "h.jsonl", tokenizer, columns=columns)
    PEARSFTTrainer(  # asks for no top-k
        make_model(tokenizer), make_config(tmp_path / "run"), train_dataset=data, processing_class=tokenizer
    )
    changed = copy.deepcopy(rows)
    for key in ("top_k_ids", "top_k_logprobs"):
        changed[2][key] = [values[:3] for values in changed[2][key]]
    with pytest.raises(
        DataError, match="k.jsonl:3: the top-k log-probs are of K = 3 tokens, those of the first row of 6"
    ):
        load_scored(write(tmp_path / "k.jsonl", changed), tokenizer, columns=columns)


@pytest.mark.parametrize("more", [-1, 13])
def test_top_k_of_a_head_of_another_size(tokenizer, student, rows, tmp_path, make_trainer, more):
    """The tokenizer is the same and so are the K + 1 outcomes, whatever the size of the teacher's head."""
    own, size = vocabulary_fingerprint(tokenizer), len(tokenizer)
    told = [row | {"top_k_vocabulary": size + more, "top_k_tokenizer": own} for row in rows]
    trainer = make_trainer("forward-top_k", data=write(tmp_path / "t.jsonl", told))
    batch = batch_of(trainer, range(8))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(50))
    as_before = make_trainer("forward-top_k")
    batch = batch_of(as_before, range(8))
    assert loss.item() == as_before.compute_loss(as_before.model, batch, num_items_in_batch=torch.tensor(50)).item()
    changed = copy.deepcopy(told)
    changed[4]["top_k_ids"][-1][2] = size
    with pytest.raises(DataError, match=f"top_k_ids go up to {size}, the student's head has {size} tokens"):
        make_trainer("forward-top_k", data=write(tmp_path / "v.jsonl", changed))
    make_trainer("forward-top_k", data=write(tmp_path / "v.jsonl", changed), student=padded_head(student, 1))

    columns = make_config(tmp_path, distill="forward").more_columns()
    changed = copy.deepcopy(told)
    changed[2]["top_k_tokenizer"] = "0123"
    path = write(tmp_path / "o.jsonl", changed)
    message = (
        f"o.jsonl:3: .*fingerprint '0123' and of a head with {size + more} rows, the student's .* '{own}' and its "
    )
    for given, named in ((size, size), (None, "unknown")):
        with pytest.raises(DataError, match=f"{message}head {named} rows"):
            load_scored(path, tokenizer, columns=columns, head_size=given)
    load_scored(path, tokenizer)  # asks for no top-k


def test_top_k_of_a_teacher_with_another_chat_template(tokenizer, rows, tmp_path):
    """The rows' fingerprint is another, with ids that are the student's; what `pear score` tells beside it decides."""
    columns = make_config(tmp_path, distill="forward").more_columns()
    other = [row | {"tokenizer": "0123"} for row in rows]
    with pytest.raises(
        DataError, match="s.jsonl:1: .*fingerprint '0123', .*in its chat template alone, score the top-k"
    ):
        load_scored(write(tmp_path / "s.jsonl", other), tokenizer, columns=columns)
    told = [row | {"top_k_tokenizer": vocabulary_fingerprint(tokenizer)} for row in other]
    assert len(load_scored(write(tmp_path / "s.jsonl", told), tokenizer, columns=columns)) == len(rows)


def test_dataset_without_the_columns_is_refused(tokenizer, rows, tmp_path):
    data = load_scored(write(tmp_path / "s.jsonl", rows), tokenizer)
    for options, missing in (
        (OBJECTIVES["asft"], "ref_logprobs"),
        (OBJECTIVES["negatives-token"], "sequence_label"),
        (OBJECTIVES["forward-top_k"], "top_k_ids, top_k_logprobs, top_k_temperature, top_k_vocabulary"),
    ):
        with pytest.raises(DataError, match=f"train dataset: no column {missing}; .*columns=args.more_columns"):
            PEARSFTTrainer(
                make_model(tokenizer),
                make_config(tmp_path / "run", **options),
                train_dataset=data,
                processing_class=tokenizer,
            )


# ---------------------------------------------------------------------------------------------------------------------
# Options


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weighting": "word"}, "weighting must be one of pear, none, dft, iw-sft, psft, asft, idft, got 'word'"),
        ({"distill": "kl"}, "distill must be one of none, forward, reverse, js, got 'kl'"),
        ({"weighting": "dft", "negatives": True}, "negatives goes with weighting 'pear' alone, got 'dft'"),
        ({"distill": "js", "negatives": True}, "negatives does not go with distill = 'js'"),
        ({"distill": "js", "weighting": "dft"}, "distill = 'js' goes with weighting 'pear' or 'none', got 'dft'"),
        ({"iw_tau": math.nan}, "iw_tau must be a finite number, got nan"),
        ({"iw_max": -1.0}, "iw_max must be a number of at least 0, got -1.0"),
        ({"psft_clip": -0.1}, "psft_clip must be a number of at least 0, got -0.1"),
        ({"asft_kl": math.inf}, "asft_kl must be a number of at least 0, got inf"),
        ({"idft_clip": [2.0, 0.1]}, r"idft_clip must be .* 0 <= low <= high, got \(2.0, 0.1\)"),
        ({"idft_clip": [1.0]}, "idft_clip must be two numbers"),
        ({"negative_lambda": -1.0}, "negative_lambda must be a number of at least 0, got -1.0"),
        ({"logprob_floor": 0.5}, "logprob_floor must be a log-prob, at most 0 .*, got 0.5"),
        ({"logprob_floor": math.nan}, "logprob_floor must be a log-prob, at most 0 .*, got nan"),
        ({"js_beta": 1.0}, "js_beta must lie between 0 and 1, got 1.0"),
        ({"distill_temperature": 0.0}, "distill_temperature must be a positive number, got 0.0"),
        ({"nll_coef": -0.5}, "nll_coef must be a number of at least 0, got -0.5"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)
    make_config(tmp_path, logprob_floor=-math.inf, iw_tau=-1.0, asft_kl=0.0, idft_clip=[1.0, 1.0])


# ---------------------------------------------------------------------------------------------------------------------
# Warnings in words


def test_weights_of_one_kind_are_told_once(make_trainer, rows, tmp_path, caplog):
    """All log-ratios to the reference huge: every weight at iw_max, or near 0, or past psft's clip."""
    far = [row | {"ref_logprobs": [-40.0 * bit for bit in row["completion_mask"]]} for row in rows]
    sure = [row | {"ref_logprobs": [0.0 for _ in row["completion_mask"]]} for row in rows]
    for data, message in (
        (far, "100% of the response tokens have their weight at iw_max = 1.05, and 0% have one near 0"),
        (sure, "0% of the response tokens have their weight at iw_max = 1.05, and 100% have one near 0"),
    ):
        caplog.clear()
        make_trainer("iw-sft", data=write(tmp_path / "w.jsonl", data), max_steps=3, iw_tau=3.0).train()
        assert caplog.text.count(message) == 1
        assert "iw-sft: before the first update the student's log-probs differ from `ref_logprobs` by" in caplog.text
    caplog.clear()
    make_trainer("psft", data=write(tmp_path / "w.jsonl", far), max_steps=1).train()
    assert "psft: 100% of the response tokens have become more than 2% likelier" in caplog.text
    caplog.clear()
    make_trainer("iw-sft", iw_max=16.0).train()
    make_trainer("psft", psft_clip=0.28).train()
    assert "of the response tokens have" not in caplog.text and "ref_logprobs" not in caplog.text


@pytest.mark.parametrize("name", ["dft", "idft"])
def test_few_tokens_that_carry_the_gradient_are_told(make_trainer, caplog, monkeypatch, name):
    make_trainer(name).train()
    assert "effective_sample_size" not in caplog.text
    monkeypatch.setattr("pear.health.FEW", 1.0)
    trainer = make_trainer(name)
    trainer.train()
    share = trainer.state.log_history[0]["pear/effective_sample_size"]
    assert f"{name}: effective_sample_size is {share:.1%}: the gradient rests on that share" in caplog.text


def test_nothing_is_logged_of_answers_that_were_not_there(make_trainer, rows, tmp_path):
    """A step without a wrong answer has no NLL of wrong answers, which is not the same as one of 0."""
    first = [row | {"label": i > 0} for i, row in enumerate(rows)]
    path = write(tmp_path / "w.jsonl", first, {"negatives": True})
    trainer = make_trainer("negatives-token", data=path, per_device_train_batch_size=1, max_steps=8)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["pear/wrong_tokens"] > 0 for entry in logs].count(True) == 1
    for entry in logs:
        assert ("pear/wrong_nll" in entry) == (entry["pear/wrong_tokens"] > 0)
        assert ("pear/nll" in entry) == ("pear/weight_mean" in entry) == (entry["pear/tokens"] > 0)


def test_wrong_answers_that_teach_nothing_are_told(make_trainer, rows, tmp_path, caplog):
    mostly = [row | {"label": i == 0} for i, row in enumerate(rows)]
    path = write(tmp_path / "w.jsonl", mostly, {"negatives": True})
    make_trainer("negatives-token", data=path, per_device_train_batch_size=8, logprob_floor=-30.0).train()
    right, *wrong = (sum(row["completion_mask"]) for row in rows)
    message = f"has {sum(wrong)} tokens of wrong answers against {right} of right ones, more than 4 to 1: the student"
    assert message in caplog.text
    assert "logprob_floor" not in caplog.text
    caplog.clear()
    make_trainer("negatives-token", logprob_floor=-0.01, per_device_train_batch_size=8).train()
    assert "100% of the wrong answers' tokens are less likely than logprob_floor = -0.01 already" in caplog.text
    assert "4 to 1" not in caplog.text


@pytest.mark.parametrize("packing", [False, True])
def test_asft_from_another_model_than_the_student_is_told(make_trainer, student, caplog, packing):
    make_trainer("asft-memory", packing=packing, teacher=perturbed(student, 0.003, 2)).train()
    assert "differ from" not in caplog.text
    make_trainer("asft-memory", packing=packing, max_steps=3).train()
    assert caplog.text.count("asft: before the first update the student's log-probs differ from the teacher's by") == 1


def test_copy_of_the_student_as_teacher_is_called_so(make_trainer, student, caplog):
    make_trainer("forward-memory", teacher=student, max_steps=3, logging_steps=3).train()
    assert "the divergence is near 0" in caplog.text and "the teacher is a copy of the student" in caplog.text
    caplog.clear()
    make_trainer("forward-memory").train()
    make_trainer("js-top_k_warm").train()
    assert "the teacher is a copy" not in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Resume, and the command


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("name", ["iw-sft", "asft-memory", "negatives-token", "js-memory", "forward-top_k"])
def test_resume_is_exact(make_trainer, tmp_path, name, packing):
    options = dict(
        max_steps=4, per_device_train_batch_size=1, gradient_accumulation_steps=2, optim="adamw_torch", packing=packing,
        lr_scheduler_type="linear", save_strategy="steps", save_steps=2,
    )  # fmt: skip
    whole = make_trainer(name, output_dir=tmp_path / "a", **options)
    whole.train()
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    resumed = make_trainer(name, output_dir=tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    for (key, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    logs = [[entry for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert len(logs[0]) == 4
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "num_tokens"} == {k: v for k, v in b.items() if k != "num_tokens"}


@pytest.fixture(scope="module")
def folders(save_model):
    return save_model(seed=0), save_model(seed=5)


def argv(folder, data, out, *more) -> list[str]:
    flags = (
        f"--model {folder} --data {data} --output_dir {out} --max_steps 2 --report_to none --logging_steps 1 "
        "--per_device_train_batch_size 4 --disable_tqdm true --save_strategy no --dataloader_pin_memory false"
    )
    return [*flags.split(), *more]


@pytest.mark.parametrize(
    "name, line",
    [
        ("dft", "--weighting dft"),
        ("idft", "--weighting idft --idft_clip 0.3 1.1"),
        ("asft", "--weighting asft --asft_kl 0.7 --packing --max_length 64"),
        ("asft-memory", "--weighting asft --asft_kl 0.7 --teacher {teacher}"),
        ("negatives-token", "--negatives --negative_lambda 0.4 --logprob_floor -6"),
        ("forward-top_k", "--distill forward --weighting none --packing --max_length 64"),
        ("js-memory", "--distill js --js_beta 0.2 --distill_temperature 2 --nll_coef 0.3 --teacher {teacher}"),
    ],
)
def test_command_line_and_its_record(folders, rows, tmp_path, name, line):
    """Flags arrive, and run.json names the objective and what was logged of it."""
    rows = drop(rows, "ref_logprobs") if name == "asft-memory" else rows
    path = write(tmp_path / "s.jsonl", rows, OBJECTIVES[name])
    line = line.format(teacher=folders[1])
    trainer = main(argv(folders[0], path, tmp_path / "out", "--eval_data", str(path), *line.split()))
    options = {key: value for key, value in OBJECTIVES[name].items() if key != "memory"}
    run = read_run(tmp_path / "out")
    for key, value in ({"weighting": "pear", "distill": "none", "negatives": False} | options).items():
        assert getattr(trainer.args, key) == value and run.settings[key] == value
    assert run.settings.get("teacher") == (str(folders[1]) if "memory" in name else None)
    logged = {key for entry in run.log for key in entry}
    assert "pear/nll" in logged and "eval_pear/nll" in logged
    for key, is_there in (
        ("weight_zero", name in WEIGHTED),
        ("wrong_nll", name in NEGATIVES),
        ("divergence", name in DISTILLED),
    ):
        assert (f"pear/{key}" in logged) == is_there


def test_command_line_refuses_teachers_of_other_tokens(folders, rows, tokenizer, tmp_path):
    path = write(tmp_path / "s.jsonl", rows)
    line = argv(folders[0], path, tmp_path / "out", "--teacher", str(folders[1]))
    with pytest.raises(
        DataError, match="teacher is .*, but distill is 'none' and weighting 'pear', which look at none"
    ):
        main(line)
    with pytest.raises(
        DataError, match="teacher is .*, but distill is 'none' and weighting 'iw-sft'.*weighting to asft"
    ):
        main([*line, "--weighting", "iw-sft"])
    other = make_tokenizer(["aardvark zebra quokka " * 9, "It is not the same corpus."], vocab_size=len(tokenizer))
    other.add_tokens([f"<extra{i}>" for i in range(len(tokenizer) - len(other))])
    make_model(other).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    sizes = f"{len(other)} and {len(tokenizer)} tokens, fingerprints [0-9a-f]+ and {rows[0]['tokenizer']}, and id"
    with pytest.raises(DataError, match=f"has another tokenizer than the student: {sizes} .* to the teacher"):
        main([*line[:-1], str(tmp_path / "other"), "--distill", "forward"])
    # another chat template makes other ids of a text, but ids are what the teacher is given
    same = make_tokenizer()
    same.chat_template = "{{ messages[0]['content'] }}"
    make_model(same, seed=3).save_pretrained(tmp_path / "same")
    same.save_pretrained(tmp_path / "same")
    main([*line[:-1], str(tmp_path / "same"), "--distill", "forward"])


def test_command_line_with_heads_of_two_sizes(tokenizer, student, jsonl, text_rows, tmp_path, caplog):
    """`pear score --top_k` and `--teacher` with a longer head than the student's; another tokenizer names both."""
    longer = make_model(tokenizer, seed=5)  # a llama too, since transformers adds a token to tokenizers of qwen2
    small, large, other = (tmp_path / name for name in ("small", "large", "other"))
    more = make_tokenizer()
    more.add_tokens(["<think>"])
    for folder, model, words in (
        (small, padded_head(student, 5), tokenizer),
        (large, padded_head(longer, 13, 0, 0), tokenizer),  # in nobody's top 60
        (other, padded_head(longer, 13, 0, 0), more),
    ):
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    scored, options = tmp_path / "scored.jsonl", {"progress": False}
    score(str(small), jsonl(text_rows), scored, **options)
    losses = []
    for name, flags in (("memory", ["--teacher", str(large)]), ("file", [])):
        if name == "file":
            score(str(large), scored, scored, column="none", top_k=60, **options)
        main(argv(small, scored, tmp_path / name, "--distill", "forward", "--weighting", "none", *flags))
        losses.append(read_run(tmp_path / name).log[0]["pear/divergence"])
    assert 0 < losses[1] and losses[1] == pytest.approx(losses[0], rel=0.5)  # most of the mass, and nearly the cut head
    assert caplog.text.count("rows and the student's") == 1
    size = len(tokenizer)
    with pytest.raises(DataError, match="has another tokenizer than the student"):
        main(argv(small, scored, tmp_path / "out", "--distill", "forward", "--teacher", str(other)))
    score(str(other), scored, scored, column="none", top_k=6, **options)
    fingerprints = vocabulary_fingerprint(more), vocabulary_fingerprint(tokenizer)
    message = "scored.jsonl:1: .*fingerprint '{}' and of a head with {} rows, .* has '{}' and its head {} rows"
    with pytest.raises(DataError, match=message.format(fingerprints[0], size + 13, fingerprints[1], size + 5)):
        main(argv(small, scored, tmp_path / "out", "--distill", "forward"))
    assert not (tmp_path / "out").exists()


def test_top_k_from_score_to_sft(folders, jsonl, text_rows, tmp_path):
    """`pear score` with a teacher, `pear sft --distill` from the file: nearly the run with that teacher in memory."""
    from typer.testing import CliRunner

    from pear.cli import app

    scored, k = tmp_path / "scored.jsonl", 60
    top = ["--column", "none", "--top_k", k, "--top_k_temperature", 2]
    for model, data, more in ((folders[0], jsonl(text_rows), []), (folders[1], scored, top)):
        command = ["score", "--model", model, "--data", data, "--out", scored, *more]
        result = CliRunner().invoke(app, [str(part) for part in command])
        assert result.exit_code == 0, result.output
    assert {len(ids) for _, row in read_jsonl(scored) for ids in row["top_k_ids"]} == {0, k}
    losses = []
    for name, more in (("file", []), ("memory", ["--teacher", str(folders[1])])):
        line = ["--distill", "forward", "--weighting", "none", "--distill_temperature", "2", *more]
        result = CliRunner().invoke(app, ["sft", *argv(folders[0], scored, tmp_path / name, *line)])
        assert result.exit_code == 0, result.output
        losses.append(read_run(tmp_path / name).log[0]["pear/divergence"])
    # merging outcomes can only lower a divergence, and 60 of 400 tokens hold most of the mass
    assert 0 < losses[0] <= losses[1] and losses[0] == pytest.approx(losses[1], rel=0.5)
