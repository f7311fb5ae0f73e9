"""`pear import` from files: what each source tells becomes the rows that `pear score` makes of the same text."""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_model, make_tokenizer
from typer.testing import CliRunner

from pear.align import Spans, align, spans_of
from pear.cli import app
from pear.importing import columns, from_vllm, import_logprobs, openai, sglang, vllm
from pear.importing.generation import Reject
from pear.importing.report import report
from pear.importing.rows import Converter
from pear.importing.run import _read
from pear.io import DataError, check_scored_row, read_jsonl, write_jsonl
from pear.rows import prompt_and_completion, tokenize_row
from pear.score import score
from pear.scored import load_scored
from pear.seal import check_seal, write_scored

POLICY = "teacher"
SAMPLING = {"temperature": 0.7, "top_p": 0.95, "top_k": 20}


@pytest.fixture(scope="session")
def teacher(tokenizer):
    return make_model(tokenizer, seed=3)


@dataclass
class Told:
    """One response, as a server knows it: its ids and the float64 log-probs of a real model."""

    prompt: Any
    text: str
    prompt_ids: list[int]
    ids: list[int]
    logprobs: list[float]
    pieces: list[bytes] = field(default_factory=list)  # of each id

    @property
    def tokens(self) -> list[str]:
        """As vLLM spells them: nothing until a character is whole, and then all of it."""
        said, open_bytes = [], b""
        for piece in self.pieces:
            open_bytes += piece
            try:
                said.append(open_bytes.decode())
                open_bytes = b""
            except UnicodeDecodeError:
                said.append("")
        return said


def tell(model, tokenizer, row: dict, end: bool = True) -> Told:
    """What a server would tell that had just written the row's completion, up to its end of turn."""
    row = prompt_and_completion(row, "row")
    own = tokenize_row(row, tokenizer, "row")
    start = own.completion_mask.index(1)
    ids = own.input_ids[start:]
    ids = ids[: ids.index(tokenizer.eos_token_id) + (1 if end else 0)]
    input_ids = torch.tensor([own.input_ids[:start] + ids])
    with torch.no_grad():
        logprobs = model(input_ids=input_ids).logits[0].double().log_softmax(-1)
    values = logprobs[start - 1 : -1].gather(-1, input_ids[0, start:, None])[:, 0].tolist()
    chat = isinstance(row["completion"], list)
    text = row["completion"][0]["content"] if chat else row["completion"]
    whole = tokenizer.backend_tokenizer
    alphabet = {c: b for b, c in _byte_alphabet().items()}
    spelled = [whole.id_to_token(token) for token in ids]
    pieces = [
        s.encode() if token in tokenizer.all_special_ids else bytes(alphabet[c] for c in s)
        for s, token in zip(spelled, ids, strict=True)
    ]
    return Told(row["prompt"], text, own.input_ids[:start], ids, values, pieces)


