"""Files: errors that say where, and files that are whole or not there."""

import errno
import gzip
import json
import math
import os
import re
import resource
import socket
import stat
import subprocess
import sys
from itertools import pairwise

import pytest

from pear.io import (
    DataError,
    WriteError,
    atomic_writer,
    check_output,
    check_scored_row,
    read_jsonl,
    read_object,
    read_yaml,
    write_json,
    write_jsonl,
    write_text,
)
from pear.pictures import write_whole


def test_jsonl_round_trip_keeps_order_numbers_and_text(tmp_path):
    rows = [{"a": 1.5, "text": 'ü \u2028 \n quote"'}, {"b": [1, 2, 3]}, {}]
    assert write_jsonl(tmp_path / "x.jsonl", rows) == 3
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, rows[0]), (2, rows[1]), (3, rows[2])]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert [number for number, _ in read_jsonl(tmp_path / "x.jsonl")] == [1, 4]


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, {"a": 1})]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"a": 1,}', "not JSON"),
        (b"hello there", "not JSON.*hello there"),
        (b'{"a": ', "not JSON"),
        (b"[1, 2]", "expected a JSON object.*list"),
        (b'"text"', "expected a JSON object.*str"),
        (b'{"a": "\xff"}', "not UTF-8"),
    ],
)
def test_bad_line_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"ok": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:2: {message}"):
        list(read_jsonl(path))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"note": {"a": ["\\ud83d"]}}', "`note.a[0]` holds half of a surrogate pair"),
        (b'{"note": {"\\udc00": 1}}', "key '\\udc00' holds half of a surrogate pair"),
        (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 deep"),
        (b'{"x": ' + b'[{"y": ' * 60 + b"1" + b"}]" * 60 + b"}", "nested more than 100 deep"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (b'{"x": ' + b"9" * 5000 + b"}", "an integer of more than 4300 digits"),
        (b'{"prompt": "a", "prompt": "b"}', "key 'prompt' is given twice"),
    ],
)
def test_what_would_fail_later_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"ok": "\\ud83d\\ude00"}\n' + line + b"\n")  # a whole pair is an emoji
    with pytest.raises(DataError, match=r"x\.jsonl:2: .*" + re.escape(message)) as caught:
        list(read_jsonl(path))
    assert len(str(caught.value)) < 400


def test_line_ends_and_separators_inside_of_strings_are_text(tmp_path):
    row = {"a": "b\u2028c\u0085d", "deep": eval("[" * 99 + "]" * 99)}
    line = json.dumps(row, ensure_ascii=False).encode()
    (tmp_path / "x.jsonl").write_bytes(line + b"\r\n\r\n" + line)
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, row), (3, row)]


