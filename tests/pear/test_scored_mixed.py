"""Files with rows of every kind: what `load_scored` makes of each, what it says, and what it refuses."""

import json

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mixed_rows import (
    blocks_by_hand,
    byte_row,
    nobodys_row,
    other_tokenizer,
    pieces,
    rows_of_every_kind,
    spans_json,
    texts,
    token_row,
    without,
)
from tiny import make_model, make_tokenizer

from pear.io import DataError, read_jsonl
from pear.rows import tokenize_row
from pear.score import score
from pear.scored import COLUMNS, load_scored
from pear.seal import SEALED, seal, write_scored
from pear_kernels.options import PEAROptions

LEVELS = {
    "token": PEAROptions(level="token"),
    "block": PEAROptions(level="block", block_size=3, clip_blocks=True),
    "sequence": PEAROptions(level="sequence"),
}


@pytest.fixture(scope="module")
def other():
    return other_tokenizer()


@pytest.fixture(scope="module")
def rows(tokenizer):
    return rows_of_every_kind(tokenizer)


@pytest.fixture
def write(tmp_path):
    def write(rows, name="mixed.jsonl"):
        write_scored(tmp_path / name, rows)
        return tmp_path / name

    return write


def completion(row, name):
    return [value for value, bit in zip(row[name], row["completion_mask"], strict=True) if bit]


