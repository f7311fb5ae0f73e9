"""`pear import` against a server that fails in every way it can: rows are whole, or set aside with the reason."""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_faulty import FAULTS, answer, serving
from typer.testing import CliRunner

import pear.importing.run as run_module
from pear.cli import app
from pear.importing import import_logprobs
from pear.importing.client import Client, Failed, ServerError, read_key
from pear.importing.generation import Reject
from pear.importing.journal import Journal
from pear.io import DataError, WriteError, read_jsonl, write_jsonl
from pear.seal import check_seal

KEY = "sk-test-0123456789-/+abc"
ROWS = [
    {"prompt": f"What is {i}? "}
    if i % 2
    else {"messages": [{"role": "user", "content": f"Say {i}"}], "label": i % 3 == 0}
    for i in range(12)
]


def ask(url: str, tmp_path, rows=ROWS, name: str = "out.jsonl", **kwargs) -> dict:
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        write_jsonl(data, rows)
    quick = {"timeout": 20.0, "retries": 3, "delay": 0.01}
    client = Client(url, kwargs.pop("key", None), **quick | kwargs.pop("client", {}))
    asked = {"request": {"temperature": 1.0, "max_tokens": 8, "seed": 1, "top_p": 1.0}, "jobs": 4} | kwargs
    return import_logprobs("openai", data, tmp_path / name, client=client, progress=False, **asked)


def read_rows(path) -> list[dict]:
    rows = []
    for number, row in read_jsonl(path):
        check_seal(row, f"{path}:{number}")
        rows.append(row)
    return rows


def unsealed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "scored"} for row in rows]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> list[dict]:
    """What a server without faults gives."""
    folder = tmp_path_factory.mktemp("wanted")
    with serving() as server:
        result = ask(server.url, folder, n=2)
    assert (result["written"], result["rejected"], result["partial"]) == (24, 0, None)
    return read_rows(folder / "out.jsonl")


def test_answers_become_rows_in_order(wanted):
    assert len(wanted) == 24
    for i, row in enumerate(wanted):
        source = ROWS[i // 2]
        assert row["prompt"] == source.get("prompt", source.get("messages"))
        assert row.get("label") == source.get("label")
        assert row["behavior_policy"] == "tiny"
        assert row["behavior_sampling"] == {"temperature": 1.0, "top_p": 1.0}
        text = row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]
        spans = row["behavior_spans"]
        assert spans["bytes"][0][0] == 0 and spans["bytes"][-1][1] == len(text.encode())
        assert len(spans["logprobs"]) == len(spans["bytes"])
    assert wanted[0]["completion"] != wanted[1]["completion"]  # n = 2: two answers


def test_what_is_asked_for(tmp_path):
    with serving(kind="vllm") as server:
        ask(
            server.url,
            tmp_path,
            rows=[*ROWS[:2], {**ROWS[1]}],
            key=KEY,
            extra_body={"stop": ["END"], "top_k": 5, "top_p": None},
        )
    bodies = sorted(server.bodies, key=lambda body: (("messages" not in body), body["seed"]))
    chat, first, again = bodies
    assert chat["logprobs"] is True and "prompt" not in chat and chat["messages"] == ROWS[0]["messages"]
    assert first["logprobs"] == 1 and first["prompt"] == again["prompt"] == ROWS[1]["prompt"]
    assert [body["seed"] for body in (chat, first, again)] == [2, 3, 4]  # of its line: the same prompt, other samples
    for body in bodies:
        assert (body["temperature"], body["max_tokens"], body["n"], body["stop"]) == (1.0, 8, 1, ["END"])
        assert body["return_token_ids"] and body["min_p"] == 0.0  # vLLM's own fields; the user's top_k wins
        assert body["top_k"] == 5 and "top_p" not in body
    assert set(server.authorizations) == {f"Bearer {KEY}"}


# ---------------------------------------------------------------------------------------------------------------------
# Faults that pass, faults that stay

SLOW = ("hang", "drip")