ROW = b'{"prompt": "a", "completion": "b"}'
FILES = {
    "gz": (gzip.compress(ROW), "a gzip archive.*: gunzip -k {}"),
    "zst": (b"\x28\xb5\x2f\xfd\0", "a zstd archive.*: zstd -d {}"),
    "zip": (b"PK\x03\x04\0", "a zip archive.*: unzip {}"),
    "parquet": (b"PAR1\x15\0", "a parquet file.*l\\('parquet', data_files='{}'\\)"),
    "arrow": (b"ARROW1\0\0", "an arrow file.*l\\('arrow', data_files='{}'\\)"),
    "array": (b"[" + ROW + b"]", "1: expected a JSON object with keys, got list.*jq -c '.\\[\\]' {}"),
    "lines": (b"[\n" + ROW + b"\n]", "1: not JSON.*For a JSON array.*jq -c '.\\[\\]' {}"),
    "pretty": (b'{\n  "prompt": "a"\n}', "1: not JSON.*For an object over several lines.*jq -c . {}"),
    "repr": (b"{'prompt': 'a'}", "1: not JSON.*json.dumps"),
    "csv": (b"prompt,completion\na,b\n", "1: not JSON.*For CSV.*l\\('csv', data_files='{}'\\)"),
    "utf16": ('{"prompt": "a"}'.encode("utf-16"), "UTF-16, not UTF-8.*iconv -f UTF-16 -t UTF-8 {}"),
    "utf16le": ('{"prompt": "a"}'.encode("utf-16-le"), "UTF-16LE, not UTF-8"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "bin": (b"\x89\0\1\2", "a binary file"),
}


@pytest.mark.parametrize("name", FILES)
def test_other_files_are_named_with_what_makes_jsonl_of_them(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / f"data.{name}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:.*{message.format(re.escape(str(path)))}"):
        list(read_jsonl(path))


def test_what_is_no_file_is_said(tmp_path):
    with pytest.raises(DataError, match="a folder; give a file in it"):
        list(read_jsonl(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file"):
        list(read_jsonl(tmp_path / "pipe"))
    with pytest.raises(DataError, match="cannot be read: File name too long"):
        list(read_jsonl(tmp_path / ("x" * 300)))


BOMB = "a: &a [x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in pairwise("abcdefghij"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [" * 2000, "nested too deep"),
        ("a: [1", "not YAML: while parsing.*line 1"),
        (BOMB, "aliases stand for more than"),
        ("a: 2024-13-99", "not YAML: month must be"),
        ("a: {b: 1, c: 2, b: 3}", "not YAML: key 'b' is given twice"),
    ],
)
def test_yaml_without_bound_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(DataError, match=f"x.yaml: .*{message}"):
        read_yaml(tmp_path / "x.yaml", "a map")


@pytest.mark.parametrize("before", [None, "old"])
def test_failure_inside_the_block_leaves_the_folder_as_it_was(tmp_path, before):
    path = tmp_path / "x.txt"
    if before:
        path.write_text(before)
    with pytest.raises(RuntimeError, match="stop"), atomic_writer(path) as file:
        file.write("half of it")
        raise RuntimeError("stop")
    assert os.listdir(tmp_path) == (["x.txt"] if before else [])
    assert not before or path.read_text() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_an_error_in_words_and_leaves_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "x.json"
    write_json(path, {"old": True})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"pear.io.os.{call}", full)
    with pytest.raises(WriteError, match=r"could not write .*x\.json: the disk is full") as error:
        write_json(path, {"new": True})
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["x.json"] and json.loads(path.read_text()) == {"old": True}


