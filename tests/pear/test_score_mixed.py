"""`pear score` on data of several policies, of none, of APIs: each row is scored by whom it names, or by nobody."""

import json

import pytest
import torch
from datasets import Dataset
from tiny import CORPUS, make_model, make_tokenizer

from pear.align import Spans
from pear.io import DataError, read_jsonl
from pear.models import tokenizer_fingerprint
from pear.rows import tokenize_row
from pear.score import score, summary_text
from pear.seal import check_seal, seal, write_scored

BYTES = {  # as `pear import` writes what an API says that tells no ids
    "prompt": "Say hi.", "completion": "Hé!", "behavior_policy": "api",
    "behavior_spans": {"bytes": [[0, 1], [1, 3], [3, 4], [4, 4]], "marks": {"3": "end_of_turn"},
                       "logprobs": [-0.5, -0.25, -1.0, -0.125]},
}  # fmt: skip


@pytest.fixture(scope="module")
def other_tokenizer():
    return make_tokenizer(["aardvark zebra quokka " * 9, *CORPUS[2:]], vocab_size=320)


@pytest.fixture(scope="module")
def folders(tokenizer, other_tokenizer, tmp_path_factory) -> dict[str, str]:
    """Two policies of different tokenizers, and a third that only estimates."""
    found = {}
    for seed, (name, own) in enumerate((("first", tokenizer), ("second", other_tokenizer), ("third", tokenizer))):
        folder = tmp_path_factory.mktemp(name)
        make_model(own, seed=seed).save_pretrained(folder)
        own.save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.fixture
def mixed(folders, text_rows, chat_rows) -> list[dict]:
    """Rows of both policies, of nobody, of an API and of one that is not named, in turn."""
    rows = []
    for n, row in enumerate(text_rows + chat_rows):
        kind = n % 5
        if kind < 2:
            row = row | {"behavior_policy": folders[("first", "second")[kind]], "behavior_sampling": {"top_p": 0.9}}
        elif kind == 2:
            row = row | {"behavior_policy": "none"}
        elif kind == 3:
            row = seal(BYTES | {"n": n})
        rows.append(row | {"id": n})
    return rows


def read(path) -> list[dict]:
    """The rows, their seals checked and taken off."""
    rows = []
    for line, row in read_jsonl(path):
        check_seal(row, f"{path}:{line}")
        rows.append({key: value for key, value in row.items() if key != "scored"})
    return rows