def patience(fault: str) -> dict:
    """No longer than a test should take; long enough for an answer on a busy machine."""
    return {"timeout": 1.0} if fault in SLOW else {}


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("other text", "positive")])
def test_a_fault_that_passes_leaves_no_trace(fault, wanted, tmp_path):
    with serving(lambda body, number: fault if number == 0 and "Say" in json.dumps(body) else None) as server:
        result = ask(server.url, tmp_path, n=2, client=patience(fault))
    assert result["rejected"] == 0
    assert read_rows(tmp_path / "out.jsonl") == wanted
    if fault not in SLOW:
        assert max(server.asked.values()) == 2  # asked once more, and no more than that
    assert not (tmp_path / "out.jsonl.rejects.jsonl").exists() and not list(tmp_path.glob("*.partial"))


REASONS = {
    "500": "answered 500 (overloaded)", "503": "answered 503", "429": "answered 429 (slow down)",
    "429 later": "answered 429", "reset": "connection broke", "hang": "no whole answer within 1 s",
    "drip": "no whole answer within 1 s", "cut": "cut off after", "html": "no JSON", "list": "no JSON object",
    "empty": "no `choices`", "few": "fewer log-probs than tokens", "nan": "is nan", "null": "no log-prob of token",
    "no choices": "no choices", "fewer choices": "no choices", "no logprobs": "no log-probs",
    "other text": "do not add up", "positive": "above 0",
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_sets_the_row_aside_with_its_reason(fault, tmp_path):
    """And the same command tries these rows again, and these alone."""
    bad = {"messages": ROWS[4]["messages"]}

    def at_row_4(body, number):
        return fault if body.get("messages") == bad["messages"] else None

    one_by_one = {"jobs": 1, "client": {"retries": 1} | patience(fault)}  # so that others were answered before it
    with serving(at_row_4) as server:
        result = ask(server.url, tmp_path, **one_by_one)
        assert (result["written"], result["rejected"]) == (11, 1)
        (reject,) = [row for _, row in read_jsonl(tmp_path / "out.jsonl.rejects.jsonl")]
        assert reject["line"] == 5 and reject["row"] == ROWS[4]
        assert REASONS[fault] in reject["reason"]
        rows = read_rows(tmp_path / "out.jsonl")
        assert [row["prompt"] for row in rows] == [
            row.get("prompt", row.get("messages")) for i, row in enumerate(ROWS) if i != 4
        ]

        server.fault = lambda body, number: None
        before = len(server.bodies)
        result = ask(server.url, tmp_path, **one_by_one)
        assert len(server.bodies) == before + 1 and result["resumed"] == 11
    assert (result["written"], result["rejected"]) == (12, 0)
    assert len(read_rows(tmp_path / "out.jsonl")) == 12
    assert not (tmp_path / "out.jsonl.rejects.jsonl").exists() and not list(tmp_path.glob("*.partial"))


@settings(max_examples=12, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), share=st.sampled_from([0.1, 0.4, 0.8]), jobs=st.integers(1, 6))
def test_any_schedule_of_faults(seed, share, jobs, wanted, tmp_path_factory):
    """Whatever fails: runs until nothing is set aside write what a server without faults would have given."""
    folder = tmp_path_factory.mktemp("faults")
    rng, lock = random.Random(seed), threading.Lock()
    faults = [fault for fault in FAULTS if fault not in ("hang", "drip")]  # those take their time, and have tests above

    def fault(body, number):
        with lock:
            return rng.choice(faults) if rng.random() < share else None

    with serving(fault) as server:
        for attempt in range(6):
            if attempt == 5:
                server.fault = lambda body, number: None
            try:
                result = ask(server.url, folder, n=2, jobs=jobs, client={"retries": 1, "delay": 0.001})
            except DataError as error:
                assert "no log-probs in the answer" in str(error)  # of the first answers of all, each time
                continue
            if result["out"]:
                rows = unsealed(read_rows(folder / "out.jsonl"))
                left = iter(unsealed(wanted))
                assert all(row in left for row in rows)  # no row lost its place, none twice
                assert len(rows) == result["written"]
            if not result["rejected"]:
                break
    assert read_rows(folder / "out.jsonl") == wanted
    assert not list(folder.glob("*.partial")) and not list(folder.glob("*.rejects.jsonl"))


