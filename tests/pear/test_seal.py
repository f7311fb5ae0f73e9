"""The seal of a scored row: it finds edits, and lets pass what other programs do to JSON."""

import copy
import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import example, given
from hypothesis import strategies as st

from pear.io import DataError, read_jsonl
from pear.seal import FORMAT, SEALED, check_seal, checksum, seal, write_scored

ROW = {
    "prompt": [{"role": "user", "content": "Wie geht’s? \u0301 👩‍👩‍👧"}],
    "completion": [{"role": "assistant", "content": "Gut.", "reasoning_content": "Hm."}],
    "input_ids": [5, 17, 151_643, 3],
    "completion_mask": [0, 0, 1, 1],
    "behavior_logprobs": [0.0, 0.0, -0.12345678912345678, -1.0],
    "behavior_spans": {"bytes": [[0, 3], [3, 3]], "marks": {"1": "end_of_turn"}},
    "behavior_policy": "teacher",
    "behavior_sampling": {"temperature": 0.7, "top_p": 1},
    "tokenizer": "0123abc",
    "model": "teacher",
    "top_k_ids": [[], [], [3, 4], [5, 6]],
    "top_k_logprobs": [[], [], [-0.5, -1.5], [-0.25, -2.0]],
    "top_k_temperature": 2.0,
    "label": True,
    "id": 7,
}


def test_seal_as_the_format_says():
    row = seal(ROW)
    rounded = {"behavior_logprobs": [0.0, 0.0, -0.1234567891, -1.0]}  # to ten decimals
    assert row == ROW | rounded | {"scored": {"format": FORMAT, "checksum": checksum(ROW)}} and "scored" not in ROW
    assert len(checksum(ROW)) == 16 and int(checksum(ROW), 16) >= 0 and FORMAT == 3
    check_seal(row, "f:1")
    assert seal(row) == row  # an old seal is replaced
    # as format 2 had it, written by the version before
    check_seal(ROW | {"scored": {"format": 2, "file": "a", "row": 2, "rows": 9, "checksum": "a8915a8dbfbf96ba"}}, "f:1")


def test_a_file_that_datasets_wrote_again_is_a_scored_file(tmp_path):
    """pandas writes ten decimals, and the float32 log-probs of nearly certain tokens have more."""
    logprobs = -np.exp(np.linspace(-25, 3, 500)).astype(np.float32)
    row = seal({"prompt": "a/é", "completion": " b", "behavior_logprobs": [0.0, *logprobs.tolist()]})
    np.testing.assert_allclose(row["behavior_logprobs"][1:], logprobs, atol=5.1e-11, rtol=0)
    Dataset.from_list([row, row]).to_json(tmp_path / "again.jsonl")
    for line, again in read_jsonl(tmp_path / "again.jsonl"):
        check_seal(again, f"again.jsonl:{line}")


