"""What a file is that holds no JSONL, by its first bytes, and the command that makes JSONL of it."""

from pathlib import Path

HEAD = 4096  # bytes that tell a format
_TO_JSONL = (
    'python -c "from datasets import load_dataset as l; '
    "l('{kind}', data_files='{path}')['train'].to_json('rows.jsonl')\""
)
_UNPACK = {
    b"\x1f\x8b": ("a gzip archive", "gunzip -k"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "zstd -d"),
    b"BZh": ("a bzip2 archive", "bunzip2 -k"),
    b"\xfd7zXZ\0": ("an xz archive", "unxz -k"),
    b"\x04\x22\x4d\x18": ("an lz4 archive", "lz4 -d"),
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
}
_TABLES = {
    b"PAR1": ("a parquet file", "parquet"),
    b"ARROW1": ("an arrow file", "arrow"),
    b"\xff\xff\xff\xff": ("an arrow file", "arrow"),
}
_TEXTS = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def other_format(path: Path, head: bytes) -> str | None:
    """What a file is that begins with `head`, and what to do about it; None where it may be text in UTF-8."""
    for start, (what, command) in _UNPACK.items():
        if head.startswith(start):
            return f"{what}, not text: unpack it first: {command} {path}"
    for start, (what, kind) in _TABLES.items():
        if head.startswith(start):
            return f"{what}, not JSONL: convert it first: {_TO_JSONL.format(kind=kind, path=path)}"
    if head[257:262] == b"ustar":
        return f"a tar archive, not text: unpack it first: tar -xf {path}"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: git lfs pull"
    coding = next((name for start, name in _TEXTS.items() if head.startswith(start)), None)
    if coding is None and len(head) > 3 and head[0] and head[2] and not head[1] and not head[3]:
        coding = "UTF-16LE"
    if coding is None and len(head) > 3 and head[1] and head[3] and not head[0] and not head[2]:
        coding = "UTF-16BE"
    if coding:
        return f"text in {coding}, not UTF-8: convert it first: iconv -f {coding} -t UTF-8 {path} > rows.jsonl"
    if b"\0" in head:
        return "a binary file, not text: give JSONL, one JSON object a line"
    return None


def json_hint(path: Path, line: str, at: int, number: int) -> str:
    """What a line that is no JSON may be part of, and what to do."""
    if line.startswith("[") and number == 1:
        return f". For a JSON array of rows, not one object a line: jq -c '.[]' {path} > rows.jsonl"
    if line.startswith("{") and number == 1 and at >= len(line.rstrip(",")):
        return f". For an object over several lines, not one object a line: jq -c . {path} > rows.jsonl"
    if line.startswith(("{'", "{ '")):
        return ". That is Python's repr, not JSON: write rows by json.dumps(row)"
    if number == 1 and line[0] not in "{[" and ("," in line or "\t" in line):
        return f". For CSV: {_TO_JSONL.format(kind='csv', path=path)}"
    return ""