def test_retry_after_is_waited_for_and_bounded(tmp_path):
    with serving(lambda body, number: (429, "later", {"Retry-After": "0.7"}) if number == 0 else None) as server:
        ask(server.url, tmp_path, rows=ROWS[:1])
    assert server.times[1] - server.times[0] >= 0.7
    with serving(lambda body, number: (503, "tomorrow", {"Retry-After": "86400"})) as server:
        with pytest.raises(Failed, match="asks to wait 86400 s"):
            Client(server.url, retries=5).ask("POST", "/completions", {"model": "x"}, dict)
    assert len(server.bodies) == 1
    with serving(lambda body, number: (503, "x", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"})) as server:
        with pytest.raises(Failed, match=r"after 3 tries"):
            Client(server.url, retries=2, delay=0.001).ask("POST", "/completions", {"model": "x"}, dict)


def test_pauses_grow_and_are_bounded(monkeypatch):
    pauses = []
    with serving(lambda body, number: "500") as server:
        client = Client(server.url, retries=12)
        monkeypatch.setattr(client.stopped, "wait", lambda seconds: pauses.append(seconds))
        with pytest.raises(Failed):
            client.ask("POST", "/completions", {"model": "x"}, dict)
    assert len(pauses) == 12
    for number, pause in enumerate(pauses):
        top = min(60.0, 0.5 * 2**number)
        assert top / 2 <= pause <= top


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_a_refusal_stops_at_once_with_the_servers_words(status, tmp_path):
    said = json.dumps({"error": {"message": "model does not exist, my friend"}})
    with serving(lambda body, number: (status, said, {"Location": "http://127.0.0.1:1/"})) as server:
        with pytest.raises(ServerError, match="model does not exist, my friend") as caught:
            ask(server.url, tmp_path, jobs=1)
    assert f"answered {status}" in str(caught.value)
    assert len(server.bodies) <= 2  # one may have been on its way
    assert not (tmp_path / "out.jsonl").exists()


def test_a_row_too_long_for_the_model_is_one_rows_matter(tmp_path):
    said = json.dumps({"error": {"message": "This model's maximum context length is 8 tokens", "code": None}})
    with serving(lambda body, number: (400, said, {}) if body.get("prompt") == ROWS[3]["prompt"] else None) as server:
        result = ask(server.url, tmp_path)
    assert (result["written"], result["rejected"]) == (11, 1) and max(server.asked.values()) == 1


def test_nothing_listens_there(tmp_path):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(DataError, match="nothing listens there.*Is the server running"):
            ask(url, tmp_path)
        with pytest.raises(DataError, match="nothing listens there.*Is the server running"):
            ask(url, tmp_path, server_model=None)


def test_a_server_that_goes_away_is_not_asked_for_every_row(monkeypatch, tmp_path):
    monkeypatch.setattr(run_module, "GIVE_UP", 3)
    with serving(lambda body, number: "reset") as server:
        with pytest.raises(DataError, match="no answer to 3 rows one after another.*goes on from there"):
            ask(server.url, tmp_path, jobs=1, client={"retries": 0})
        server.fault = lambda body, number: None
        result = ask(server.url, tmp_path)
    assert (result["written"], result["rejected"]) == (12, 0)


def test_a_server_without_a_list_of_models(tmp_path, monkeypatch):
    monkeypatch.setattr("server_faulty.Handler.do_GET", lambda self: self._send(404, b"not here"))
    with serving() as server:
        with pytest.raises(DataError, match="--server_model: name the model to ask"):
            ask(server.url, tmp_path)
        result = ask(server.url, tmp_path, server_model="tiny")
    assert (result["written"], result["server"]["model"]) == (12, "tiny")


def test_strict_stops_at_the_first(tmp_path):
    with serving(lambda body, number: "nan" if body.get("prompt") == ROWS[3]["prompt"] else None) as server:
        with pytest.raises(DataError, match=r"rows.jsonl:4: .*is nan"):
            ask(server.url, tmp_path, strict=True, jobs=1)
        assert not (tmp_path / "out.jsonl").exists()
        server.fault = lambda body, number: None
        result = ask(server.url, tmp_path, strict=True)
    assert result["resumed"] == 3 and result["written"] == 12


def test_rows_that_cannot_be_asked(tmp_path):
    rows = [
        {"prompt": "x"}, {"prompt": 5}, {"messages": ["no"]}, {"text": "x"}, {"prompt": []},
        {"prompt": "x", "behavior_policy": "another"}, {"prompt": [{"role": "user", "content": "x"}],
        "completion": [{"role": "assistant", "content": "y"}]}, {"prompt": "x", "label": "yes"},
    ]  # fmt: skip
    with serving() as server:
        result = ask(server.url, tmp_path, rows=rows)
    reasons = [row["reason"] for _, row in read_jsonl(tmp_path / "out.jsonl.rejects.jsonl")]
    assert result["written"] == 1
    assert len(reasons) == 7 and "'another'" in reasons[4] and "--tokenizer" in reasons[5] and "label" in reasons[6]


def test_several_models_and_none_named(tmp_path):
    with serving() as server:
        client = Client(server.url)
        client.ask = lambda *args, **kwargs: [{"id": "a"}, {"id": "b"}]
        with pytest.raises(DataError, match="the server lists a, b"):
            import_logprobs("openai", make_data(tmp_path), tmp_path / "o.jsonl", client=client, progress=False)


def make_data(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# The key


def echo_of(headers_too: bool):
    """An error that repeats the request's Authorization, as proxies' debug pages do, also as JSON escapes it."""
    text = f"you sent Authorization: Bearer {KEY} and {json.dumps(KEY)} " + "x" * 440 + KEY
    return text, {"X-Echo": KEY} if headers_too else {}


@pytest.mark.parametrize("status", [500, 401, 400])
def test_the_key_reaches_no_file_and_no_message(status, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    text, headers = echo_of(True)
    body = json.dumps({"error": {"message": text}}) if status == 400 else text
    data = make_data(tmp_path)
    with serving(lambda _, number: (status, body, headers)) as server:
        arguments = ["import", "--source", "openai", "--url", server.url, "--data", str(data), "--out",
                     str(tmp_path / "out.jsonl"), "--api_key_env", "MY_KEY", "--retries", "0"]  # fmt: skip
        result = CliRunner().invoke(app, arguments)
        assert server.authorizations[0] == f"Bearer {KEY}"
    assert result.exit_code == (3 if status == 500 else 1)
    assert "[key]" in result.output + result.stderr + everything(tmp_path)
    assert not leaks(result.output + result.stderr)
    assert not leaks(everything(tmp_path))


def everything(folder) -> str:
    return "\n".join(path.read_text() + path.name for path in folder.rglob("*") if path.is_file())


def leaks(text: str) -> bool:
    """Half of the key would be too much."""
    return any(KEY[i : i + 10] in text for i in range(len(KEY) - 9))


def test_an_answer_that_holds_the_key_is_written_nowhere(tmp_path):
    def respond(body, chat):
        found = answer(body, chat)
        if body.get("prompt") == ROWS[1]["prompt"]:
            found["choices"][0]["text"] = KEY
            found["choices"][0]["logprobs"] = {"tokens": [KEY], "token_logprobs": [-1.0]}
        return found

    with serving(respond=respond) as server:
        result = ask(server.url, tmp_path, key=KEY)
    assert (result["written"], result["rejected"]) == (11, 1)
    assert "holds the API key" in (tmp_path / "out.jsonl.rejects.jsonl").read_text()
    assert not leaks(everything(tmp_path))


def test_the_key_is_in_no_traceback(tmp_path):
    """Not even with the values of local variables, as some tools print them, but for the client's own."""
    with serving(lambda body, number: "reset") as server:
        client = Client(server.url, KEY, retries=0)
        try:
            client.ask("POST", "/completions", {"model": "x"}, dict)
        except Failed as error:
            shown = traceback.TracebackException.from_exception(error, capture_locals=True)
        assert not leaks("".join(shown.format()))
    assert not leaks(repr(client)) and not leaks(str(client))


def test_keys_come_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key(None, "OPENAI_API_KEY") is None
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert read_key(None, "OPENAI_API_KEY") == KEY
    monkeypatch.setenv("OTHER", "sk-with\nnewline")
    with pytest.raises(DataError, match="OTHER does not hold a key") as caught:
        read_key("OTHER", "OPENAI_API_KEY")
    assert "newline" not in str(caught.value)
    with pytest.raises(DataError, match="no such environment variable"):
        read_key("MISSING_KEY", "OPENAI_API_KEY")


# ---------------------------------------------------------------------------------------------------------------------
# Kills and the side file


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_it_goes_on(seed, wanted, tmp_path):
    """SIGKILL after random delays, until a run comes through: what it writes is as if nothing had happened."""
    rng = random.Random(seed)
    lock = threading.Lock()

    def slow(body, number):
        with lock:
            pause = rng.uniform(0.02, 0.05)
        time.sleep(pause)
        return "500" if pause > 0.04 and number == 0 else None

    make_data(tmp_path)
    kills, seen, anew = 0, 0, 0
    with serving(slow) as server:
        for attempt in range(60):
            child = os.fork()
            if child == 0:
                try:
                    sys.stdout = sys.stderr = open(os.devnull, "w")
                    result = ask(server.url, tmp_path, n=2, jobs=3, client={"timeout": 20})
                    os._exit(0 if not result["rejected"] else 3)
                except BaseException:
                    os._exit(9)
            killer = threading.Timer(rng.uniform(0.01, 0.2 if kills else 0.06), os.kill, (child, signal.SIGKILL))
            if attempt < 50:
                killer.start()
            _, status = os.waitpid(child, 0)
            killer.cancel()
            if os.WIFEXITED(status):
                assert os.WEXITSTATUS(status) == 0
                break
            kills += 1
            partial = list(tmp_path.glob("*.partial"))
            if (tmp_path / "out.jsonl").exists():  # killed when all was done: it may have begun anew
                assert read_rows(tmp_path / "out.jsonl") == wanted
                os.unlink(tmp_path / "out.jsonl")
                seen, anew = 0, anew + 1
            elif partial:  # what is there is never less than before
                assert partial[0].stat().st_size >= seen
                seen = partial[0].stat().st_size
        else:
            raise AssertionError("no run came through")
    assert kills > 0
    assert read_rows(tmp_path / "out.jsonl") == wanted
    # asked again is what failed, and of a kill six requests at most: three on their way, three not yet written
    assert sum(server.asked.values()) <= (2 + anew) * len(ROWS) + 6 * kills
    assert not list(tmp_path.glob("*.partial"))


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1), again=st.booleans())
def test_a_side_file_cut_anywhere_is_gone_on_from(share, again, whole_journal, wanted, tmp_path_factory):
    data, name, content = whole_journal
    folder = tmp_path_factory.mktemp("cut")
    (folder / "rows.jsonl").write_bytes(data)
    cut = content[: int(share * len(content))]
    (folder / name).write_bytes(cut + (cut[-7:].rpartition(b"\n")[2] if again else b""))
    with serving() as server:
        # the server's address is part of the side file's name
        journal_name = name
        result = run_with_url(server, folder, journal_name)
    assert result["resumed"] == max(0, cut.count(b"\n") - 1)
    assert unsealed(read_rows(folder / "out.jsonl")) == unsealed(wanted)


@pytest.fixture(scope="module")
def whole_journal(tmp_path_factory):
    """The data, the name and the bytes of a side file of a run that did everything but write its output."""
    folder = tmp_path_factory.mktemp("journal")
    with serving() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pear.importing.live.Live.settings", lambda self: {"n": self.n})
        patch.setattr(run_module, "_write", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, folder, n=2)
    (partial,) = folder.glob("*.partial")
    return (folder / "rows.jsonl").read_bytes(), partial.name, partial.read_bytes()


def run_with_url(server, folder, name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pear.importing.live.Live.settings", lambda self: {"n": self.n})
        result = ask(server.url, folder, n=2)
    assert not list(folder.glob("*.partial")), name
    return result


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("room", [100, 3000])
def test_a_full_disk_loses_nothing(room, wanted, tmp_path):
    """Also where a line was written in part: it is cut off, and its record done again."""
    make_data(tmp_path)
    with serving() as server:
        child = os.fork()
        if child == 0:
            code = 9
            try:
                sys.stdout = sys.stderr = open(os.devnull, "w")
                import resource

                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
                ask(server.url, tmp_path, n=2)
            except WriteError as error:
                code = 7 if "the disk is full" in str(error) and "goes on from there" in str(error) else 8
            except BaseException:
                pass
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert os.WEXITSTATUS(status) == 7
        (partial,) = tmp_path.glob("*.partial")
        assert partial.stat().st_size == room and not (tmp_path / "out.jsonl").exists()
        result = ask(server.url, tmp_path, n=2)
    assert (result["resumed"] > 0) == (room > 100)  # not even the header has room in a hundred bytes
    assert read_rows(tmp_path / "out.jsonl") == wanted


def test_a_damaged_side_file_is_refused_with_its_line(tmp_path):
    journal = Journal(tmp_path / "out.jsonl", {"a": 1}, resume=True)
    with journal.open():
        journal.add({"record": 1, "rows": [], "rejects": [], "counts": {}})
    with open(journal.path, "a") as file:
        file.write('{"record": 2}\n')
    with (
        pytest.raises(DataError, match=r"partial:3: damaged"),
        Journal(journal.path.parent / "out.jsonl", {"a": 1}, True).open(),
    ):
        pass
    fresh = Journal(tmp_path / "out.jsonl", {"a": 1}, resume=False)
    with fresh.open():
        assert not fresh.done
        with (
            pytest.raises(DataError, match="another process is importing"),
            Journal(tmp_path / "out.jsonl", {"a": 1}, True).open(),
        ):
            pass


def test_other_settings_start_anew(tmp_path):
    with serving(lambda body, number: "nan" if "messages" in body else None) as server:
        result = ask(server.url, tmp_path, client={"retries": 0})
        assert result["rejected"] == 6
        server.fault = lambda body, number: None
        before = len(server.bodies)
        result = ask(server.url, tmp_path, request={"temperature": 0.5, "max_tokens": 8, "seed": 1})
        assert result["resumed"] == 0 and len(server.bodies) == before + 12


def test_data_that_changes_meanwhile(tmp_path):
    data = make_data(tmp_path)

    def change(body, number):
        if body.get("prompt") == ROWS[-1]["prompt"]:
            with open(data, "a") as file:
                file.write('{"prompt": "one more"}\n')

    with serving(change) as server:
        with pytest.raises(DataError, match="changed while it was being imported"):
            ask(server.url, tmp_path, jobs=1)
    assert not (tmp_path / "out.jsonl").exists()


def test_ctrl_c_ends_requests_on_the_way(tmp_path, monkeypatch):
    """Answers of a minute are not waited for."""
    began = time.monotonic()

    def add(self, entry):
        raise KeyboardInterrupt

    with serving(lambda body, number: "hang" if "messages" in body else None) as server:
        monkeypatch.setattr(Journal, "add", add)
        with pytest.raises(KeyboardInterrupt):
            ask(server.url, tmp_path, client={"timeout": 60})
    assert time.monotonic() - began < 20  # of 60: stopped, not timed out


def test_reject_says_whether_to_ask_again():
    assert Reject("x").again is False and Reject("x", again=True).again is True