@pytest.mark.parametrize("level", LEVELS)
def test_every_kind_becomes_what_it_is(tokenizer, other, rows, write, level):
    data = load_scored(write(rows), tokenizer, options=LEVELS[level])
    size = 3 if level == "block" else 1
    long = 0
    for i, (text, row, loaded) in enumerate(zip(texts(len(rows)), rows, data, strict=True)):
        own = tokenize_row(text, tokenizer, "here")
        assert loaded["input_ids"] == own.input_ids and loaded["completion_mask"] == own.completion_mask
        blocks, behavior = completion(loaded, "block_ids"), completion(loaded, "behavior_logprobs")
        if i % 4 == 0:
            assert blocks == [t // size for t in range(len(blocks))] and loaded["block_tokens"] == size
            assert behavior == pytest.approx(completion(row, "behavior_logprobs"), rel=1e-6)
        elif i % 4 == 3:
            assert set(blocks) == {-1} and not any(behavior) and loaded["block_tokens"] is None
        else:
            mine, theirs = pieces(tokenizer, own), pieces(other, tokenize_row(text, other, "here"))
            assert blocks == blocks_by_hand(mine, theirs)
            assert loaded["block_tokens"] == 0
            long += len(blocks) - len(set(blocks))
            given = row["behavior_spans"].get("logprobs") or completion(row, "behavior_logprobs")
            assert sum(behavior) == pytest.approx(sum(given), rel=1e-6)
            firsts = [blocks.index(k) for k in sorted(set(blocks))]
            assert all(value == 0 for t, value in enumerate(behavior) if t not in firsts)
            ends = [sum(map(len, theirs[: t + 1])) for t in range(len(given))]
            bounds = [sum(map(len, mine[:first])) for first in firsts[1:-1]]
            sums = [
                sum(b for b, end in zip(given[:-1], ends, strict=False) if low < end <= high)
                for low, high in zip([0, *bounds], [*bounds, ends[-1]], strict=True)
            ]
            assert [behavior[t] for t in firsts] == pytest.approx([*sums, given[-1]], rel=1e-5)
        outside = [k for k, bit in zip(loaded["block_ids"], loaded["completion_mask"], strict=True) if not bit]
        assert set(outside) == {-1}
    assert long > 20  # spans of several of the student's tokens


@pytest.mark.parametrize("kind", ["byte row", "token row", "the student's tokenizer"])
@pytest.mark.parametrize("chat", [False, True])
def test_nothing_behind_a_response_that_was_cut_is_trained_on(kind, chat, tokenizer, other, write):
    """The policy was stopped at its limit: an end of turn there would teach the student to stop in mid-sentence."""
    text = texts(3)[2]
    if chat:
        text = {
            "prompt": [{"role": "user", "content": text["prompt"]}],
            "completion": [{"role": "assistant", "content": text["completion"]}],
        }
    policy = tokenizer if kind == "the student's tokenizer" else other
    whole = token_row(text, policy)
    count = len(whole["behavior_spans"]["bytes"]) - 1  # the end of turn, and what the template has behind it
    count -= chat
    if chat:
        ends = whole["behavior_spans"]["bytes"]
        ends[count:] = [[ends[count - 1][1]] * 2] * 2
        whole["behavior_spans"]["marks"] = {str(count): "end_of_turn", str(count + 1): "\n"}
    cut = byte_row(whole)
    cut = without(cut, *range(count, count + 1 + chat))
    if kind == "token row":
        length = len(whole["input_ids"]) - 1 - chat
        lists = {name: whole[name][:length] for name in ("input_ids", "completion_mask", "behavior_logprobs")}
        spans = {name: value for name, value in cut["behavior_spans"].items() if name != "logprobs"}
        cut = whole | lists | {"behavior_spans": spans}
    ended, as_it_was = load_scored(write([whole, cut]), tokenizer)
    cut["behavior_spans"]["cut"] = True
    stopped = load_scored(write([whole, cut]), tokenizer)[1]
    assert as_it_was["input_ids"] == ended["input_ids"]  # nothing tells that it was cut
    dropped = 1 + chat
    for name in ("input_ids", "completion_mask", "block_ids", "behavior_logprobs"):
        assert stopped[name] == as_it_was[name][:-dropped]
    assert tokenizer.eos_token_id not in completion(stopped, "input_ids")
    assert min(completion(stopped, "block_ids")) >= 0  # whole ends are common to both


def test_block_columns_are_there_only_where_a_row_needs_them(tokenizer, rows, write):
    assert "block_ids" not in load_scored(write(rows[::4]), tokenizer).column_names
    for i in (1, 2, 3):
        names = load_scored(write([rows[0], rows[i]]), tokenizer).column_names
        assert {"block_ids", "block_tokens"} <= set(names)


def test_what_the_file_was_is_told_by_line(tokenizer, rows, write, caplog):
    rows = [dict(row) for row in rows]
    rows[0] |= {"behavior_estimated": True, "behavior_sampling": {"temperature": 1.0, "top_p": 1, "top_k": -1}}
    rows[1]["behavior_sampling"] = {"temperature": 0.7, "top_p": 0.9}
    rows[4]["behavior_sampling"] = {"temperature": 0.7, "top_k": 40, "seed": "3"}
    rows[5]["behavior_sampling"] = {"temperature": 0.7, "logprobs": "processed"}  # they are what was drawn from
    rows[8]["behavior_sampling"] = {"temperature": 0.7, "logprobs": "raw"}
    data = load_scored(write(rows), tokenizer)
    aligned = [loaded for i, loaded in enumerate(data) if i % 4 in (1, 2)]
    blocks = [completion(row, "block_ids") for row in aligned]
    tokens, spans = sum(map(len, blocks)), sum(len(set(ids)) for ids in blocks)
    assert (
        "6 of 12 rows are not in the student's tokens and were aligned by their bytes: 100.0% of their response tokens "
        f"carry a log-ratio, in spans of {tokens / spans:.2f} tokens, {spans / 6:.1f} spans a row" in caplog.text
    )
    assert "3 of 12 rows have no behaviour policy: each of their tokens has weight 1" in caplog.text
    assert "the log-probs of 1 row are an estimate, by a model that did not write them (line 1)" in caplog.text
    settings = "temperature 0.7: 3 rows, top_p 0.9: 1 row, top_k 40: 1 row"
    assert f"the log-ratios of 3 rows are biased by how they were sampled ({settings})" in caplog.text
    assert "of 2 of them, nothing tells whether the log-probs are of the model's own distribution" in caplog.text
    assert "of 1 of them, the log-probs are of the model at temperature 1, and what was drawn" in caplog.text
    caplog.clear()
    load_scored(write([rows[8] | {"behavior_sampling": {"temperature": 1.0}}]), tokenizer)
    (message,) = caplog.messages
    assert "1 of 1 rows are text" in message  # and the tokenizer has a chat template


def test_rows_that_share_little_are_named(tokenizer, write, caplog):
    """A policy that scored the first letters alone: the rest carries no ratio, and is said to."""
    text = texts(4)[2]
    row = byte_row(token_row(text, tokenizer))
    parts = [b"It", b" is"]
    row["behavior_spans"] = spans_json(parts) | {"logprobs": [-1.0, -2.0]}
    data = load_scored(write([row]), tokenizer)
    ids = completion(data[0], "block_ids")
    assert 0 < sum(k >= 0 for k in ids) < len(ids) / 2
    assert "in 1 row fewer than 50% of the response tokens carry a log-ratio (line 1)" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Rows that cannot be aligned


def unaligned_rows(tokenizer, other):
    first, second, third, fourth = texts(4)
    problem = token_row(second, other) | {"behavior_spans": {"problem": "token 3 is unknown"}}
    nothing = byte_row(token_row(third, other))
    nothing["behavior_spans"] = {"bytes": [[0, 1]], "marks": {}, "logprobs": [-1.0]}  # a boundary after "I" alone
    return [token_row(first, tokenizer), problem, nothing, token_row(fourth, other)]


def test_rows_that_cannot_be_aligned_stop_or_are_named(tokenizer, other, write, caplog):
    path = write(unaligned_rows(tokenizer, other))
    message = (
        r"mixed\.jsonl: 2 of 4 rows cannot be aligned with the student's tokens\. line 2: .*token 3 is unknown; "
        r"line 3: .*no span.*--unaligned skip"
    )
    with pytest.raises(DataError, match=message):
        load_scored(path, tokenizer)
    data = load_scored(path, tokenizer, unaligned="skip")
    assert data["input_ids"] == [tokenize_row(text, tokenizer, "here").input_ids for text in (texts(4)[0], texts(4)[3])]
    assert "left out 2 of 4 rows, which cannot be aligned with the student's tokens (lines 2, 3)" in caplog.text
    assert "token 3 is unknown (1)" in caplog.text
    with pytest.raises(DataError, match="no row to train on that can be aligned"):
        load_scored(write(unaligned_rows(tokenizer, other)[1:3]), tokenizer, unaligned="skip")
    with pytest.raises(DataError, match="unaligned must be one of error, skip, got 'drop'"):
        load_scored(path, tokenizer, unaligned="drop")


def test_template_that_rewrites_the_answer_is_told_and_not_guessed(tokenizer, other, chat_rows, jsonl, tmp_path):
    score(make_model(other), jsonl(chat_rows), tmp_path / "s.jsonl", tokenizer=other, progress=False)
    assert len(load_scored(tmp_path / "s.jsonl", tokenizer)) == len(chat_rows)
    student = make_tokenizer()
    student.chat_template = student.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(DataError, match=r"s\.jsonl: 6 of 6 rows cannot be aligned .* line 1: .*; line 6: "):
        load_scored(tmp_path / "s.jsonl", student)


def test_problem_of_a_row_in_the_students_tokens_is_none(tokenizer, write):
    """Its ids are compared, and need no spans."""
    row = token_row(texts(1)[0], tokenizer) | {"behavior_spans": {"problem": "does not round-trip"}}
    assert "block_ids" not in load_scored(write([row]), tokenizer).column_names


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_rows_that_nobody_scored_are_refused_with_both_ways_out(tokenizer, rows, jsonl, write):
    with pytest.raises(DataError, match=r"data\.jsonl:1: no log-probs.*--fallback none.*--fallback MODEL"):
        load_scored(jsonl(texts(2)), tokenizer)
    with pytest.raises(DataError, match=r"mixed\.jsonl:2: no log-probs.*--fallback none"):
        load_scored(write([rows[0], texts(2)[1]]), tokenizer)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda spans: spans["logprobs"].pop(), "entries for"),
        (lambda spans: spans["logprobs"].__setitem__(1, 0.5), r"logprobs\[1\]` is 0.5; a log-prob is"),
        (lambda spans: spans["logprobs"].__setitem__(1, float("nan")), r"logprobs\[1\]` is nan; a log-prob is"),
        (lambda spans: spans.update(logprobs="none"), "must be a list of log-probs"),
        (lambda spans: spans["bytes"].__setitem__(1, [9, 2]), "behavior_spans"),
    ],
)
def test_damaged_byte_rows_are_named(tokenizer, other, tmp_path, change, message):
    row = byte_row(token_row(texts(2)[1], other))
    change(row["behavior_spans"])
    path = tmp_path / "mixed.jsonl"
    path.write_text(json.dumps(seal(row)) + "\n")
    with pytest.raises(DataError, match=rf"mixed\.jsonl:1: .*{message}"):
        load_scored(path, tokenizer)


