"""The command line of `pear import`: its settings as the library takes them, and what it says at the end."""

from pathlib import Path
from typing import Any

from pear.importing.client import Client, read_key
from pear.importing.report import lines
from pear.importing.run import import_logprobs
from pear.io import DataError
from pear.strict_json import parse_json

MAX_TOKENS = 1024


def run(
    source: str,
    data: Path,
    out: Path,
    *,
    columns: dict[str, str],
    sampling: dict[str, Any],
    url: str | None,
    api_key_env: str | None,
    timeout: float,
    retries: int,
    max_tokens: int | None,
    seed: int | None,
    extra_body: str | None,
    server_model: str | None,
    n: int,
    **others: Any,
) -> tuple[list[str], int]:
    """The summary's lines, and how many rows were set aside.

    Raises:
        DataError: settings that do not go together, besides all that `import_logprobs` raises.
    """
    if columns and source != "jsonl":
        raise DataError(f"--{next(iter(columns))}-column goes with --source jsonl, got --source {source}")
    known = {name: value for name, value in sampling.items() if value is not None}
    if url is None:
        asked = {"--server_model": server_model, "--max_tokens": max_tokens, "--seed": seed}
        asked |= {"--extra_body": extra_body, "--api_key_env": api_key_env, "--n": None if n == 1 else n}
        if given := [name for name, value in asked.items() if value is not None]:
            raise DataError(f"{given[0]} is about asking a server: give its --url too")
        client, request = None, None
    else:
        client = Client(url, read_key(api_key_env, "OPENAI_API_KEY"), timeout=timeout, retries=retries)
        request = {"temperature": 1.0, "top_p": 1.0, "max_tokens": MAX_TOKENS if max_tokens is None else max_tokens}
        request |= {"seed": seed} | known
        known = {}
    result = import_logprobs(
        source,
        data,
        out,
        columns_named=columns,
        settings=known,
        client=client,
        request=request,
        server_model=server_model,
        n=n,
        extra_body=_json(extra_body),
        **others,
    )
    return summary(result), result["rejected"]


def _json(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = parse_json(text)
    except ValueError as error:
        raise DataError(f"--extra_body must be a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"--extra_body must be a JSON object, got {type(value).__name__}")
    return value


def summary(result: dict[str, Any]) -> list[str]:
    kinds = ", ".join(f"{count} {kind} rows" for kind, count in sorted(result["kinds"].items()))
    mean = "" if result["mean_logprob"] is None else f", mean log-prob {result['mean_logprob']:.4f}"
    before = f" ({result['resumed']} by an earlier call)" if result["resumed"] else ""
    said = [
        f"{result['out'] or 'nothing written'}: {result['written']} rows of {result['records']} records{before}"
        + (f": {kinds}" if kinds else "")
        + f"; {result['tokens']} response tokens{mean}, {result['seconds']:.1f} s",
        *lines(result),
    ]
    if result["rejected"]:
        again = f" The same command tries them again (done so far: {result['partial']})." if result["partial"] else ""
        said.append(f"{result['rejected']} set aside with their reasons in {result['rejects']}.{again}")
    return [*said, f"report: {result['report']}"]