def leaves(value, path=()):
    """(path, leaf) of every number and string in a JSON value."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def changed(row, path, value):
    row = copy.deepcopy(row)
    at = row
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return row


def test_every_edit_of_what_is_sealed_is_found():
    row = seal(ROW)
    count = 0
    for path, leaf in leaves(ROW):
        other = leaf + "x" if isinstance(leaf, str) else not leaf if isinstance(leaf, bool) else leaf - 1
        edited = changed(row, path, other)
        if path[0] in SEALED:
            with pytest.raises(
                DataError, match=r"^f:3: edited after it was scored .*Only `label` and keys of your own"
            ):
                check_seal(edited, "f:3")
            count += 1
        else:
            check_seal(edited, "f:3")
    assert count > 30
    for key in SEALED:
        if key in ROW:
            with pytest.raises(DataError, match="edited"):
                check_seal({k: v for k, v in row.items() if k != key}, "f:3")
        else:
            with pytest.raises(DataError, match="edited"):
                check_seal(row | {key: "new"}, "f:3")
    check_seal(row | {"label": False, "id": None, "mine": [1, {"x": 2}]}, "f:3")


JSON = st.recursive(
    st.text(max_size=4) | st.integers(-(2**40), 2**40) | st.floats(-1e9, 1e9) | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


def float32(value):
    """As a program that holds numbers that are not whole in float32 would write them."""
    if isinstance(value, dict):
        return {key: float32(item) for key, item in reversed(value.items())}
    if isinstance(value, list):
        return [float32(item) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(np.float32(value))
    return int(value) if isinstance(value, float) else value


def same(a, b) -> bool:
    """Equal as the checksum is to see it, written another way: by kinds, exact or to float32."""
    numbers = (int, float)
    if isinstance(a, numbers) and isinstance(b, numbers):
        whole = [float(x).is_integer() for x in (a, b)]
        return float(a) == float(b) if all(whole) else np.float32(a) == np.float32(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(st.dictionaries(st.sampled_from(SEALED), JSON, max_size=4))
@example({"prompt": "\ud800", "input_ids": [2**31 + 1], "ref_logprobs": [-0.0, 1.0000000001, 16777217.3]})
def test_writing_json_another_way_changes_nothing(row):
    rewritten = json.loads(json.dumps(float32(row), ensure_ascii=True, indent=1))
    assert checksum(rewritten) == checksum(row)
    assert checksum({"extra": 1, "label": False} | row | {key: None for key in SEALED if key not in row}) == checksum(
        row
    )


@given(JSON, JSON)
@example([[1, 2], [3]], [[1], [2, 3]])
@example([[], [1]], [[1], []])
@example(["ab", "c"], ["a", "bc"])
@example([], {})
@example([1], 1)
@example("1", 1)
@example([2**24 + 1], [2**24])
def test_different_values_have_different_checksums(a, b):
    assert (checksum({"prompt": a}) == checksum({"prompt": b})) == same(a, b)


def test_numbers_that_are_none_do_not_crash():
    for value in (float("nan"), float("inf"), 10**400, [10**400, 1.5], None, [None]):
        checksum({"ref_logprobs": value})
    assert checksum({"ref_logprobs": [float("nan")]}) == checksum({"ref_logprobs": [-float("nan")]})


def test_a_round_trip_through_datasets_keeps_the_seal(tmp_path):
    """Its columns are filled up with nulls and its numbers may be float32."""
    human = {"prompt": "a", "completion": "b", "behavior_policy": "none"}
    bytes_row = {
        "prompt": "a", "completion": "bc", "behavior_policy": "api",
        "behavior_spans": {"bytes": [[0, 2], [2, 2]], "marks": {"1": "end_of_turn"}, "logprobs": [-0.1, -0.2]},
    }  # fmt: skip
    other = bytes_row | {"behavior_spans": bytes_row["behavior_spans"] | {"marks": {"0": "think_open"}}}
    write_scored(tmp_path / "scored", [bytes_row, human, other])
    Dataset.from_list([row for _, row in read_jsonl(tmp_path / "scored")]).to_json(tmp_path / "again")
    rows = [row for _, row in read_jsonl(tmp_path / "again")]
    assert "behavior_spans" in rows[1] and rows[1]["behavior_spans"] is None
    for row in rows:
        check_seal(row, "again")


@pytest.mark.parametrize(
    "scored, message",
    [
        (None, "no seal .*an older version of pear or another program .*Score it again.*import it again"),
        ({"format": 1}, "format 1, this version reads 2 and 3"),
        ({"format": 4}, "format 4, this version reads 2 and 3"),
        ({}, "format None"),
        ("yes", "a damaged seal: `scored` is 'yes'"),
        ({"format": 2}, "a damaged seal"),
        ({"format": 3, "checksum": 7}, "a damaged seal"),
        ({"format": 3, "checksum": "b"}, r"edited .*its seal says b\)"),
    ],
)
def test_bad_seals_are_named(scored, message):
    row = ROW if scored is None else ROW | {"scored": scored}
    with pytest.raises(DataError, match=f"^data.jsonl:9: .*{message}"):
        check_seal(row, "data.jsonl:9")


def test_write_scored_is_whole_and_the_same_every_time(tmp_path):
    rows = [ROW | {"id": n, "prompt": str(n)} for n in range(5)]
    assert write_scored(tmp_path / "a", iter(rows)) == 5
    write_scored(tmp_path / "b", rows)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = [row for _, row in read_jsonl(tmp_path / "a")]
    for row, original in zip(read, rows, strict=True):
        check_seal(row, "a")
        assert row == seal(original)