def test_spans_of_another_text_are_refused(tokenizer, other, write):
    """Longer than the row's: sealed so by a program that mixed two rows up."""
    row = byte_row(token_row(texts(4)[2], other)) | {"completion": "It"}
    with pytest.raises(DataError, match=r"line 1: its spans go up to byte \d+ of a text of 2"):
        load_scored(write([row]), tokenizer)


def test_columns_of_single_tokens_are_refused(tokenizer, other, rows, write):
    ref = {"ref_logprobs": [-1.0 * bit for bit in rows[1]["completion_mask"]]}
    message = r"mixed\.jsonl:1: `ref_logprobs` is of single tokens, and this row has other tokens than the student's"
    for row in (rows[1] | ref, rows[2]):
        with pytest.raises(DataError, match=message):
            load_scored(write([row]), tokenizer, columns=("ref_logprobs",))
    top = [[5, 6] if bit else [] for bit in rows[1]["completion_mask"]]
    values = [[-1.0, -2.0] if bit else [] for bit in rows[1]["completion_mask"]]
    row = rows[1] | {"top_k_ids": top, "top_k_logprobs": values}
    with pytest.raises(DataError, match=r"mixed\.jsonl:1: `top_k_ids` is of single tokens"):
        load_scored(write([row]), tokenizer, columns=("top_k_ids", "top_k_logprobs", "top_k_temperature"))
    with pytest.raises(DataError, match=r"mixed\.jsonl:1: no `ref_logprobs`: `pear score --column ref_logprobs"):
        load_scored(write([rows[3]]), tokenizer, columns=("ref_logprobs",))