def _byte_alphabet() -> dict[int, str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()


ROWS = [
    {"prompt": "What is 3 plus 4?", "completion": " It is 7."},
    {"prompt": "Say it: ", "completion": "naïve – 你好, 🙂‍↔️!\n\tdone  "},
    {"prompt": [{"role": "user", "content": "What is 12 minus 5?"}],
     "completion": [{"role": "assistant", "content": "It is 7 again. 🙂"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
                  {"role": "assistant", "content": " the answer is\n\nthere"}]},
]  # fmt: skip


@pytest.fixture
def told(teacher, tokenizer) -> list[Told]:
    return [tell(teacher, tokenizer, row) for row in ROWS]


# ---------------------------------------------------------------------------------------------------------------------
# Records, as each source writes them


def vllm_record(t: Told, **more) -> dict:
    where = {"messages": t.prompt} if isinstance(t.prompt, list) else {"prompt": t.prompt}
    logprobs = [
        {"5": {"logprob": -0.5, "rank": 1, "decoded_token": "?"}, str(i): {"logprob": p, "rank": 2, "decoded_token": s}}
        if i != 5
        else {"5": {"logprob": p, "rank": 1, "decoded_token": s}}
        for i, p, s in zip(t.ids, t.logprobs, t.tokens, strict=True)
    ]
    output = {"index": 0, "text": t.text, "token_ids": t.ids, "logprobs": logprobs,
              "cumulative_logprob": sum(t.logprobs), "finish_reason": "stop", "stop_reason": None}  # fmt: skip
    return {"request_id": "0", **where, "prompt_token_ids": t.prompt_ids, "outputs": [output], **more}


def sglang_record(t: Told, **more) -> dict:
    where = {"messages": t.prompt} if isinstance(t.prompt, list) else {"prompt": t.prompt}
    meta = {
        "output_token_logprobs": [[p, i, None] for p, i in zip(t.logprobs, t.ids, strict=True)],
        "input_token_logprobs": [[None if k == 0 else -1.0, i, None] for k, i in enumerate(t.prompt_ids)],
        "prompt_tokens": len(t.prompt_ids), "completion_tokens": len(t.ids),
        "finish_reason": {"type": "stop", "matched": t.ids[-1]}, "id": "x", "cached_tokens": 0,
    }  # fmt: skip
    return {"text": t.text, "output_ids": t.ids, "meta_info": meta, **where, **more}


def chat_record(t: Told, ids: bool = False, data: bool = True, **more) -> dict:
    """An OpenAI-compatible chat answer; `data`: with `bytes`, else tokens as vLLM spells them; `ids`: vLLM's own."""
    content = [
        {"token": s, "logprob": p, "bytes": list(b) if data else None, "top_logprobs": []}
        for s, p, b in zip(t.tokens, t.logprobs, t.pieces, strict=True)
    ]
    choice = {"index": 0, "message": {"role": "assistant", "content": t.text}, "finish_reason": "stop",
              "logprobs": {"content": content}} | ({"token_ids": t.ids} if ids else {})  # fmt: skip
    usage = {"prompt_tokens": len(t.prompt_ids), "completion_tokens": len(t.ids)}
    response = {"id": "x", "model": POLICY, "choices": [choice], "usage": usage}
    return {"request": {"messages": t.prompt, **SAMPLING}, "response": response, **more}


def text_record(t: Told, ids: bool = False, echo: bool = False) -> dict:
    """An OpenAI-compatible answer of /v1/completions."""
    tokens, values = list(t.tokens), list(t.logprobs)
    if echo:
        tokens, values = [*t.prompt, *tokens], [None, *[-2.0] * (len(t.prompt) - 1), *values]
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None, "text_offset": []}
    choice = {"index": 0, "text": (t.prompt if echo else "") + t.text, "finish_reason": "stop", "logprobs": logprobs}
    if ids:
        choice |= {"token_ids": t.ids, "prompt_token_ids": t.prompt_ids}
    request = {"model": POLICY, "prompt": t.prompt, "echo": echo, **SAMPLING}
    return {"request": request, "response": {"model": POLICY, "choices": [choice]}}


def run(tmp_path, source: str, records: list[dict], **kwargs) -> tuple[list[dict], dict]:
    """The rows written, each checked as training will check it, and the report."""
    data = tmp_path / "records.jsonl"
    write_jsonl(data, records)
    out = tmp_path / "scored.jsonl"
    result = import_logprobs(source, data, out, progress=False, **kwargs)
    rows = [row for _, row in read_jsonl(out)] if result["out"] else []
    for number, row in enumerate(rows, start=1):
        check_seal(row, f"{out}:{number}")
        if "input_ids" in row:
            check_scored_row(row, f"{out}:{number}")
    assert json.loads((tmp_path / "scored.jsonl.report.json").read_text())["rows"] == len(rows) == result["written"]
    assert not list(tmp_path.glob("*.partial"))
    return rows, result


@pytest.fixture
def folder(tokenizer, teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scored(folder, tmp_path) -> list[dict]:
    """What `pear score` writes of the same rows."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    score(folder, tmp_path / "rows.jsonl", tmp_path / "local.jsonl", progress=False)
    return [row for _, row in read_jsonl(tmp_path / "local.jsonl")]


def assert_as_scored(rows: list[dict], scored: list[dict]) -> None:
    """The same tokens, spans and log-probs, but for the line end that ChatML puts behind the end of turn."""
    assert len(rows) == len(scored)
    for row, own in zip(rows, scored, strict=True):
        assert (row["prompt"], row["completion"], row["tokenizer"]) == (
            own["prompt"],
            own["completion"],
            own["tokenizer"],
        )
        n = len(row["input_ids"])
        assert len(own["input_ids"]) - n == (1 if isinstance(row["prompt"], list) else 0)
        assert row["input_ids"] == own["input_ids"][:n]
        assert row["completion_mask"] == own["completion_mask"][:n]
        np.testing.assert_allclose(row["behavior_logprobs"], own["behavior_logprobs"][:n], atol=2e-5)
        count = sum(row["completion_mask"])
        spans, theirs = row["behavior_spans"], own["behavior_spans"]
        assert spans["bytes"] == theirs["bytes"][:count]
        assert spans["marks"] == {k: v for k, v in theirs["marks"].items() if int(k) < count}
        assert row["behavior_policy"] == row["model"] == POLICY


@pytest.mark.parametrize("source", ["vllm", "sglang", "openai"])
def test_ids_and_tokenizer_give_the_rows_that_pear_score_writes(source, told, scored, folder, tmp_path):
    if source == "vllm":
        records = [vllm_record(t, behavior_policy=POLICY) for t in told]
    elif source == "sglang":
        records = [sglang_record(t, behavior_policy=POLICY) for t in told]
    else:
        records = [chat_record(t, ids=True) if isinstance(t.prompt, list) else text_record(t, ids=True) for t in told]
    rows, result = run(tmp_path, source, records, tokenizer=folder)
    assert_as_scored(rows, scored)
    found = {entry["check"]: entry for entry in result["checks"]}
    assert found["ids are the text"]["yes"] == found["completion re-encodes to the ids"]["yes"] == len(told)
    assert result["kinds"] == {"token": len(told)} and result["special_tokens"] == {"end_of_turn": len(told)}
    if source == "openai":  # the chat answers tell how many tokens the prompt had, and not which
        assert found["prompt tokens as the server counted"]["yes"] == 2
    else:
        assert found["prompt re-encodes to the ids"]["yes"] == len(told)


def test_without_a_tokenizer_the_same_answers_give_byte_rows(told, scored, tmp_path):
    records = [chat_record(t) if isinstance(t.prompt, list) else text_record(t) for t in told]
    rows, result = run(tmp_path, "openai", records)
    assert result["kinds"] == {"byte": len(told)}
    for row, t, own in zip(rows, told, scored, strict=True):
        assert not {"input_ids", "completion_mask", "behavior_logprobs", "tokenizer"} & set(row)
        spans = row["behavior_spans"]
        assert spans["logprobs"] == t.logprobs
        assert spans["marks"][str(len(t.ids) - 1)] == "end_of_turn"
        ends = [end for _, end in spans["bytes"]]
        assert ends[-1] == len(t.text.encode())
        if isinstance(row["prompt"], list):  # with `bytes`, cut within characters as the ids are
            assert spans["bytes"] == own["behavior_spans"]["bytes"][: len(t.ids)]


@pytest.mark.parametrize("data", [True, False])
def test_a_byte_row_gives_the_students_own_tokenizer_the_log_probs_of_its_tokens(data, told, tokenizer, tmp_path):
    """Aligned with the policy's own tokenizer, each token has its log-prob back, split characters their sum."""
    chats = [t for t in told if isinstance(t.prompt, list)]
    rows, _ = run(tmp_path, "openai", [chat_record(t, data=data) for t in chats])
    for row, t in zip(rows, chats, strict=True):
        student = spans_of(row, tokenize_row(row, tokenizer, "row"), tokenizer)
        behavior = Spans.from_json(row["behavior_spans"], "row")
        found = align(student, behavior, row["behavior_spans"]["logprobs"])
        assert found.behavior_logprobs.sum() == pytest.approx(math.fsum(t.logprobs), abs=1e-12)
        if data:
            np.testing.assert_array_equal(found.behavior_logprobs[: len(t.ids)], t.logprobs)
            assert found.block_ids[: len(t.ids)].tolist() == list(range(len(t.ids)))


def test_jsonl_with_columns_of_any_name(told, scored, folder, tokenizer, tmp_path):
    names = {"prompt": "question", "completion": "answer", "logprobs": "lp", "policy": "who"}
    plain = [{"question": t.prompt, "answer": t.text, "lp": t.logprobs, "who": POLICY, "kept": 1} for t in told]
    rows, result = run(tmp_path, "jsonl", plain, tokenizer=folder, columns_named=names)
    assert_as_scored(rows, scored)  # tokenised again, and the counts agree
    assert all(row["kept"] == 1 for row in rows)
    assert next(e for e in result["checks"] if e["check"] == "ids are the text")["not checkable"] == len(told)

    with_ids = [row | {"ids": t.ids} for row, t in zip(plain, told, strict=True)]
    rows, result = run(tmp_path, "jsonl", with_ids, tokenizer=folder, columns_named=names | {"ids": "ids"})
    assert_as_scored(rows, scored)
    assert next(e for e in result["checks"] if e["check"] == "ids are the text")["yes"] == len(told)

    with_bytes = [row | {"pieces": [list(b) for b in t.pieces]} for row, t in zip(plain, told, strict=True)]
    rows, _ = run(tmp_path, "jsonl", with_bytes, columns_named=names | {"tokens": "pieces"})
    for row, own in zip(rows, scored, strict=True):
        spans = row["behavior_spans"]["bytes"]
        assert spans == own["behavior_spans"]["bytes"][: len(spans)]
    with pytest.raises(DataError, match="give one"):
        run(tmp_path, "jsonl", with_ids, columns_named={"ids": "ids", "tokens": "tokens"})


def test_a_prompt_column_that_is_named_is_the_prompt(tmp_path):
    messages = [{"role": "user", "content": "the chat"}]
    row = {"messages": messages, "prompt": "x", "question": "y", "completion": "ab", "logprobs": [-1.0, -2.0],
           "tokens": ["a", "b"], "behavior_policy": POLICY}  # fmt: skip
    for named, expected in (({}, messages), ({"prompt": "prompt"}, "x"), ({"prompt": "question"}, "y")):
        rows, _ = run(tmp_path, "jsonl", [row], columns_named=named | {"tokens": "tokens"})
        assert rows[0]["prompt"] == expected


def test_messages_that_hold_the_response_already_are_no_prompt(told, tmp_path):
    """It would be there twice, and the log-probs not those of the second."""
    t = told[2]
    doubled = [*t.prompt, {"role": "assistant", "content": t.text}]
    record = {"messages": doubled, "completion": t.text, "logprobs": t.logprobs, "tokens": [list(b) for b in t.pieces]}
    _, result = run(tmp_path, "jsonl", [record], policy=POLICY, columns_named={"tokens": "tokens"})
    assert result["rejected"] == 1 and result["written"] == 0
    _, result = run(tmp_path, "vllm", [vllm_record(t) | {"messages": doubled}], policy=POLICY)
    assert result["rejected"] == 1 and result["written"] == 0


def test_without_ids_a_count_that_is_not_the_tokenizers_is_set_aside(told, folder, tmp_path):
    records = [{"prompt": t.prompt, "completion": t.text, "logprobs": t.logprobs[:-2]} for t in told]
    _, result = run(tmp_path, "jsonl", records, tokenizer=folder, policy=POLICY)
    assert (result["written"], result["rejected"]) == (0, len(told)) and result["out"] is None
    reasons = [row["reason"] for _, row in read_jsonl(tmp_path / "scored.jsonl.rejects.jsonl")]
    assert all("log-probs for" in reason for reason in reasons)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM's live objects


@dataclass
class Logprob:  # vllm.logprobs.Logprob
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:  # vllm.outputs.CompletionOutput
    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None
    kv_transfer_params: Any = None


class RequestOutput:  # vllm.outputs.RequestOutput
    def __init__(self, request_id, prompt, prompt_token_ids, prompt_logprobs, outputs, finished, **kwargs):
        self.request_id, self.prompt, self.prompt_token_ids = request_id, prompt, prompt_token_ids
        self.prompt_logprobs, self.outputs, self.finished = prompt_logprobs, outputs, finished
        self.metrics = self.lora_request = self.num_cached_tokens = None


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int | None = None


def live_output(t: Told, prompt: str | None) -> RequestOutput:
    entries = [
        {7: Logprob(-9.0, 1, "x")} | {i: Logprob(p, 3, s)} for i, p, s in zip(t.ids, t.logprobs, t.tokens, strict=True)
    ]
    output = CompletionOutput(0, t.text, tuple(t.ids), sum(t.logprobs), entries, finish_reason="stop")
    return RequestOutput("1", prompt, t.prompt_ids, None, [output, output], True)


def test_from_vllm_takes_request_outputs(told, scored, folder, tokenizer, tmp_path):
    texts = [t for t in told if isinstance(t.prompt, str)]
    params = SamplingParams(temperature=0.6, n=2)
    records = list(from_vllm([live_output(t, t.prompt) for t in texts], params, policy=POLICY))
    assert all(len(entry) == 1 for record in records for entry in record["outputs"][0]["logprobs"])
    rows, result = run(tmp_path, "vllm", records, tokenizer=folder)
    assert_as_scored(rows, [row for row in scored[: len(texts)] for _ in range(2)])  # two outputs each
    assert all(row["behavior_sampling"]["temperature"] == 0.6 for row in rows)
    assert "temperature 0.6" in result["warnings"][0] and "temperature 1" in result["warnings"][0]

    rows, _ = run(tmp_path, "vllm", list(from_vllm([live_output(texts[0], None)])), tokenizer=folder, policy=POLICY)
    assert rows[0]["prompt"] == texts[0].prompt  # of its ids alone


def test_a_text_that_vllm_scored(teacher, tokenizer, folder, scored, tmp_path):
    """`prompt_logprobs`, of which the first is None: the whole row's, and as `pear score` has it."""
    records = []
    for row, own in zip(ROWS, scored, strict=True):
        row = prompt_and_completion(row, "row")
        ids = torch.tensor([own["input_ids"]])
        with torch.no_grad():
            logprobs = teacher(input_ids=ids).logits[0].double().log_softmax(-1)
        entries = [None] + [
            {str(token): {"logprob": logprobs[t, token].item(), "rank": 1, "decoded_token": "?"}}
            for t, token in enumerate(own["input_ids"][1:])
        ]
        asked = {"messages": row["prompt"]} if isinstance(row["prompt"], list) else {"prompt": row["prompt"]}
        records.append(asked | {"completion": row["completion"], "prompt_token_ids": own["input_ids"],
                                "prompt_logprobs": entries, "outputs": []})  # fmt: skip
    rows, _ = run(tmp_path, "vllm", records, tokenizer=folder, policy=POLICY)
    for row, own in zip(rows, scored, strict=True):
        assert row["input_ids"] == own["input_ids"] and row["completion_mask"] == own["completion_mask"]
        assert row["behavior_spans"] == own["behavior_spans"]
        np.testing.assert_allclose(row["behavior_logprobs"], own["behavior_logprobs"], atol=2e-5)
    records[0]["prompt_token_ids"] = [5, *records[0]["prompt_token_ids"][1:]]
    _, result = run(tmp_path, "vllm", records, tokenizer=folder, policy=POLICY)
    assert result["rejected"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# What is found wrong


def break_record(record: dict, path: str, value: Any) -> dict:
    """The record with one value changed; `path` such as "outputs.0.logprobs.2". A callable gets what stands there."""
    record = json.loads(json.dumps(record))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    at = record
    for key in parents:
        at = at[key]
    at[last] = value(at[last]) if callable(value) else value
    return record


def with_first_logprob(value):
    return lambda entry: {k: v | {"logprob": value} for k, v in entry.items()}


@pytest.mark.parametrize(
    "path, value, reason",
    [
        ("outputs.0.logprobs", lambda x: x[:-1], "log-probs for"),
        ("outputs.0.logprobs", None, r"SamplingParams\(logprobs=1\)"),
        ("outputs.0.logprobs.1", {"3": {"logprob": -1.0}}, "no log-prob of token"),
        ("outputs.0.logprobs.1", with_first_logprob(math.nan), "log-prob of token 1 is nan"),
        ("outputs.0.logprobs.1", with_first_logprob(-math.inf), "log-prob of token 1 is -inf"),
        ("outputs.0.logprobs.1", with_first_logprob(0.5), "above 0"),
        ("outputs.0.logprobs.1", with_first_logprob(None), "no log-prob of token 1"),
        ("outputs.0.logprobs.1", with_first_logprob("-1"), "no log-prob of token 1"),
        ("outputs.0.logprobs.1", with_first_logprob(-9999.0), "a floor"),
        ("outputs.0.cumulative_logprob", lambda x: x + 1, "add up to"),
        ("outputs.0.text", "It is 8.", "do not add up to the text"),
        ("outputs.0.token_ids", lambda x: [*x[:-1], 10**6], "no log-prob of token 1000000"),
        ("outputs.0.token_ids.0", -1, "token ids"),
        ("outputs", None, "no `outputs`"),
        ("outputs", [], "no responses"),
        ("prompt_token_ids", ["a"], "token ids"),
    ],
)
def test_bad_records_are_set_aside_with_the_reason(path, value, reason, told, folder, tmp_path):
    good, bad = vllm_record(told[0]), break_record(vllm_record(told[0], note="mine"), path, value)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, bad, good)))  # NaN too
    out = tmp_path / "scored.jsonl"
    kwargs = dict(tokenizer=folder, policy=POLICY, progress=False)
    result = import_logprobs("vllm", tmp_path / "records.jsonl", out, **kwargs)
    assert (result["written"], result["rejected"]) == (2, 1)
    text = (tmp_path / "scored.jsonl.rejects.jsonl").read_text()
    reject = json.loads(text)
    assert reject["line"] == 2 and reject["row"]["note"] == "mine"
    assert re.search(reason, reject["reason"]), reject["reason"]
    with pytest.raises(DataError, match=r"records.jsonl:2: .*" + reason):
        import_logprobs("vllm", tmp_path / "records.jsonl", tmp_path / "strict.jsonl", strict=True, **kwargs)
    assert not (tmp_path / "strict.jsonl").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    """Every place in a record."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in items for path in paths(item, (*here, key)))]


@settings(max_examples=200)
@given(data=st.data())
def test_whatever_stands_in_a_record_it_is_read_or_set_aside(data, teacher, tokenizer):
    """Any place of a record may hold anything: nothing but a reason comes of it, and no row that is not whole."""
    t = tell(teacher, tokenizer, ROWS[data.draw(st.sampled_from([0, 2]))])
    source, record = data.draw(
        st.sampled_from([
            ("vllm", vllm_record(t)), ("sglang", sglang_record(t)), ("jsonl", {
                "prompt": t.prompt, "completion": t.text, "logprobs": t.logprobs, "tokens": t.tokens,
            }), ("openai", text_record(t, ids=True) if isinstance(t.prompt, str) else chat_record(t, ids=True)),
        ])
    )  # fmt: skip
    record = json.loads(json.dumps(record))
    place = data.draw(st.sampled_from(paths(record)[1:]))
    at = record
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = data.draw(JSON)
    readers = {"jsonl": columns.reader(tokens="tokens"), "vllm": vllm.generations, "sglang": sglang.generations}
    converter = Converter(tokenizer if data.draw(st.booleans()) else None, policy=POLICY)
    for item in _read(readers.get(source, openai.generations), record, converter, "record"):
        if isinstance(item, Reject):
            assert str(item)
            continue
        row, counts = item
        report(counts, {})
        row = json.loads(json.dumps(row, allow_nan=False))
        if "input_ids" in row:
            check_scored_row(row, "row")
        assert row["behavior_policy"] and isinstance(row["behavior_policy"], str)
        if "problem" not in row["behavior_spans"]:
            spans = Spans.from_json(row["behavior_spans"], "row")
            count = len(row["behavior_spans"].get("logprobs", [])) or sum(row["completion_mask"])
            assert len(spans.extents) == count


def test_what_json_cannot_hold_is_set_aside(jsonl, tmp_path):
    good = {"prompt": "x", "completion": "ab", "logprobs": [-1.0], "tokens": ["ab"]}
    rows = [
        good,
        good | {"mine": math.nan},
        good | {"prompt": "\ud800"},
        good | {"completion": "\udc00", "tokens": ["?"]},
        good | {"behavior_policy": "\ud800"},
    ]
    out = tmp_path / "out.jsonl"
    settings = dict(policy="p", columns_named={"tokens": "tokens"}, progress=False)
    result = import_logprobs("jsonl", jsonl(rows), out, **settings)
    assert (result["written"], result["rejected"]) == (1, 4)
    rejects = [row for _, row in read_jsonl(tmp_path / "out.jsonl.rejects.jsonl")]
    assert all("cannot be written as JSON" in row["reason"] for row in rejects)
    assert rejects[0]["row"]["mine"] == "nan" and rejects[1]["row"]["prompt"] == "\\ud800"


def test_rejects_of_an_earlier_run_go_when_there_are_none(told, folder, tmp_path):
    records = [vllm_record(t) for t in told]
    broken = [break_record(records[0], "outputs.0.text", "other"), *records[1:]]
    _, result = run(tmp_path, "vllm", broken, tokenizer=folder, policy=POLICY)
    assert result["rejected"] == 1 and (tmp_path / "scored.jsonl.rejects.jsonl").exists()
    _, result = run(tmp_path, "vllm", records, tokenizer=folder, policy=POLICY)
    assert result["rejected"] == 0 and not (tmp_path / "scored.jsonl.rejects.jsonl").exists()


def test_another_tokenizer_than_the_policys_is_noticed(told, tmp_path):
    other = make_tokenizer(["zebra zebra zebra quilt quilt"], vocab_size=380)
    other.save_pretrained(tmp_path / "other")
    rows, result = run(
        tmp_path, "vllm", [vllm_record(t) for t in told], tokenizer=str(tmp_path / "other"), policy=POLICY
    )
    assert not rows and result["rejected"] == len(told)
    assert "--tokenizer" in (tmp_path / "scored.jsonl.rejects.jsonl").read_text()


@pytest.mark.parametrize("number", range(4))
def test_the_prompts_ids_are_those_of_the_prompt(number, told, tokenizer, folder, tmp_path):
    """By another tokenizer the answer may be spelled alike, byte by byte say, and the prompt is not what it saw."""
    t = told[number]
    other = tokenizer("Another question, of other words.")["input_ids"]
    front = tokenizer("<|im_start|>system\nToday is Monday.<|im_end|>\n")["input_ids"]
    chat = isinstance(t.prompt, list)
    kept = {"as it is": t.prompt_ids, "start token": [tokenizer.eos_token_id, *t.prompt_ids]}
    kept |= {"template": front + t.prompt_ids} if chat else {"cut at its beginning": t.prompt_ids[1:]}
    for name, ids in (kept | {"other": other, "end missing": t.prompt_ids[:2], "nothing": []}).items():
        rows, result = run(tmp_path, "vllm", [vllm_record(t) | {"prompt_token_ids": ids}], tokenizer=folder, policy="p")
        assert len(rows) == (name in kept), name
        if rows:
            assert rows[0]["input_ids"] == ids + t.ids
        else:
            reason = (tmp_path / "scored.jsonl.rejects.jsonl").read_text()
            assert "do not spell the prompt" in reason


def test_tokens_as_sampled_stay_where_the_tokenizer_would_cut_otherwise(teacher, tokenizer, told, folder, tmp_path):
    t = told[0]
    first = t.pieces[0]
    assert len(first) == 3  # " It", as bytes
    alphabet = _byte_alphabet()
    letters = [tokenizer.convert_tokens_to_ids(alphabet[byte]) for byte in first]
    t.ids = letters + t.ids[1:]
    t.logprobs = [-1.0] * len(t.ids)
    t.pieces = [bytes([byte]) for byte in first] + t.pieces[1:]
    rows, result = run(tmp_path, "vllm", [vllm_record(t)], tokenizer=folder, policy=POLICY)
    assert rows[0]["input_ids"] == t.prompt_ids + t.ids
    assert rows[0]["behavior_spans"]["bytes"][:3] == [[0, 1], [1, 2], [2, 3]]
    assert next(e for e in result["checks"] if e["check"] == "completion re-encodes to the ids")["no"] == 1
    assert any("would have cut otherwise" in warning for warning in result["warnings"])


def test_special_tokens_that_the_text_leaves_out_are_marks(told, tokenizer, folder, tmp_path):
    """As servers do by themselves (skip_special_tokens), wherever the policy wrote them."""
    t = told[0]
    start, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|pad|>"])
    t.ids = [t.ids[0], start, *t.ids[1:3], pad, *t.ids[3:]]
    t.logprobs = [-1.0 - k for k in range(len(t.ids))]
    t.pieces = [b""] * len(t.ids)
    rows, result = run(tmp_path, "vllm", [vllm_record(t)], tokenizer=folder, policy=POLICY)
    spans = rows[0]["behavior_spans"]
    assert rows[0]["input_ids"] == t.prompt_ids + t.ids and rows[0]["completion"] == t.text
    assert spans["marks"] == {"1": "start_of_turn", "4": "<|pad|>", str(len(t.ids) - 1): "end_of_turn"}
    covered = [extent for extent in spans["bytes"] if extent[0] < extent[1]]
    assert covered[0][0] == 0 and covered[-1][1] == len(t.text)
    assert all(before[1] == after[0] for before, after in zip(covered, covered[1:], strict=False))
    assert next(e for e in result["checks"] if e["check"] == "completion re-encodes to the ids")["no"] == 1


def test_a_stop_string_leaves_tokens_behind_the_text(told, folder, tmp_path):
    t = told[0]
    text = t.pieces[0].decode()  # up to the end of its first token
    record = break_record(vllm_record(t), "outputs.0.text", text)
    with_stop = break_record(record, "outputs.0.stop_reason", t.pieces[1].decode())
    rows, result = run(tmp_path, "vllm", [with_stop], tokenizer=folder, policy=POLICY)
    assert rows[0]["input_ids"] == t.prompt_ids + t.ids[:1] and rows[0]["completion"] == text
    assert result["tokens_behind_a_stop_string"] == len(t.ids) - 1
    inside = break_record(with_stop, "outputs.0.text", text[:1])
    assert len(text) > 1
    rows, result = run(tmp_path, "vllm", [record, inside], tokenizer=folder, policy=POLICY)
    assert not rows and result["rejected"] == 2  # no stop string, so nothing explains them; and within a token


def test_cut_at_max_tokens_there_is_no_end_of_turn(teacher, tokenizer, folder, tmp_path):
    told = [tell(teacher, tokenizer, row, end=False) for row in ROWS]
    records = [break_record(vllm_record(t), "outputs.0.finish_reason", "length") for t in told]
    rows, result = run(tmp_path, "vllm", records, tokenizer=folder, policy=POLICY)
    assert [row["input_ids"] for row in rows] == [t.prompt_ids + t.ids for t in told]
    assert result["cut_at_their_length"] == len(told) and result["special_tokens"] == {}
    assert next(e for e in result["checks"] if e["check"] == "completion re-encodes to the ids")["yes"] == len(told)
    assert all(row["behavior_spans"]["cut"] is True for row in rows)
    _, result = run(tmp_path, "vllm", [vllm_record(t) for t in told], tokenizer=folder, policy=POLICY)
    assert result["cut_at_their_length"] == 0
    told = [t for t in told if isinstance(t.prompt, list)]
    records = [break_record(chat_record(t), "response.choices.0.finish_reason", "length") for t in told]
    for row, t in zip(run(tmp_path, "openai", records)[0], told, strict=True):
        assert row["behavior_spans"]["cut"] is True
        write_scored(tmp_path / "one.jsonl", [row])
        tokens = load_scored(tmp_path / "one.jsonl", tokenizer)[0]
        assert tokens["input_ids"] == t.prompt_ids + t.ids  # as the token rows: no end of turn that nobody wrote
        values = [p for p, bit in zip(tokens["behavior_logprobs"], tokens["completion_mask"], strict=True) if bit]
        np.testing.assert_allclose(values, t.logprobs, rtol=1e-6)


@pytest.mark.parametrize("tokenized", [True, False])
def test_an_end_of_turn_that_was_drawn_stays(tokenized, told, folder, tmp_path):
    """Also where the request had stop strings that it did not meet, or the end was the last token that it had."""
    t = told[2]
    record = chat_record(t, ids=tokenized)
    record["request"]["stop"] = ["Question:"]
    choice = record["response"]["choices"][0]
    told_so = {"stop_reason": None}, {"matched_stop": t.ids[-1]}, {}, {"finish_reason": "length"}
    records = [record | {"response": record["response"] | {"choices": [choice | more]}} for more in told_so]
    rows, result = run(tmp_path, "openai", records, tokenizer=folder if tokenized else None)
    assert len(rows) == len(records) and result["tokens_behind_a_stop_string"] == 0
    for row in rows:
        spans = row["behavior_spans"]
        assert len(spans["bytes"]) == len(t.ids) and spans["marks"] == {str(len(t.ids) - 1): "end_of_turn"}
        assert "cut" not in spans


def test_imported_tokens_are_scored_as_they_were_drawn(teacher, tokenizer, folder, tmp_path):
    """For ref_logprobs or the top-k beside them: cut off, or without the line end that a template puts behind."""
    told = [tell(teacher, tokenizer, row, end=end) for row in ROWS for end in (True, False)]
    rows, _ = run(tmp_path, "vllm", [vllm_record(t) for t in told], tokenizer=folder, policy=POLICY)
    out, source = tmp_path / "more.jsonl", tmp_path / "scored.jsonl"
    score(folder, source, out, column="ref_logprobs", progress=False)
    score(folder, out, out, column="none", top_k=3, progress=False)
    for (_, row), own in zip(read_jsonl(out), rows, strict=True):
        assert {key: row[key] for key in own if key != "scored"} == {key: own[key] for key in own if key != "scored"}
        np.testing.assert_allclose(row["ref_logprobs"], own["behavior_logprobs"], atol=2e-5)
        assert [len(ids) for ids in row["top_k_ids"]] == [3 * bit for bit in row["completion_mask"]]
    load_scored(out, tokenizer, columns=("ref_logprobs", "top_k_ids", "top_k_logprobs"))
    edited = [{key: value for key, value in row.items() if key != "scored"} for row in rows]
    write_jsonl(source, edited)
    with pytest.raises(DataError, match="no more tokens"):  # nothing says that these are the tokens of the text
        score(folder, source, out, column="ref_logprobs", progress=False)


def test_columns_of_other_tokens_do_not_stay(told, scored, folder, tmp_path):
    """A row that was scored before and is imported now, in as many tokens: its references are of the old ones."""
    own, t = scored[0], told[0]
    before = own | {"ref_logprobs": own["behavior_logprobs"], "ref_model": "r", "top_k_model": "k", "label": False}
    record = before | {"logprobs": t.logprobs, "ids": t.ids}
    names = {"ids": "ids"}
    rows, _ = run(tmp_path, "jsonl", [record], tokenizer=folder, policy=POLICY, columns_named=names)
    assert rows[0]["ref_logprobs"] == own["behavior_logprobs"] and rows[0]["input_ids"] == own["input_ids"]
    others = record | {"input_ids": [*reversed(own["input_ids"])]}
    rows, _ = run(tmp_path, "jsonl", [others], tokenizer=folder, policy=POLICY, columns_named=names)
    assert rows[0]["input_ids"] == own["input_ids"] and rows[0]["label"] is False
    assert not {"ref_logprobs", "ref_model", "top_k_model"} & set(rows[0])
    in_bytes = record | {"tokens": [list(piece) for piece in t.pieces]}
    rows, _ = run(tmp_path, "jsonl", [in_bytes], policy=POLICY, columns_named={"tokens": "tokens"})
    assert not {"ref_logprobs", "ref_model", "top_k_model", "input_ids"} & set(rows[0])


def test_reasoning_apart_from_content(tmp_path):
    """vLLM's reasoning parser: the tokens hold the tags and line ends between the two, the message does not."""
    tokens = ["<think>", "\n", "3+4", " is 7", "\n", "</think>", "\n\n", "It is", " 7.", "<|im_end|>"]
    content = [{"token": s, "logprob": -float(k + 1), "bytes": list(s.encode())} for k, s in enumerate(tokens)]
    message = {"role": "assistant", "reasoning_content": "3+4 is 7", "content": "It is 7."}
    choice = {"message": message, "logprobs": {"content": content}, "finish_reason": "stop"}
    messages = [{"role": "user", "content": "3+4?"}]
    rows, _ = run(tmp_path, "openai", [{"messages": messages, "response": {"model": "m", "choices": [choice]}}])
    spans = rows[0]["behavior_spans"]
    assert spans["bytes"] == [[0, 0], [0, 0], [0, 3], [3, 8], [8, 8], [8, 8], [8, 8], [8, 13], [13, 16], [16, 16]]
    assert (spans["marks"]["0"], spans["marks"]["5"], spans["marks"]["9"]) == (
        "think_open",
        "think_close",
        "end_of_turn",
    )
    assert rows[0]["completion"][0]["reasoning_content"] == "3+4 is 7"


