"""Token ids that a model has no embedding for: named by row and both sizes, in every command, before the work."""

import json

import pytest
from tiny import make_model
from typer.testing import CliRunner

from pear.cli import app
from pear.generate import generate
from pear.io import DataError, write_jsonl
from pear.models import load_config, load_model, load_tokenizer
from pear.rl import check_prompts
from pear.score import score
from pear.scored import load_scored
from pear.seal import write_scored
from pear.sft import PEARSFTTrainer
from pear.sft_config import PEARSFTConfig

ROWS = [{"prompt": "2 + 5 =", "completion": " 7"}, {"prompt": "2 + 5 =", "completion": " <easy>easy</easy> 7"}]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """Models with one vocabulary: "short" without embeddings for the tokens that were added, "whole", "padded"."""
    folder = tmp_path_factory.mktemp("models")
    make_model(tokenizer).save_pretrained(folder / "short")
    size = len(tokenizer)
    tokenizer = type(tokenizer).from_pretrained(_saved(tokenizer, folder / "old"))
    tokenizer.add_tokens(["<easy>", "</easy>"])
    for name, rows in {"short": size, "whole": size + 2, "padded": size + 64}.items():
        model = make_model(tokenizer)
        model.resize_token_embeddings(rows)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder, size


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scored(folders, tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "d.jsonl"
    write_jsonl(data, ROWS)
    for name in ("whole", "padded"):
        score(str(folders[0] / name), data, data.with_name(f"{name}.jsonl"), progress=False)
    return data


def test_the_row_and_both_sizes_are_named(folders, scored, tmp_path):
    folder, size = folders
    short = ["--model", str(folder / "short")]
    whole = scored.with_name("whole.jsonl")
    commands = {
        "score": [*short, "--data", str(scored), "--out", str(tmp_path / "s.jsonl")],
        "inspect": [*short, "--data", str(whole)],
        "sft": [*short, "--data", str(whole), "--output_dir", str(tmp_path / "o"), "--report_to", "none"],
    }
    for command, arguments in commands.items():
        result = CliRunner().invoke(app, [command, *arguments])
        wanted = (f".jsonl:2: token id {size + 1} ('</easy>')", f"has {size} rows", f"has {size + 2} tokens")
        assert result.exit_code == 1 and all(part in result.stderr for part in wanted), (command, result.stderr)
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_and_a_dataset_are_checked_too(folders, scored, tmp_path):
    folder, size = folders
    model, tokenizer = load_model(str(folder / "short")), load_tokenizer(str(folder / "short"))
    with pytest.raises(DataError, match=f":2: token id {size + 1}"):
        score(model, scored, tmp_path / "s.jsonl", tokenizer=tokenizer, progress=False)
    with pytest.raises(DataError, match=rf"prompts\[1\]: token id {size}"):
        generate(model, tokenizer, ["2", "<easy>"], max_new_tokens=8, progress=None)
    dataset = load_scored(scored.with_name("whole.jsonl"), tokenizer)
    args = PEARSFTConfig(str(tmp_path / "o"), report_to="none", use_cpu=True)
    with pytest.raises(DataError, match=f"train dataset: token id {size + 1} is beyond the model, whose embedding"):
        PEARSFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer)


def test_prompts_of_rl_are_checked_too(folders):
    short = str(folders[0] / "short")
    config, tokenizer = load_config(short), load_tokenizer(short)
    with pytest.raises(DataError, match=rf"prompt 2 of 2: token id {folders[1]} \('<easy>'\) is beyond model"):
        check_prompts(["2", "<easy>"], tokenizer, config, 1, short)


def test_padding_of_the_embedding_is_no_error(folders, scored):
    rows = [json.loads(line) for line in scored.with_name("padded.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    rows[1]["input_ids"][-1] = folders[1] + 40  # an id of the padding, which the tokenizer has no token for
    path = scored.with_name("beyond.jsonl")
    write_scored(path, rows)
    tokenizer = load_tokenizer(str(folders[0] / "padded"))
    assert len(load_scored(path, tokenizer, model="m", vocabulary_size=folders[1] + 64)) == 2
    with pytest.raises(DataError, match=f":2: token id {folders[1] + 40} is beyond model 'm'"):
        load_scored(path, tokenizer, model="m", vocabulary_size=folders[1] + 2)


@pytest.mark.parametrize("bad", [-1, 2**31, 10**400, 1.0, True, None])
def test_ids_that_no_embedding_has(bad, scored, folders):
    rows = [json.loads(line) for line in scored.with_name("whole.jsonl").read_text().splitlines()]
    rows[0]["input_ids"][0] = bad
    path = scored.with_name("bad.jsonl")
    write_scored(path, rows)
    with pytest.raises(DataError, match=r"bad.jsonl:1: `input_ids\[0\]` must be a token id"):
        load_scored(path, load_tokenizer(str(folders[0] / "whole")))