def test_nobodys_row_with_a_column_of_the_students(tokenizer, other, rows, write):
    """`pear score --column ref_logprobs` has tokenised human text."""
    text = texts(3)[2]
    row = {**token_row(text, tokenizer), "behavior_policy": "none"}
    del row["behavior_logprobs"], row["behavior_spans"]
    row["ref_logprobs"] = [-1.0 * bit for bit in row["completion_mask"]]
    data = load_scored(write([row]), tokenizer, columns=("ref_logprobs",))
    assert data[0]["ref_logprobs"] == row["ref_logprobs"] and set(data[0]["block_ids"]) == {-1}
    assert load_scored(write([nobodys_row(text)]), tokenizer)["input_ids"] == data["input_ids"]
    foreign = tokenize_row(text, other, "here")
    row |= {"input_ids": foreign.input_ids, "completion_mask": foreign.completion_mask, "tokenizer": "0123"}
    row["ref_logprobs"] = [-1.0 * bit for bit in row["completion_mask"]]
    assert load_scored(write([row]), tokenizer)["input_ids"] == data["input_ids"]
    with pytest.raises(DataError, match="`ref_logprobs` is of single tokens"):
        load_scored(write([row]), tokenizer, columns=("ref_logprobs",))


def test_spans_at_level_block_ask_for_clip_blocks(tokenizer, rows, write):
    with pytest.raises(DataError, match=r"rows of another tokenizer than the student's \(lines 2, 3\).*--clip_blocks"):
        load_scored(write(rows[:4]), tokenizer, options=PEAROptions(level="block", block_size=3))
    data = load_scored(write([rows[0], rows[3]]), tokenizer, options=PEAROptions(level="block", block_size=3))
    assert data["block_tokens"][:] == [3, None]


