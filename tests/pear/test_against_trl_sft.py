"""What the installed TRL's SFTTrainer trains and logs, option by option, and what ours does otherwise.

Rows, models and seeds are the same for both; what TRL logs is read from its source, so that a new name fails a test
here until it is run or has its reason in a table. `test_sft.py` compares mixtures of experts and LoRA.
"""

import copy
import inspect
import re

import pytest
import torch
from datasets import Dataset, Features
from tiny import make_model
from training import make_config
from trl import SFTConfig, SFTTrainer

from pear.io import DataError
from pear.scored import COLUMNS, FEATURES
from pear.sft import PEARSFTTrainer
from pear.sft_config import PEARSFTConfig, eval_files

# Options that both trainers take; "theirs" and "ours" are options of one of them, and "train", "eval" choose data
RUNS = {
    "padded": {},
    "dft": dict(theirs=dict(loss_type="dft"), ours=dict(weighting="dft")),
    "accumulation": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "logged every two steps": dict(logging_steps=2, max_steps=4),
    "last batch is smaller": dict(per_device_train_batch_size=3, num_train_epochs=2, max_steps=-1),
    "packing": dict(packing=True, max_length=48, per_device_train_batch_size=1, eval="one"),
    "padding_free": dict(padding_free=True, max_length=None),
    "evaluation": dict(eval="one", eval_steps=1, eval_on_start=True),
    "evaluation in batches": dict(eval="one", eval_steps=1, per_device_eval_batch_size=2),
    "dictionary": dict(eval="two", eval_steps=1),
    "metrics": dict(eval="one", eval_steps=1, metrics=True),
    "stream": dict(train="stream", eval="stream", eval_steps=1),
    "packed stream": dict(train="stream", packing=True, max_length=48, per_device_train_batch_size=1),
}
DIFFERENCES = {  # what ours does otherwise, and why; each is tested below
    "names under pear/": "statistics of ours, beside TRL's",
    "means over tokens": "TRL averages mean_token_accuracy and entropy over micro-batches, and eval_loss over batches, "
    "whatever tokens they have; ours are over tokens, so none depends on a batch size",
    "names of a dictionary": "TRL logs eval_mean_token_accuracy, eval_entropy and eval_num_tokens of each of several "
    "evaluation sets under one name; ours put the set's name in, as both do in eval_NAME_loss",
    "wrapped packing": "it cuts responses, so ours refuses",
    "entropy of a top-k teacher's run": "the pass makes none, and ours logs none; elsewhere `log_entropy` decides",
    "completion_only_loss": "TRL can train on prompts; there are behaviour log-probs for the completion alone",
}
MEANS = ("mean_token_accuracy", "entropy", "eval_mean_token_accuracy", "eval_entropy", "eval_loss")
NOT_OVER_TOKENS = {"accumulation", "logged every two steps", "evaluation in batches", "last batch is smaller"}
TIMES = re.compile(r".*(runtime|per_second)$|total_flos")
logged: set[str] = set()


def rows(count: int, seed: int, vocabulary: int) -> Dataset:
    """Of unlike lengths; behaviour log-probs are for what `pear/` logs."""
    rng = torch.Generator().manual_seed(seed)
    table = {name: [] for name in COLUMNS}
    for _ in range(count):
        length, prompt = (int(torch.randint(*bounds, (), generator=rng)) for bounds in ((8, 40), (2, 6)))
        table["input_ids"].append(torch.randint(5, vocabulary, (length,), generator=rng).tolist())
        table["completion_mask"].append([0] * prompt + [1] * (length - prompt))
        table["behavior_logprobs"].append([0.0] * prompt + [-1.0] * (length - prompt))
    return Dataset.from_dict(table, features=Features({name: FEATURES[name] for name in COLUMNS}))


def shape_and_accuracy(prediction) -> dict[str, float]:
    right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
    return {"mine": float(right[prediction.label_ids[:, 1:] != -100].mean()), "wide": prediction.predictions.shape[-1]}