def test_file_size_limit_of_the_system_leaves_nothing_half_written(tmp_path):
    """A real short write, not a simulated one: RLIMIT_FSIZE in a process of its own."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from pear.io import WriteError, write_jsonl\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: write_jsonl(sys.argv[1], ({'n': n, 'text': 'x' * 100} for n in range(100_000)))\n"
        "except WriteError as error: print(error.errno, error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.jsonl")], capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(f"{errno.EFBIG} ") and "x.jsonl: the disk is full" in run.stdout
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_new_file_has_the_usual_mode_and_an_old_one_keeps_its_own(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "new", "x")
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode
    plain.chmod(0o600)
    write_text(plain, "x")
    assert plain.stat().st_mode & 0o777 == 0o600


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "x"


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError, match="Out of range|not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": math.nan})
    assert os.listdir(tmp_path) == []
    write_json(tmp_path / "x.json", {"a": os.fsdecode(b"\xff.jsonl")})
    assert read_object(tmp_path / "x.json") == {"a": "\\udcff.jsonl"}


def good_row() -> dict:
    return {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "behavior_logprobs": [0.0, -1.5, -0.25]}


def test_good_row_passes():
    check_scored_row(good_row(), "f:1")
    check_scored_row(good_row() | {"behavior_logprobs": [math.nan, 5e-5, 0]}, "f:1")  # the prompt's values are nothing


@pytest.mark.parametrize(
    "change, message",
    [
        ({"behavior_logprobs": [0.0, -1.0]}, "one length, got 3, 3 and 2"),
        ({"completion_mask": [0, 1, 1, 1]}, "one length, got 3, 4 and 3"),
        ({"completion_mask": [0, 2, 1]}, r"completion_mask\[1\].*0 or 1, got 2"),
        ({"completion_mask": [0, 0, 0]}, "no completion"),
        ({"completion_mask": [1, 1, 1]}, r"completion_mask\[0\]` must be 0"),
        ({"behavior_logprobs": [0.0, math.nan, -1.0]}, r"behavior_logprobs\[1\]` is nan"),
        ({"behavior_logprobs": [0.0, -1.0, 2e-4]}, r"behavior_logprobs\[2\]` is 0.0002"),
        ({"behavior_logprobs": [0.0, -math.inf, -1.0]}, r"behavior_logprobs\[1\]` is -inf"),
        ({"behavior_logprobs": [0.0, "-1", -1.0]}, r"behavior_logprobs\[1\]` must be a number, got '-1'"),
        ({"behavior_logprobs": [0.0, True, -1.0]}, r"behavior_logprobs\[1\]` must be a number, got True"),
        ({"input_ids": [5, -6, 7]}, r"input_ids\[1\]` must be a token id >= 0, got -6"),
        ({"input_ids": [5, 6.0, 7]}, r"input_ids\[1\]` must be a token id"),
        ({"input_ids": "abc"}, "`input_ids` must be a list, got str"),
    ],
)
def test_bad_row_is_named_with_field_position_and_value(change, message):
    with pytest.raises(DataError, match=f"^f:7: .*{message}"):
        check_scored_row(good_row() | change, "f:7")


def full_row(**change) -> dict:
    """With every column that a row may have."""
    top = {"top_k_ids": [[], [6, 2], [0, 7]], "top_k_logprobs": [[], [-0.5, -1.5], [-0.25, -1.625]]}
    more = {"ref_logprobs": [0.0, -2.5, -0.75], "label": False, **top, "top_k_temperature": 2.0}
    more |= {"top_k_model": "teacher", "top_k_vocabulary": 8, "top_k_tokenizer": "0123"}
    return good_row() | more | change


def test_good_row_with_every_column_passes():
    check_scored_row(full_row(), "f:1")
    check_scored_row(full_row(), "f:1", needs=("ref_logprobs", "top_k_ids", "top_k_logprobs"))
    check_scored_row(full_row(label=True, ref_logprobs=[math.nan, 5e-5, 0]), "f:1")
    # What stands at the prompt is nothing; K may be 1, equal log-probs descend, and rounding may exceed 1 a little.
    check_scored_row(full_row(top_k_ids=[[1, 1, -5], [6], [7]], top_k_logprobs=[[9.0], [5e-5], [-1]]), "f:1")
    check_scored_row(full_row(top_k_logprobs=[[], [math.log(0.50004)] * 2, [-1, -1]]), "f:1")
    row = full_row(top_k_vocabulary=3)  # K + 1
    del row["behavior_logprobs"]
    check_scored_row(row, "f:1", needs=())
    for key in ("top_k_temperature", "top_k_model", "top_k_vocabulary", "top_k_tokenizer"):  # need not be there
        del row[key]
    check_scored_row(row, "f:1", needs=())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": 1}, "`label` must be true or false, got 1: write true"),
        ({"label": "false"}, '`label` must be true or false, got "false": write true'),
        ({"label": None}, "`label` must be true or false, got null"),
        ({"ref_logprobs": [0.0, -1.0]}, "`behavior_logprobs`, `ref_logprobs`.* one length, got 3, 3, 3, 2, 3 and 3"),
        ({"ref_logprobs": None}, "`ref_logprobs` must be a list, got NoneType"),
        ({"ref_logprobs": [0.0, -1.0, math.nan]}, r"`ref_logprobs\[2\]` is nan.*--column ref_logprobs"),
        ({"ref_logprobs": [0.0, 2e-4, -1.0]}, r"`ref_logprobs\[1\]` is 0.0002"),
        ({"ref_logprobs": [0.0, "x", -1.0]}, r"`ref_logprobs\[1\]` must be a number, got 'x'"),
        ({"top_k_ids": [[], [6, 2]]}, "one length, got 3, 3, 3, 3, 2 and 3"),
        ({"top_k_ids": [[], [6, 2], 7]}, r"`top_k_ids\[2\]` must be a list of K entries, got 7"),
        ({"top_k_ids": [[], [], [0, 7]]}, r"`top_k_ids\[1\]` must be a list of K entries, got \[\]"),
        ({"top_k_logprobs": [[], [-1, -2], []]}, r"`top_k_logprobs\[2\]` must be a list of K entries, got \[\]"),
        ({"top_k_ids": [[], [6, 2], [0, 7, 1]]}, r"`top_k_ids\[2\]` must have K = 2 entries.*got 3"),
        ({"top_k_logprobs": [[], [-1], [-1, -2]]}, r"`top_k_logprobs\[1\]` must have K = 2 entries.*got 1"),
        ({"top_k_ids": [[], [6, -2], [0, 7]]}, r"`top_k_ids\[1\]\[1\]` must be a token id >= 0, got -2"),
        ({"top_k_ids": [[], [6, 2], [0.0, 7]]}, r"`top_k_ids\[2\]\[0\]` must be a token id >= 0, got 0.0"),
        ({"top_k_ids": [[], [6, True], [0, 7]]}, r"`top_k_ids\[1\]\[1\]` must be a token id >= 0, got True"),
        ({"top_k_ids": [[], [6, 2], [7, 7]]}, r"`top_k_ids\[2\]` has token 7 twice"),
        ({"top_k_logprobs": [[], [-1, math.nan], [-1, -2]]}, r"`top_k_logprobs\[1\]\[1\]` must be a finite.*got nan"),
        ({"top_k_logprobs": [[], [-1, -math.inf], [-1, -2]]}, r"logprobs\[1\]\[1\]` must be a finite.*got -inf"),
        ({"top_k_logprobs": [[], [-1, -2], [math.inf, -2]]}, r"logprobs\[2\]\[0\]` must be a finite.*got inf"),
        ({"top_k_logprobs": [[], [-1, -2], ["-1", -2]]}, r"logprobs\[2\]\[0\]` must be a finite number, got '-1'"),
        ({"top_k_logprobs": [[], [-1, -2], [-2, False]]}, r"logprobs\[2\]\[1\]` must be a finite number, got False"),
        ({"top_k_logprobs": [[], [-1, -2], [-2, -1.5]]}, r"`top_k_logprobs\[2\]` must descend, got -1.5 after -2"),
        ({"top_k_logprobs": [[], [-0.5, -0.5], [-1, -2]]}, r"`top_k_logprobs\[1\]`: .* sum to 1.21306, more than 1"),
        ({"top_k_logprobs": [[], [-1, -2], [1e9, -2]]}, r"`top_k_logprobs\[2\]`: .* sum to inf"),
        ({"top_k_temperature": 0}, "`top_k_temperature` must be a positive number, got 0"),
        ({"top_k_temperature": "2"}, "`top_k_temperature` must be a positive number, got '2'"),
        ({"top_k_temperature": math.nan}, "`top_k_temperature` must be a positive number, got nan"),
        ({"top_k_model": 7}, "`top_k_model` must be a string, a model's name, got 7"),
        ({"top_k_model": None}, "`top_k_model` must be a string, a model's name, got None"),
        ({"top_k_tokenizer": 7}, "`top_k_tokenizer` must be a string, a vocabulary's fingerprint, got 7"),
        ({"top_k_tokenizer": None}, "`top_k_tokenizer` must be a string, .* got None"),
        ({"top_k_vocabulary": 2}, r"`top_k_vocabulary` must be a whole .*, at least K \+ 1 = 3, got 2"),
        ({"top_k_vocabulary": 8.0}, "`top_k_vocabulary` must be a whole number of tokens, .* got 8.0"),
        ({"top_k_vocabulary": "8"}, "`top_k_vocabulary` must be a whole number of tokens, .* got '8'"),
        ({"top_k_vocabulary": True}, "`top_k_vocabulary` must be a whole number of tokens, .* got True"),
        ({"top_k_vocabulary": None}, "`top_k_vocabulary` must be a whole number of tokens, .* got None"),
    ],
)
def test_bad_optional_column_is_named_with_position_value_and_remedy(change, message):
    with pytest.raises(DataError, match=f"^f:7: .*{message}") as error:
        check_scored_row(full_row(**change), "f:7")
    if message.startswith("`top_k") and "one length" not in message:
        assert "Score the row again with `pear score --column none --top_k K`" in str(error.value)


@pytest.mark.parametrize("key", ["top_k_ids", "top_k_logprobs"])
def test_one_column_of_top_k_without_the_other_is_an_error(key):
    row = full_row()
    del row[key]
    with pytest.raises(DataError, match=f"f:7: no `{key}`; `pear score --column none --top_k K` writes"):
        check_scored_row(row, "f:7")


def test_column_that_is_needed_and_missing_is_named():
    with pytest.raises(DataError, match="f:7: no `ref_logprobs`; `pear score --column ref_logprobs` writes it"):
        check_scored_row(good_row(), "f:7", needs=("behavior_logprobs", "ref_logprobs"))


@pytest.mark.parametrize("key", ["input_ids", "completion_mask", "behavior_logprobs"])
def test_missing_field_is_named(key):
    row = good_row()
    del row[key]
    with pytest.raises(DataError, match=f"f:7: no `{key}`"):
        check_scored_row(row, "f:7")


# ---- outputs that are no regular files


def test_fifos_devices_and_descriptors_are_written_into_and_stay_what_they_are(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # so that writers do not wait for one
    write_text(fifo, "text\n")
    write_json(fifo, {"a": 1})
    write_jsonl(fifo, [{"b": 2}])
    with pytest.raises(RuntimeError), atomic_writer(fifo) as file:
        file.write("half of it")
        raise RuntimeError
    assert os.read(reader, 1000) == b'text\n{\n  "a": 1\n}\n{"b": 2}\n'
    write_whole({fifo: b"png", tmp_path / "beside": b"file"})
    assert os.read(reader, 1000) == b"png" and (tmp_path / "beside").read_bytes() == b"file"
    assert stat.S_ISFIFO(os.stat(fifo).st_mode) and sorted(os.listdir(tmp_path)) == ["beside", "fifo"]
    before = os.stat("/dev/null")
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    for path in ("/dev/null", link):
        write_text(path, "x")
    assert os.path.samestat(before, os.stat("/dev/null")) and link.is_symlink()
    os.close(reader)


def test_a_descriptor_of_this_process_goes_on_where_it_is(tmp_path):
    code = "import os; from pear.io import write_text; print('a'); write_text('/dev/stdout', 'b\\n'); print('c')"
    with open(tmp_path / "out", "w") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True)
    assert (tmp_path / "out").read_text() == "a\nb\nc\n" and os.listdir(tmp_path) == ["out"]


def test_a_link_is_followed_and_kept(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_a_socket_is_refused_and_so_are_streams_where_side_files_are_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        with pytest.raises(DataError, match="s is a socket: nothing is written to it"):
            write_text("s", "x")
    os.mkfifo("fifo")
    check_output("fifo")
    with pytest.raises(DataError, match="out is no regular file, fifo: .*give the name of a regular file"):
        check_output("fifo", streams=False)


def test_what_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=r"could not write .*file/out\.json: Not a directory"):
        check_output(tmp_path / "file" / "out.json")
    with pytest.raises(DataError, match="html is a folder, .*give the name of a file in it"):
        check_output(tmp_path, "html")
    check_output(tmp_path / "not" / "yet" / "there.json")
    assert os.listdir(tmp_path) == ["file"]

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pear.io.tempfile.TemporaryFile", read_only)
    with pytest.raises(WriteError, match=r"could not write .*out\.json: Read-only file system"):
        check_output(tmp_path / "out.json")