def logprobs_of(folder: str, row: dict) -> list[float]:
    """The plain way: log_softmax of the logits of the model, of one row."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        logprobs = model(ids).logits[0].double().log_softmax(-1)
    return [logprobs[t - 1, ids[0, t]].item() if m else 0.0 for t, m in enumerate(row["completion_mask"])]


@pytest.mark.parametrize("fallback", ["none", "third"])
def test_each_row_is_scored_by_whom_it_names(folders, tokenizer, other_tokenizer, mixed, jsonl, tmp_path, fallback):
    tokenizers = dict(zip(folders.values(), (tokenizer, other_tokenizer, tokenizer), strict=True))
    name = folders.get(fallback, fallback)
    summary = score(None, jsonl(mixed), tmp_path / "o", fallback=name, batch_tokens=60, progress=False)
    found = read(tmp_path / "o")
    assert [row["id"] for row in found] == list(range(len(mixed)))
    counts = {}
    for row, given in zip(found, mixed, strict=True):
        expected = given.get("behavior_policy", name)
        counts[expected] = counts.get(expected, 0) + 1
        assert row["behavior_policy"] == expected
        if expected in ("none", "api"):  # nothing is added, nothing is lost
            assert row == {k: v for k, v in given.items() if k not in ("messages", "scored")} | row
            assert not {"input_ids", "completion_mask", "behavior_logprobs", "tokenizer"} & set(row)
            assert set(row) - set(given) <= {"prompt", "completion", "behavior_policy"}
            continue
        own = tokenizers[expected]
        assert row["model"] == expected and row["tokenizer"] == tokenizer_fingerprint(own)
        assert row["input_ids"] == tokenize_row(row, own, "").input_ids
        assert row["behavior_logprobs"] == pytest.approx(logprobs_of(expected, row), abs=1e-5)
        assert row.get("behavior_estimated", False) is ("behavior_policy" not in given)
        assert row.get("behavior_sampling") == given.get("behavior_sampling")
        spans = Spans.from_json(row["behavior_spans"], "o")
        text = row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
        assert len(spans.extents) == sum(row["completion_mask"]) and spans.extents[-1][1] == len(text.encode())
    assert summary["policies"] == counts and summary["rows"] == len(mixed) and summary["none"] == counts["none"]
    assert summary["passed"] == counts["api"] == 3
    assert summary["estimated"] == (3 if fallback == "third" else 0)
    assert summary["scored"] == len(mixed) - counts["none"] - counts["api"]
    text = summary_text(summary)
    assert f"{counts['none']} of no policy (weight 1), {summary['estimated']} estimated" in text
    assert ", 3 api" in text and "3 kept the log-probs they had" in text
    assert not list(tmp_path.glob("*.partial"))

    # Once more: everything has its log-probs, or none; nothing is scored, no model is loaded.
    again = score(None, tmp_path / "o", tmp_path / "again", progress=False)
    assert again["scored"] == 0 and again["passed"] == len(mixed) - counts["none"] and again["mean_logprob"] is None
    assert read(tmp_path / "again") == found
    summary_text(again)


def test_mixed_rows_that_went_through_datasets_pass(folders, mixed, jsonl, tmp_path):
    """Which gives every row the keys of all, null where it had none."""
    mixed = [row for row in mixed if isinstance(row.get("prompt"), str)]
    score(None, jsonl(mixed), tmp_path / "o", fallback="none", progress=False)
    rows = [row for _, row in read_jsonl(tmp_path / "o")]
    Dataset.from_list(sorted(rows, key=len, reverse=True)).to_json(tmp_path / "through")
    assert sum(row["input_ids"] is None for _, row in read_jsonl(tmp_path / "through")) > 2
    summary = score(None, tmp_path / "through", tmp_path / "again", progress=False)
    assert summary["scored"] == 0
    assert sorted((row["id"], row.get("behavior_logprobs")) for row in read(tmp_path / "again")) == sorted(
        (row["id"], row.get("behavior_logprobs")) for row in rows
    )


def test_rows_of_one_policy_are_as_if_it_were_the_model(folders, mixed, jsonl, tmp_path):
    score(None, jsonl(mixed), tmp_path / "mixed", fallback="none", batch_tokens=60, progress=False)
    for name in ("first", "second"):
        own = [row for row in mixed if row.get("behavior_policy") == folders[name]]
        score(folders[name], jsonl(own, "own"), tmp_path / "own.out", batch_tokens=60, progress=False)
        assert [row for row in read(tmp_path / "mixed") if row["behavior_policy"] == folders[name]] == read(
            tmp_path / "own.out"
        )


def test_rows_that_name_nobody_need_a_word(mixed, jsonl, tmp_path):
    with pytest.raises(DataError) as caught:
        score(None, jsonl(mixed), tmp_path / "o", progress=False)
    message = str(caught.value)
    assert "data.jsonl: 3 rows name no behaviour policy (lines 5, 10, 15), and no model is given" in message
    assert "--fallback none" in message and "--fallback MODEL" in message and "--model" in message
    assert not (tmp_path / "o").exists()


def test_a_model_scores_no_row_of_another(folders, text_rows, jsonl, tmp_path):
    rows = [dict(row) for row in text_rows[:4]]
    rows[1]["behavior_policy"] = folders["first"]
    rows[2]["behavior_policy"] = "none"
    summary = score(folders["first"], jsonl(rows), tmp_path / "o", progress=False)
    assert summary["scored"] == 3 and summary["none"] == 1
    assert [row["behavior_policy"] for row in read(tmp_path / "o")] == [folders["first"]] * 2 + [
        "none",
        folders["first"],
    ]
    assert "behavior_logprobs" not in read(tmp_path / "o")[2]
    with pytest.raises(
        DataError, match=rf"o:1: the row names '{folders['first']}' .* the model is '.*third.*Leave out"
    ):
        score(folders["third"], tmp_path / "o", tmp_path / "p", progress=False)
    with pytest.raises(DataError, match="or take `behavior_policy` and `scored` out of the rows"):
        score(folders["third"], tmp_path / "o", tmp_path / "p", progress=False)
    renamed = [{k: v for k, v in row.items() if k != "behavior_policy"} for row in read(tmp_path / "o")]
    assert score(folders["third"], jsonl(renamed, "renamed.jsonl"), tmp_path / "q", progress=False)["scored"] == 4
    rows[3]["behavior_policy"] = "api"
    with pytest.raises(DataError, match=r"data\.jsonl:4: the row names 'api' as its behaviour policy"):
        score(folders["first"], jsonl(rows), tmp_path / "p", progress=False)
    assert not (tmp_path / "p").exists()


def test_byte_rows_are_scored_anew_only_by_their_own_policy(folders, jsonl, tmp_path):
    row = BYTES | {"behavior_policy": folders["first"]}
    write_scored(tmp_path / "bytes", [row, row | {"prompt": "b"}])
    score(folders["first"], tmp_path / "bytes", tmp_path / "o", progress=False)
    for scored in read(tmp_path / "o"):
        assert "logprobs" not in scored["behavior_spans"] and scored["input_ids"]
        assert scored["behavior_logprobs"] == pytest.approx(logprobs_of(folders["first"], scored), abs=1e-5)
    with pytest.raises(DataError, match="bytes:1: the row names .* and the model is"):
        score(folders["third"], tmp_path / "bytes", tmp_path / "p", progress=False)
    with pytest.raises(DataError, match="bytes:1: the behaviour log-probs are of bytes .*Leave such rows out"):
        score(folders["third"], tmp_path / "bytes", tmp_path / "p", column="ref_logprobs", progress=False)


@pytest.mark.parametrize("chat", [False, True])
def test_a_response_that_was_cut_has_no_end_when_it_is_scored_anew(
    folders, text_rows, chat_rows, jsonl, tmp_path, chat
):
    """As `pear import` marks it: its policy wrote no end of turn, and a student must not learn one there."""
    text = (chat_rows if chat else text_rows)[0] | {"behavior_policy": folders["first"]}
    score(folders["first"], jsonl([text]), tmp_path / "ended", progress=False)
    (ended,) = read(tmp_path / "ended")
    count = 1 + chat  # the end of turn, and the line end that the template has behind it
    assert "end_of_turn" in ended["behavior_spans"]["marks"].values()
    byte_row = text | {"behavior_spans": {"bytes": [[0, 1]], "marks": {}, "logprobs": [-1.0], "cut": True}}
    write_scored(tmp_path / "imported", [byte_row])
    score(folders["first"], tmp_path / "imported", tmp_path / "again", progress=False)
    (cut,) = read(tmp_path / "again")
    assert cut["behavior_spans"]["cut"] is True
    assert not {"end_of_turn"} & set(cut["behavior_spans"]["marks"].values())
    assert cut["behavior_spans"]["bytes"] == ended["behavior_spans"]["bytes"][:-count]
    for key in ("input_ids", "completion_mask", "behavior_logprobs"):
        assert cut[key] == pytest.approx(ended[key][:-count], rel=1e-5), key
    again = score(folders["first"], tmp_path / "again", tmp_path / "again", progress=False)  # and stays so
    assert again["scored"] == 1 and read(tmp_path / "again") == [cut]


def test_reference_scores_every_row_and_keeps_who_wrote_it(folders, text_rows, jsonl, tmp_path):
    rows = [dict(row, behavior_policy=("none", folders["first"])[n % 2]) for n, row in enumerate(text_rows)]
    score(None, jsonl(rows), tmp_path / "o", progress=False)
    score(folders["third"], tmp_path / "o", tmp_path / "o", column="ref_logprobs", progress=False)
    for row, given in zip(read(tmp_path / "o"), rows, strict=True):
        assert row["behavior_policy"] == given["behavior_policy"] and row["ref_model"] == folders["third"]
        assert ("behavior_logprobs" in row) is (given["behavior_policy"] != "none")
        assert row["ref_logprobs"] == pytest.approx(logprobs_of(folders["third"], row), abs=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"behavior_policy": 7}, "`behavior_policy` must be a model's name, or 'none', got 7"),
        ({"behavior_policy": ""}, "`behavior_policy` must be a model's name"),
        ({"behavior_policy": "none", "behavior_logprobs": [0.0, -1.0]}, "is 'none', but there are behaviour log-probs"),
        (
            {"behavior_policy": "none"} | {"behavior_spans": BYTES["behavior_spans"]},
            "but there are behaviour log-probs",
        ),
        ({"behavior_logprobs": [0.0, -1.0]}, "log-probs that nobody has sealed .*Name it as `behavior_policy`"),
        ({"behavior_policy": "./nowhere"}, r"model './nowhere' cannot be loaded: model './nowhere': no such folder"),
        ({"behavior_policy": "none", "ref_logprobs": [0.0]}, "no `input_ids`"),
    ],
)
def test_rows_that_contradict_themselves(text_rows, jsonl, tmp_path, change, message):
    data = jsonl([text_rows[0] | {"behavior_policy": "none"}, text_rows[1] | change])
    with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
        score(None, data, tmp_path / "o", fallback="none", progress=False)
    assert not list(tmp_path.glob("o*"))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(model="x", fallback="none"), "fallback = 'none' does nothing beside a model"),
        (dict(model="none"), "model = 'none' is no model"),
        (dict(model=None, column="ref_logprobs"), "column = 'ref_logprobs' needs a model"),
        (dict(model=None, column="none", top_k=3), "column = 'none' needs a model"),
        (dict(model=None, top_k=3), "top_k needs a model"),
        (dict(model=None, tokenizer=object()), "tokenizer is that of a model, and none is given"),
    ],
)
def test_options_that_do_not_go_together(text_rows, jsonl, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        score(data=jsonl(text_rows), out=tmp_path / "o", progress=False, **options)


def test_rows_of_no_policy_have_no_top_k_beside_log_probs(folders, text_rows, jsonl, tmp_path):
    rows = [text_rows[0], text_rows[1] | {"behavior_policy": "none"}]
    with pytest.raises(DataError, match=r"rows without a policy get no log-probs \(lines 2\), and so no top_k"):
        score(folders["first"], jsonl(rows), tmp_path / "o", top_k=3, progress=False)
    score(folders["first"], jsonl(rows), tmp_path / "o", progress=False)
    score(folders["third"], tmp_path / "o", tmp_path / "o", column="none", top_k=3, progress=False)
    assert [len(row["top_k_ids"][-1]) for row in read(tmp_path / "o")] == [3, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Scored files that were changed


@pytest.fixture
def scored(folders, text_rows, jsonl, tmp_path) -> list[dict]:
    score(folders["first"], jsonl(text_rows), tmp_path / "scored", progress=False)
    return [row for _, row in read_jsonl(tmp_path / "scored")]


@pytest.mark.parametrize("options", [dict(), dict(column="ref_logprobs"), dict(column="none", top_k=2)])
def test_an_edited_row_is_refused_and_named(folders, scored, jsonl, tmp_path, options):
    scored[2]["completion"] += " I think."
    with pytest.raises(DataError, match=r"edited\.jsonl:3: edited after it was scored .*Undo the edit"):
        score(folders["first"], jsonl(scored, "edited.jsonl"), tmp_path / "o", progress=False, **options)
    if not options:
        with pytest.raises(DataError, match=r"edited\.jsonl:3: edited"):
            score(None, jsonl(scored, "edited.jsonl"), tmp_path / "o", progress=False)
        del scored[2]["scored"]  # as the message says, if the new text is meant
        score(folders["first"], jsonl(scored, "edited.jsonl"), tmp_path / "o", progress=False)
        assert read(tmp_path / "o")[2]["behavior_logprobs"] == pytest.approx(
            logprobs_of(folders["first"], scored[2] | read(tmp_path / "o")[2]), abs=1e-5
        )


def test_the_first_rows_and_any_others_are_a_scored_file(folders, scored, jsonl, tmp_path):
    for options in (
        dict(model=None),
        dict(model=folders["first"]),
        dict(model=folders["third"], column="ref_logprobs"),
    ):
        for chosen in (scored[:5], scored[:5][::-1]):
            score(data=jsonl(chosen, "chosen"), out=tmp_path / "o", progress=False, **options)
            assert [row["prompt"] for row in read(tmp_path / "o")] == [row["prompt"] for row in chosen]


def test_file_as_an_older_version_left_it_is_scored_again_by_a_model(folders, scored, jsonl, tmp_path):
    """Without seal and policy. Nothing passes for whole that nothing vouches for."""
    old = [{k: v for k, v in row.items() if k not in ("scored", "behavior_policy", "behavior_spans")} for row in scored]
    with pytest.raises(DataError, match=r"old:1: behaviour log-probs that nobody has sealed"):
        score(None, jsonl(old, "old"), tmp_path / "o", fallback="none", progress=False)
    score(folders["first"], jsonl(old, "old"), tmp_path / "o", progress=False)
    new = read(tmp_path / "o")
    assert [row | {"scored": None} for row in new] == [row | {"scored": None} for row in scored]


def test_rows_that_do_not_round_trip_are_told(folders, jsonl, tmp_path, monkeypatch):
    import pear.align

    original = pear.align.spans_of

    def refuse(row, tokenized, tokenizer):
        if "4" in row["prompt"]:
            raise pear.align.Unaligned("its text cannot be found")
        return original(row, tokenized, tokenizer)

    monkeypatch.setattr(pear.align, "spans_of", refuse)
    rows = [{"prompt": f"{n}", "completion": "Yes."} for n in range(6)]
    summary = score(folders["first"], jsonl(rows), tmp_path / "o", progress=False)
    assert summary["unaligned"] == 1 and summary["unaligned_reasons"] == {5: "its text cannot be found"}
    assert "1 rows do not round-trip between text and tokens (lines 5)" in summary_text(summary)
    found = read(tmp_path / "o")
    assert [row["behavior_spans"].get("problem") for row in found] == [None] * 4 + ["its text cannot be found", None]


def test_a_row_without_seal_at_the_command_line(folders, mixed, jsonl, tmp_path):
    from typer.testing import CliRunner

    from pear.cli import app

    line = ["score", "--data", str(jsonl(mixed)), "--out", str(tmp_path / "o")]
    run = CliRunner().invoke(app, line)
    assert run.exit_code == 1 and "3 rows name no behaviour policy (lines 5, 10, 15)" in run.output
    run = CliRunner().invoke(app, [*line, "--fallback", folders["third"]])
    assert run.exit_code == 0, run.output
    assert "3 of no policy (weight 1), 3 estimated by a model that did not write them, 3 kept" in run.output
    assert json.loads((tmp_path / "o").read_text().splitlines()[4])["behavior_estimated"] is True