SEPARATORS = ((",", ":"), (", ", ": "))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_scored_files_are_a_scored_file(tokenizer, rows, write, tmp_path, data):
    """head, tail, shuf, cat, jq and Python: which rows, how often, in which order and how written makes no difference.
    A row with one field edited is refused by its line."""
    sealed = [json.loads(line) for line in write(rows).read_text().splitlines()]
    chosen = data.draw(st.lists(st.sampled_from(range(len(sealed))), min_size=1, max_size=15))
    lines = []
    for i in chosen:
        keys = data.draw(st.permutations(list(sealed[i])))
        row = {key: sealed[i][key] for key in keys} | {"mine": i, "label": True}
        how = {"separators": data.draw(st.sampled_from(SEPARATORS)), "ensure_ascii": data.draw(st.booleans())}
        lines.append(json.dumps(row, **how) + "\n" * data.draw(st.integers(1, 2)))
    path = tmp_path / "chosen.jsonl"
    path.write_text("".join(lines).rstrip("\n") if data.draw(st.booleans()) else "".join(lines))
    every, loaded = load_scored(write(rows), tokenizer), load_scored(path, tokenizer)
    for name in COLUMNS:
        assert loaded[name][:] == [every[name][i] for i in chosen]

    at = data.draw(st.sampled_from(range(len(chosen))))
    row = json.loads(lines[at])
    name = data.draw(st.sampled_from(sorted(key for key in row if key in SEALED)))
    value = row[name]
    if isinstance(value, list):
        row[name] = [
            *value[:-1],
            value[-1] - 1 if isinstance(value[-1], (int, float)) else value[-1] | {"content": "x"},
        ]
    else:
        row[name] = value + "x" if isinstance(value, str) else value | {"bytes": []}
    lines[at] = json.dumps(row) + "\n"
    path.write_text("".join(lines))
    line = 1 + sum(each.count("\n") for each in lines[:at])
    with pytest.raises(DataError, match=rf"chosen\.jsonl:{line}: (edited|.*no log-probs of a behaviour)"):
        load_scored(path, tokenizer)


def test_edited_torn_and_older_files_are_refused(tokenizer, rows, write, tmp_path):
    path = write(rows)
    lines = path.read_text().splitlines(keepends=True)
    edited = json.loads(lines[2])
    edited["completion"] = edited["completion"].replace("It is", "It was")
    (tmp_path / "edited.jsonl").write_text("".join([*lines[:2], json.dumps(edited) + "\n", *lines[3:]]))
    with pytest.raises(DataError, match=r"edited\.jsonl:3: edited after it was scored"):
        load_scored(tmp_path / "edited.jsonl", tokenizer)
    (tmp_path / "torn.jsonl").write_text("".join(lines)[:-40])
    with pytest.raises(DataError, match=r"torn\.jsonl:12: not JSON"):
        load_scored(tmp_path / "torn.jsonl", tokenizer)
    older = json.loads(lines[0])
    del older["scored"]
    (tmp_path / "older.jsonl").write_text(json.dumps(older) + "\n")
    with pytest.raises(DataError, match=r"older\.jsonl:1: no seal"):
        load_scored(tmp_path / "older.jsonl", tokenizer)
    (tmp_path / "some.jsonl").write_text("".join([lines[5], lines[2], lines[9]]))
    assert len(load_scored(tmp_path / "some.jsonl", tokenizer)) == 3


def test_a_way_through_datasets_changes_nothing(tokenizer, rows, write, tmp_path):
    """Nulls stand in for keys that other rows have."""
    path = write(rows)
    before = load_scored(path, tokenizer)
    Dataset.from_list([row for _, row in read_jsonl(path)]).to_json(tmp_path / "again.jsonl")
    assert "null" in (tmp_path / "again.jsonl").read_text()
    after = load_scored(tmp_path / "again.jsonl", tokenizer)
    assert before.to_dict() == after.to_dict()
