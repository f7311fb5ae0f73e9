"""The client of `pear import` against servers that attack it: one line each, bounded time and memory, no key told."""

import base64
import contextlib
import html
import json
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest

from pear.importing import client as client_module
from pear.importing.client import Client, Failed, ServerError
from pear.importing.generation import Reject
from pear.io import DataError

KEY = "sk-test-0123456789-/+abc"


@contextlib.contextmanager
def sending(*pieces: bytes, pause: float = 0.0, again: bytes = b"") -> Iterator[str]:
    """A server that answers every request by these bytes, then by `again` without end; its address."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError):
                    connection.recv(65536)
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)
                    while again:
                        connection.sendall(again)
                        time.sleep(pause)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    finally:
        listening.close()


def said(url: str, timeout: float = 20.0, key: str | None = None) -> str:
    with pytest.raises((Failed, ServerError, Reject)) as caught:
        Client(url, key, retries=0, timeout=timeout).ask("GET", "/models", None, lambda answer: answer)
    return str(caught.value)


def response(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


@pytest.mark.parametrize(
    "sent, message",
    [
        (response(b"[" * 100_000), "the answer is no JSON (nested more than 100 deep"),
        (response(b'{"x": ' + b"9" * 5000 + b"}"), "the answer is no JSON (an integer of more than 4300 digits"),
        (response(b"[" * 100_000, "400 Bad Request"), "the server answered 400"),
        (response(b'{"x": "\xff"}'), "the answer is not UTF-8"),
        (response(b"\x1f\x8b\x08", headers="Content-Encoding: gzip\r\n"), "the answer is compressed (gzip)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{", "the answer is longer than 64 MiB"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{", "the answer was cut off after 1 of 20 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "the connection broke"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, "the connection broke"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "the connection broke"),
    ],
)
def test_answers_that_cannot_be_read_are_one_line(sent, message):
    with sending(sent) as url:
        assert message in said(url) and len(said(url)) < 800


@pytest.mark.parametrize("head", ["", "Transfer-Encoding: chunked\r\n"], ids=["plain", "a chunk of size -1"])
def test_an_endless_answer_ends_at_the_bound(head, monkeypatch):
    monkeypatch.setattr(client_module, "LONGEST_ANSWER", 1 << 20)
    start = f"HTTP/1.1 200 OK\r\n{head}\r\n{'-1' if head else ''}\r\n".encode()
    with sending(start, again=b"[" * 65536) as url:
        assert "longer than" in said(url)


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 100 Continue\r\n\r\n"]
)
def test_an_answer_that_drips_ends_when_the_time_is_over(start):
    again = start if b"100" in start else b"["
    with sending(start, again=again, pause=0.05) as url:
        began = time.monotonic()
        assert "no whole answer within 0.4 s" in said(url, timeout=0.4)
        assert time.monotonic() - began < 5


WRITTEN = {
    "plain": KEY,
    "upper": KEY.upper(),
    "reversed": KEY[::-1],
    "json": json.dumps(KEY),
    "quoted": quote(KEY, safe=""),
    "percent": "".join(f"%{ord(c):02X}" for c in KEY),
    "some percent": KEY.replace("t", "%74"),
    "hex": KEY.encode().hex().upper(),
    "unicode": "".join(f"\\u{ord(c):04x}" for c in KEY),
    "html": html.escape(KEY),
    "entities": "".join(f"&#{ord(c)};" for c in KEY),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "wrapped": "\n".join(base64.b64encode(KEY.encode()).decode()[i : i + 8] for i in range(0, 4 * len(KEY) // 3, 8)),
    "header": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "login": base64.urlsafe_b64encode(f"me:{KEY}".encode()).decode(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_key_that_comes_back_in_any_writing_is_not_told(name):
    text = f"you sent {WRITTEN[name]}, not good"
    for body in (text.encode(), json.dumps({"error": {"message": text}}).encode()):
        with sending(response(body, "401 Unauthorized")) as url:
            found = said(url, key=KEY)
        assert "[key]" in found or "[words that hold the key]" in found
        assert all(WRITTEN[name][i : i + 12].lower() not in found.lower() for i in range(len(WRITTEN[name]) - 11))
    with sending(response(json.dumps({"data": [{"id": text}]}).encode())) as url:
        assert said(url, key=KEY) == "the answer holds the API key: it is written nowhere"


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://[::1", "whose host is none"),
        ("http://[hunter2]/v1", "whose host is none"),
        ("http://me:hunter2@host/v1", "no user, password"),
        ("http://me:hunter2%40host/v1", "no user, password"),
        ("http://host/v1?key=hunter2", "no user, password"),
        ("http://host/v1#hunter2", "no user, password"),
        ("http://me:hunter2", "no valid port"),
        ("http://host:99999/v1", "no valid port"),
        ("http:/me:hunter2@host", "without a host's name"),
        ("http://ho st/hunter2", "without a host's name"),
        ("ftp://me:hunter2@host", "does not start with http"),
        ("me:hunter2@host:8000/v1", "does not start with http"),
        ("", "does not start with http"),
    ],
)
def test_a_wrong_url_is_refused_and_not_repeated(url, message):
    with pytest.raises(DataError, match=f"--url .*{message}") as caught:
        Client(url, KEY)
    assert "hunter2" not in str(caught.value) and caught.value.__cause__ is None