def test_sentencepiece_says_a_space_that_the_text_does_not(tmp_path):
    record = {"prompt": "x", "completion": "Hello there", "logprobs": [-1.0, -2.0], "tokens": [" Hello", " there"]}
    rows, _ = run(tmp_path, "jsonl", [record], policy="llama", columns_named={"tokens": "tokens"})
    assert rows[0]["behavior_spans"]["bytes"] == [[0, 5], [5, 11]] and rows[0]["behavior_spans"]["marks"] == {}


def test_several_choices_and_those_that_are_bad(told, tmp_path):
    t = told[2]
    record = chat_record(t, label=False)
    choices = record["response"]["choices"]
    bad = break_record(choices[0], "message.content", "something else")
    tool = break_record(choices[0], "message.tool_calls", [{"id": 1}]) if "tool_calls" in choices[0]["message"] else {
        **choices[0], "message": {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}}  # fmt: skip
    record["response"]["choices"] = [choices[0], bad, choices[0], tool]
    rows, result = run(tmp_path, "openai", [record])
    assert len(rows) == 2 and all(row["label"] is False for row in rows)
    rejects = [row for _, row in read_jsonl(tmp_path / "scored.jsonl.rejects.jsonl")]
    assert [reject["choice"] for reject in rejects] == [1, 3]
    assert "calls a tool" in rejects[1]["reason"]


