"""Rows longer than a model takes: one rule for `pear score`, `pear inspect` and `pear sft`, in the same words.

The limit is the model's positions unless `max_length` is given. A longer row is never cut. Longer rows are an error if
they are more than SHARE of the rows, else they are left out and counted, in a warning and in a command's last line.
"""

from collections.abc import Mapping, Sequence

from pear.io import DataError, line_list

SHARE = 0.01


def check_long_rows(
    where: str, long: Sequence[int], rows: int, limit: int | str, *, drop: bool = False, strict: bool = False
) -> None:
    """
    Args:
        where: the file
        long: numbers of the lines that are too long
        rows: of the file, these included
        drop: any number of them may be left out, as long as a row remains
        strict: none may

    Raises:
        DataError: too many rows would be left out.
    """
    if not long or len(long) < rows and (drop or not strict and len(long) <= SHARE * rows):
        return
    message = f"{where}: {len(long)} of {rows} rows are {too_long(long, limit)}"
    if len(long) == rows:
        raise DataError(f"{message}: no row is left. Give a larger max_length, if the model has the positions.")
    if strict:
        raise DataError(f"{message}. Give a larger max_length, or leave strict_length off.")
    raise DataError(
        f"{message}, more than {100 * SHARE:g} %. Give a larger max_length, if the model has the positions; or "
        "pass --drop_long_rows to go on without these rows."
    )


def too_long(lines: Sequence[int], limit: int | str) -> str:
    return f"longer than max_length = {limit} tokens ({line_list(lines)})"


def rows_in_words(done: str, kept: int, left_out: Mapping[str, int]) -> str:
    """The last line of a command: "Wrote 97 of 98 rows; left out: 1 longer than max_length = 64 tokens (line 3)".

    Args:
        done: what it starts with, "Wrote" say
        left_out: a reason, and the number of rows that it left out
    """
    total = kept + sum(left_out.values())
    reasons = [f"{count} {why}" for why, count in left_out.items() if count]
    if not reasons:
        return f"{done} all {total} rows" if total != 1 else f"{done} 1 row"
    return f"{done} {kept} of {total} rows; left out: " + ", ".join(reasons)