def make(is_ours: bool, tokenizer, folder, **options):
    options = dict(max_steps=2, bf16=False, **{"eval": None, "train": None}) | options
    own = {side: options.pop(side, {}) for side in ("ours", "theirs")}["ours" if is_ours else "theirs"]
    which, train = options.pop("eval"), rows(11, 1, len(tokenizer))
    evaluation = {
        None: None, "one": rows(7, 2, len(tokenizer)), "stream": rows(5, 4, len(tokenizer)).to_iterable_dataset(),
        "two": {"a": rows(5, 2, len(tokenizer)), "b": rows(4, 3, len(tokenizer))},
    }[which]  # fmt: skip
    if options.pop("train") == "stream":
        train = train.to_iterable_dataset()
    if "eval_steps" in options:
        options["eval_strategy"] = "steps"
    metrics = shape_and_accuracy if options.pop("metrics", False) else None
    config = make_config(folder, **{"weighting": "none"} | options | (own if is_ours else {}))
    if not is_ours:
        names = set(inspect.signature(SFTConfig).parameters)
        same = {name: value for name, value in config.to_dict().items() if name in names}
        same |= {"bf16": False, "max_length": config.max_length, "completion_only_loss": True, **own}
        same = {name: value for name, value in same.items() if not (isinstance(value, str) and value.startswith("<"))}
        config = SFTConfig(**same)
    return (PEARSFTTrainer if is_ours else SFTTrainer)(
        make_model(tokenizer), config, train_dataset=train, eval_dataset=evaluation, processing_class=tokenizer,
        compute_metrics=metrics,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_losses_the_weights_and_the_log_of_trl_s(tokenizer, tmp_path, name):
    trainers = [make(ours, tokenizer, tmp_path / str(ours), **RUNS[name]) for ours in (True, False)]
    start = copy.deepcopy(trainers[0].model.state_dict())
    for trainer in trainers:
        trainer.train()
        if trainer.eval_dataset is not None:
            trainer.evaluate()
    ours, theirs = (trainer.model.state_dict() for trainer in trainers)
    for key in ours:
        assert (ours[key] - theirs[key]).norm() <= 1e-4 * (theirs[key] - start[key]).norm(), key
    for a, b in zip(*(trainer.state.log_history for trainer in trainers), strict=True):
        assert all("pear/" in key for key in a.keys() - b.keys() - renamed(a).keys()), DIFFERENCES["names under pear/"]
        for key, value in b.items():
            key = renamed(a).get(key, key)
            if not TIMES.match(key) and not (key in MEANS and name in NOT_OVER_TOKENS):
                assert a[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
            logged.add(key.removeprefix("eval_"))


def renamed(entry: dict) -> dict[str, str]:
    """TRL's name of a figure in an evaluation of a dictionary's set, to ours and back, by the set's own loss."""
    found = next((key for key in entry if re.fullmatch(r"eval_\w+_loss", key)), None)
    if found is None:
        return {}
    prefix = found.removesuffix("_loss")
    names = {f"eval_{name}": f"{prefix}_{name}" for name in ("mean_token_accuracy", "entropy", "num_tokens")}
    return names | {ours: theirs for theirs, ours in names.items()}


def test_the_runs_log_all_that_trl_logs():
    names = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', inspect.getsource(SFTTrainer)))
    assert names == {"entropy", "mean_token_accuracy", "num_tokens", "aux_loss"}
    if not logged:
        pytest.skip("the runs above were not in this process")
    assert names - logged == {"aux_loss"}  # of mixtures of experts: test_sft.py


# ---- what differs


def exact(trainer, dataset) -> dict[str, float]:
    """Of full float64 logits, over all response tokens."""
    model = copy.deepcopy(trainer.model).double()
    right, entropies, nll = [], [], []
    with torch.no_grad():
        for row in dataset:
            ids, counts = torch.tensor(row["input_ids"]), torch.tensor(row["completion_mask"])[1:] == 1
            logits = model(input_ids=ids[None]).logits[0, :-1][counts]
            target = ids[1:][counts]
            right.append(logits.argmax(1) == target)
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
            nll.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    found = {"mean_token_accuracy": right, "entropy": entropies, "loss": nll}
    return {f"eval_{name}": torch.cat(values).double().mean().item() for name, values in found.items()}


@pytest.mark.parametrize("layout", [{}, {"packing": True, "max_length": 64}])
def test_means_are_over_tokens_whatever_the_batch_size(tokenizer, tmp_path, layout):
    data, found = rows(7, 2, len(tokenizer)), []
    for size in (1, 3):
        trainer = make(True, tokenizer, tmp_path, per_device_eval_batch_size=size, **layout)
        # targets that the student is right about, or every accuracy is 0
        for row in (likely := data.to_list())[::2]:
            ids = torch.tensor(row["input_ids"])
            best = trainer.model(input_ids=ids[None]).logits[0].argmax(1)
            row["input_ids"][-1] = best[-2].item()
        dataset = Dataset.from_list(likely, features=data.features)
        expected = exact(trainer, dataset)
        found.append(trainer.evaluate(dataset))
        assert trainer.predict(dataset).metrics["test_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        assert expected["eval_mean_token_accuracy"] > 0
        for name, value in expected.items():
            assert found[-1][name] == pytest.approx(value, rel=1e-5), (name, size)


def test_training_figures_are_over_the_tokens_of_all_micro_batches(tokenizer, tmp_path):
    options = dict(max_steps=1, learning_rate=0.0)
    whole = make(True, tokenizer, tmp_path, per_device_train_batch_size=8, **options)
    parts = make(
        True, tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options
    )  # fmt: skip
    for trainer in (whole, parts):
        trainer.train()
    a, b = (trainer.state.log_history[0] for trainer in (whole, parts))
    for name in ("loss", "mean_token_accuracy", "entropy", "num_tokens"):
        assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_a_metric_of_ours_chooses_the_best_checkpoint(tokenizer, tmp_path):
    """By the accuracy of one set of a dictionary, as after any step it was logged."""
    trainer = make(
        True, tokenizer, tmp_path, eval="two", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2,
        metric_for_best_model="eval_b_entropy", load_best_model_at_end=True, greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    entropies = [entry["eval_b_entropy"] for entry in trainer.state.log_history if "eval_b_entropy" in entry]
    assert trainer.state.best_metric == min(entropies) and len(set(entropies)) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(eval="two"),
            "'loss' is no figure .*of several datasets, .*: it is one of a_loss, a_",
        ),
        (
            dict(eval="one", metric_for_best_model="accuracy"),
            "'accuracy' is no figure .*: it is one of loss, mean_",
        ),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused_before_training(tokenizer, tmp_path, options, message):
    run = dict(eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True)
    with pytest.raises(DataError, match=f"metric_for_best_model = {message}"):
        make(True, tokenizer, tmp_path, **run, **options)


def test_logits_are_made_for_metrics_alone(tokenizer, tmp_path):
    calls = []

    def first_two(logits, labels):
        calls.append((tuple(logits.shape), tuple(labels.shape)))
        return logits[..., :2]

    def metrics(prediction):
        return {"width": prediction.predictions.shape[-1]}

    dataset = rows(4, 2, len(tokenizer))
    for loss_only in (False, True):
        trainer = PEARSFTTrainer(
            make_model(tokenizer), make_config(tmp_path, per_device_eval_batch_size=2, prediction_loss_only=loss_only),
            train_dataset=dataset, processing_class=tokenizer, compute_metrics=metrics,
            preprocess_logits_for_metrics=first_two,
        )  # fmt: skip
        trainer.train()
        assert not calls
        found = trainer.evaluate(dataset)
        assert found.get("eval_width") == (None if loss_only else 2)
        assert len(calls) == (0 if loss_only else 2) and all(shape[:2] == labels for shape, labels in calls)
        assert all(shape[2] == len(tokenizer) for shape, _ in calls)
        calls.clear()


def test_entropy_is_logged_unless_it_is_switched_off(tokenizer, tmp_path):
    trainer = make(True, tokenizer, tmp_path, max_steps=1, ours=dict(log_entropy=False))
    trainer.train()
    assert "entropy" not in trainer.state.log_history[0] and "mean_token_accuracy" in trainer.state.log_history[0]


# ---- streams


def test_a_stream_trains_as_its_dataset_does(tokenizer, tmp_path):
    """By PEAR's weights; without shuffling, the rows come in the same order."""
    options = dict(max_steps=3, shuffle_dataset=False, train_sampling_strategy="sequential")
    dataset, losses = rows(11, 1, len(tokenizer)), []
    for data in (dataset, dataset.to_iterable_dataset()):
        trainer = PEARSFTTrainer(
            make_model(tokenizer), make_config(tmp_path, **options), train_dataset=data, processing_class=tokenizer
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 3


def bad(row: dict, **values) -> dict:
    return {**row, **values}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda row: bad(row, input_ids=[9999, *row["input_ids"][1:]]), "token id 9999 is beyond the model"),
        (lambda row: bad(row, input_ids=[7] * 70, completion_mask=[1] * 70, behavior_logprobs=[0.0] * 70),
         "70 tokens, longer than max_length = 64; give a larger"),
        (lambda row: bad(row, behavior_logprobs=[0.0]), "behavior_logprobs has 1 values for"),
        (lambda row: bad(row, behavior_logprobs=None), "no behavior_logprobs"),
        (lambda row: bad(row, completion_mask=[0] * len(row["input_ids"])), "completion_mask is 0 at every token"),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_stream_is_named(tokenizer, tmp_path, change, message):
    data = rows(4, 1, len(tokenizer)).to_list()
    data[2] = change(data[2])
    stream = Dataset.from_list(data).to_iterable_dataset()
    trainer = PEARSFTTrainer(
        make_model(tokenizer), make_config(tmp_path, shuffle_dataset=False), train_dataset=stream,
        processing_class=tokenizer,
    )  # fmt: skip
    with pytest.raises(DataError, match=f"train dataset, row 2: {re.escape(message)}"):
        trainer.train()


def test_long_rows_of_a_stream_can_be_left_out(tokenizer, tmp_path):
    long = dict(input_ids=[7] * 70, completion_mask=[0] + [1] * 69, behavior_logprobs=[0.0] * 70)
    stream = Dataset.from_list([*rows(3, 1, len(tokenizer)).to_list(), long]).to_iterable_dataset()
    trainer = PEARSFTTrainer(
        make_model(tokenizer), make_config(tmp_path, drop_long_rows=True), train_dataset=stream,
        processing_class=tokenizer,
    )  # fmt: skip
    assert len(list(trainer.train_dataset)) == 3


@pytest.mark.parametrize(
    "options, data, message",
    [
        ({"max_steps": -1}, {"train": "stream"}, "a stream has no length, so max_steps must say when to stop; got -1"),
        ({"packing": True, "max_length": None}, {"train": "stream"}, "packing a stream needs max_length"),
        ({}, {"train": "list"}, "train dataset: expected load_scored's Dataset or a datasets.IterableDataset"),
        ({}, {"eval": {"a": [1]}}, "eval 'a' dataset: expected load_scored's Dataset"),
        ({}, {"train": "nothing"}, "train dataset: no row"),
        ({}, {"train": "empty stream"}, "train dataset: no row"),
    ],
)
def test_datasets_that_cannot_work_are_refused_before_a_model_is_loaded(tokenizer, tmp_path, options, data, message):
    train = rows(2, 1, len(tokenizer))
    stream, nothing = train.to_iterable_dataset(), train.select([])
    sets = {"stream": stream, "list": train.to_list(), "rows": train, "nothing": nothing}
    train = {**sets, "empty stream": stream.take(0)}[data.get("train", "rows")]
    with pytest.raises(DataError, match=message):
        PEARSFTTrainer(
            "no/such-model", make_config(tmp_path, **options), train_dataset=train, eval_dataset=data.get("eval"),
            processing_class=tokenizer,
        )  # fmt: skip


def test_wrapped_packing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packing_strategy = 'wrapped' does not go.*has lost its prompt.*use 'bfd'"):
        PEARSFTConfig(str(tmp_path), packing=True, packing_strategy="wrapped", weighting="none")


@pytest.mark.parametrize(
    "given, expected",
    [
        (None, {}), ("x.jsonl", {"": "x.jsonl"}), (["x.jsonl"], {"": "x.jsonl"}), 
        (["a=x", "b=y"], {"a": "x", "b": "y"}),
        ({"a": "x"}, {"a": "x"}), (["x", "y"], "several files need a name each"), (["a=x", "a=y"], "all different"),
        (["a b=x", "c=y"], "a b=x must be NAME=FILE"), (["a="], "a= must be NAME=FILE"),
    ],
)  # fmt: skip
def test_files_to_evaluate_on(given, expected):
    if isinstance(expected, dict):
        assert eval_files(given) == expected
    else:
        with pytest.raises(DataError, match=expected):
            eval_files(given)