def test_echo_and_batch_files(told, tmp_path):
    t = told[0]
    rows, _ = run(tmp_path, "openai", [text_record(t, echo=True)])
    assert rows[0]["completion"] == t.text and rows[0]["behavior_spans"]["logprobs"] == t.logprobs
    record = text_record(t)
    batch = {"custom_id": "7", "request": {"body": record["request"]},
             "response": {"status_code": 200, "body": record["response"]}}  # fmt: skip
    rows, _ = run(tmp_path, "openai", [batch])
    assert rows[0]["prompt"] == t.prompt and "custom_id" not in rows[0]


def test_token_ids_written_as_tokens(told, folder, tokenizer, tmp_path):
    t = told[0]
    record = text_record(t)
    record["response"]["choices"][0]["logprobs"]["tokens"] = [f"token_id:{i}" for i in t.ids]
    rows, _ = run(tmp_path, "openai", [record], tokenizer=folder)
    assert rows[0]["input_ids"] == t.prompt_ids + t.ids
    _, result = run(tmp_path, "openai", [record])
    assert result["rejected"] == 1 and "--tokenizer" in (tmp_path / "scored.jsonl.rejects.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Sampling, rounding, names


def test_sampling_is_noted_and_what_it_biases(told, tmp_path):
    text = [t for t in told if isinstance(t.prompt, str)]
    rows, result = run(tmp_path, "openai", [text_record(t) for t in text])
    assert all(row["behavior_sampling"] == SAMPLING for row in rows)
    (warning,) = [w for w in result["warnings"] if "temperature 0.7" in w]
    assert "--logprobs_of" in warning and "no weight brings those back" in warning
    rows, result = run(tmp_path, "openai", [text_record(t) for t in text], logprobs_of="processed")
    assert rows[0]["behavior_sampling"]["logprobs"] == "processed"
    (warning,) = [w for w in result["warnings"] if "temperature 0.7" in w]
    assert "--logprobs_of" not in warning and "temperature 1" not in warning and "no weight" in warning

    plain = [{"prompt": t.prompt, "completion": t.text, "logprobs": t.logprobs, "tokens": t.tokens} for t in text]
    columns = {"tokens": "tokens"}
    rows, result = run(tmp_path, "jsonl", plain, policy=POLICY, columns_named=columns)
    assert "behavior_sampling" not in rows[0] and any("does not tell how" in w for w in result["warnings"])
    settings = {"temperature": 1.0, "top_p": 1.0}
    rows, result = run(tmp_path, "jsonl", plain, policy=POLICY, columns_named=columns, settings=settings)
    assert rows[0]["behavior_sampling"] == settings and not result["warnings"]


@pytest.mark.parametrize(
    "rounded, word", [("bfloat16", "bfloat16"), ("decimals", "three decimals"), ("floor", "floor")]
)
def test_rounded_and_floored_log_probs_are_noted(rounded, word, tmp_path):
    values = -np.random.default_rng(0).exponential(2.0, size=300)
    if rounded == "bfloat16":
        values = torch.tensor(values).bfloat16().double().numpy()
    elif rounded == "decimals":
        values = np.round(values, 3)
    else:
        values = np.maximum(values, -6.0)
    record = {"prompt": "x", "completion": "a" * 300, "tokens": ["a"] * 300, "logprobs": values.tolist()}
    settings = {"temperature": 1.0}
    _, result = run(tmp_path, "jsonl", [record], policy="p", columns_named={"tokens": "tokens"}, settings=settings)
    assert len(result["warnings"]) == 1 and word in result["warnings"][0]
    record["logprobs"] = (-np.random.default_rng(0).exponential(2.0, size=300)).tolist()
    _, result = run(tmp_path, "jsonl", [record], policy="p", columns_named={"tokens": "tokens"}, settings=settings)
    assert not result["warnings"]


def test_a_floor_is_no_log_prob_and_has_no_ratio(told, tokenizer, tmp_path):
    """OpenAI's -9999 for "not among the most likely": the row stays, and no span reaches over that token."""
    t = told[2]
    chosen = next(k for k, piece in enumerate(t.pieces) if k > 0 and piece.isascii() and piece.isalnum() is False)
    honest, _ = run(tmp_path, "openai", [chat_record(t)])
    record = break_record(chat_record(t), f"response.choices.0.logprobs.content.{chosen}.logprob", -9999.0)
    rows, result = run(tmp_path, "openai", [record])
    assert f"1 of {len(t.ids)} log-probs are -9999" in " ".join(result["warnings"])
    told_values = [p for k, p in enumerate(t.logprobs) if k != chosen]
    assert result["mean_logprob"] == pytest.approx(sum(told_values) / len(told_values))
    found = []
    for row in (honest[0], rows[0]):
        student = spans_of(row, tokenize_row(row, tokenizer, "row"), tokenizer)
        behavior = Spans.from_json(row["behavior_spans"], "row")
        found.append(align(student, behavior, row["behavior_spans"]["logprobs"]))
    whole, without = found
    assert without.block_ids[chosen] == -1 and without.behavior_logprobs[chosen] == 0.0
    others = [k for k in range(len(t.ids)) if k != chosen]
    np.testing.assert_array_equal(without.behavior_logprobs[others], whole.behavior_logprobs[others])
    assert (without.block_ids[others] >= 0).all()


@pytest.mark.parametrize("place", ["end of turn", "without text", "llama.cpp's end"])
def test_a_floor_of_a_token_that_is_no_text_has_no_ratio_either(place, told, tokenizer, tmp_path):
    """By its role it would be matched with the student's own; without bytes it would go with the next token."""
    t = told[2]
    record = chat_record(t)
    content = record["response"]["choices"][0]["logprobs"]["content"]
    floor = {"token": "", "logprob": -9999.0, "bytes": []}
    if place == "without text":
        content.insert(1, floor)
    else:
        content[-1] = content[-1] | {"logprob": -9999.0} if place == "end of turn" else floor
    rows, result = run(tmp_path, "openai", [record])
    assert any(" log-probs are -9999" in warning for warning in result["warnings"])
    student = spans_of(rows[0], tokenize_row(rows[0], tokenizer, "row"), tokenizer)
    spans = rows[0]["behavior_spans"]
    found = align(student, Spans.from_json(spans, "row"), spans["logprobs"])
    expected = t.logprobs if place == "without text" else [*t.logprobs[:-1], 0.0]
    np.testing.assert_array_equal(found.behavior_logprobs[: len(t.ids)], expected)
    assert (found.block_ids[len(t.ids) - 1] >= 0) == (place == "without text")


def test_pieces_of_a_character_as_openais_completions_spell_them(tmp_path):
    logprobs = {"tokens": [" bytes:", "bytes:\\xe4\\xbd", "bytes:\\xa0"], "token_logprobs": [-1.0, -2.0, -3.0]}
    choice = {"text": " bytes:你", "logprobs": logprobs, "finish_reason": "length"}
    rows, _ = run(tmp_path, "openai", [{"prompt": "x", "response": {"model": "m", "choices": [choice]}}])
    assert rows[0]["behavior_spans"]["bytes"] == [[0, 7], [7, 9], [9, 10]]


def test_each_row_names_its_policy(told, tmp_path):
    text = [t for t in told if isinstance(t.prompt, str)]
    rows, result = run(tmp_path, "openai", [text_record(text[0]), {**text_record(text[1]), "behavior_policy": "other"}])
    assert [row["behavior_policy"] for row in rows] == [POLICY, "other"]
    assert result["policies"] == {POLICY: 1, "other": 1}
    record = {"prompt": "x", "completion": "ab", "logprobs": [-1.0], "tokens": ["ab"]}
    with pytest.raises(DataError, match="--policy NAME"):
        run(tmp_path, "jsonl", [record], columns_named={"tokens": "tokens"})


def test_a_prompt_that_the_server_templated_otherwise_is_counted(told, folder, tmp_path):
    t = told[2]
    record = break_record(chat_record(t, ids=True), "response.usage.prompt_tokens", lambda n: n + 9)
    rows, result = run(tmp_path, "openai", [record], tokenizer=folder)
    assert len(rows) == 1
    assert any("another number of prompt tokens" in warning for warning in result["warnings"])


def test_an_empty_prompt_predicts_nothing_of_the_first_token(teacher, tokenizer, folder, tmp_path):
    t = Told("", "It is 7.", [], tokenizer("It is 7.")["input_ids"], [])
    t.logprobs, t.pieces = [-1.0 - k for k in range(len(t.ids))], [b""] * len(t.ids)
    rows, _ = run(tmp_path, "vllm", [break_record(vllm_record(t), "prompt", "")], tokenizer=folder, policy=POLICY)
    (row,) = rows
    assert row["completion_mask"] == [0] + [1] * (len(t.ids) - 1)
    assert row["behavior_logprobs"] == [0.0, *t.logprobs[1:]]
    assert len(row["behavior_spans"]["bytes"]) == len(t.ids) - 1 and row["behavior_spans"]["bytes"][0][0] > 0
    record = text_record(t, ids=True)
    del record["response"]["choices"][0]["prompt_token_ids"]  # nor does the source tell that there are none
    record["request"]["prompt"] = ""
    rows, result = run(tmp_path, "openai", [{**record, "prompt": ""}], tokenizer=folder)
    assert [r["input_ids"] for r in rows] == [row["input_ids"]]


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command_says_what_it_did_and_its_status_tells_of_rejects(told, folder, tmp_path):
    records = [vllm_record(t) for t in told]
    write_jsonl(tmp_path / "good.jsonl", records)
    write_jsonl(tmp_path / "bad.jsonl", [*records, break_record(records[0], "outputs.0.text", "other")])
    out = str(tmp_path / "scored.jsonl")
    common = ["import", "--source", "vllm", "--out", out, "--tokenizer", folder, "--policy", POLICY]
    runner = CliRunner()
    result = runner.invoke(app, [*common, "--data", str(tmp_path / "good.jsonl"), "--temperature", "0.5"])
    assert result.exit_code == 0, result.output
    assert "4 rows of 4 records: 4 token rows" in result.output and "temperature 0.5" in result.output
    result = runner.invoke(app, [*common, "--data", str(tmp_path / "bad.jsonl")])
    assert result.exit_code == 3
    assert f"1 set aside with their reasons in {out}.rejects.jsonl" in result.output
    result = runner.invoke(app, [*common, "--data", str(tmp_path / "bad.jsonl"), "--strict"])
    assert result.exit_code == 1 and "bad.jsonl:5: " in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--source", "ollama"], "--source must be one of"),
        (["--source", "vllm", "--prompt_column", "q"], "--source jsonl"),
        (["--source", "vllm", "--seed", "1"], "give its --url"),
        (["--source", "vllm", "--n", "2"], "give its --url"),
        (["--source", "vllm", "--logprobs_of", "cooked"], "--logprobs_of must be one of"),
        (["--source", "vllm", "--url", "http://127.0.0.1:9/v1"], "--source openai"),
        (["--source", "openai", "--url", "127.0.0.1:9"], "http://host:port/v1"),
        (["--source", "openai", "--url", "http://me:pw@127.0.0.1:9/v1"], "no user, password"),
        (["--source", "openai", "--url", "http://127.0.0.1:9/v1", "--extra_body", "{"], "JSON object"),
        (["--source", "openai", "--url", "http://127.0.0.1:9/v1", "--jobs", "0"], "--jobs"),
        (["--source", "openai", "--url", "http://127.0.0.1:9/v1", "--timeout", "0"], "--timeout"),
        (["--source", "openai", "--url", "http://127.0.0.1:9/v1", "--retries", "-1"], "--retries"),
        (["--source", "openai", "--url", "http://127.0.0.1:9/v1", "--api_key_env", "PEAR_NOT_SET"], "PEAR_NOT_SET"),
    ],
)
def test_settings_that_do_not_go_together(arguments, message, jsonl, tmp_path):
    data = jsonl([{"prompt": "x"}])
    out = tmp_path / "out.jsonl"
    result = CliRunner().invoke(app, ["import", "--data", str(data), "--out", str(out), *arguments])
    assert result.exit_code == 1 and message in result.stderr, result.stderr
    assert "pw" not in result.stderr.replace("http", "") or "password" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl"]


def test_the_data_is_not_overwritten_and_not_empty(jsonl, tmp_path):
    data = jsonl([{"prompt": "x"}])
    with pytest.raises(DataError, match="out is the data itself"):
        import_logprobs("jsonl", data, data, progress=False)
    with pytest.raises(DataError, match="no rows"):
        import_logprobs("jsonl", jsonl([], "empty.jsonl"), tmp_path / "out.jsonl", progress=False)
    with pytest.raises(DataError, match=r"broken.jsonl:2: not JSON"):
        import_logprobs("jsonl", jsonl([{"prompt": "x"}, "{"], "broken.jsonl"), tmp_path / "out.jsonl", progress=False)
