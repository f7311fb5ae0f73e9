"""An OpenAI-compatible server for tests that answers the same to the same request, and misbehaves when it is told to.

Its answers are made of the request alone, so what an import writes must not depend on what went wrong on the way.
"""

import contextlib
import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ["It", " is", " 7", ".", "\n", " naïve", " 你好", "🙂", "!", " and"]

# What can go wrong with one answer. Those of the second line are answers that come whole and are wrong.
FAULTS = ("500", "503", "429", "429 later", "reset", "hang", "drip", "cut", "html", "list", "empty")
FAULTS += ("few", "nan", "null", "no choices", "fewer choices", "no logprobs", "other text", "positive")


def answer(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    """A deterministic answer with log-probs: of chats with `bytes`, of which some tokens cut characters in two."""
    choices = []
    for index in range(body.get("n", 1)):
        rng = random.Random(hashlib.sha256(json.dumps([body, index], sort_keys=True).encode()).hexdigest())
        pieces = [word.encode() for word in rng.choices(WORDS, k=rng.randint(2, 12))]
        if chat:
            pieces = [part for piece in pieces for part in ((piece[:2], piece[2:]) if len(piece) == 4 else (piece,))]
        values = [-rng.expovariate(0.5) for _ in pieces]
        text = b"".join(pieces).decode()
        choice: dict[str, Any] = {"index": index, "finish_reason": "length"}
        if chat:
            content = [
                {"token": p.decode(errors="replace"), "logprob": v, "bytes": list(p), "top_logprobs": []}
                for p, v in zip(pieces, values, strict=True)
            ]
            choice |= {"message": {"role": "assistant", "content": text}, "logprobs": {"content": content}}
        else:
            tokens = [piece.decode() for piece in pieces]
            choice |= {"text": text, "logprobs": {"tokens": tokens, "token_logprobs": values}}
        choices.append(choice)
    return {"id": "x", "object": "x", "model": body["model"], "choices": choices, "usage": {}}


def spoil(found: dict[str, Any], fault: str) -> Any:
    """An answer with one of the faults that come as JSON."""
    choice = found["choices"][0]
    logprobs = choice["logprobs"]
    entries, values = logprobs.get("content"), logprobs.get("token_logprobs")
    if fault == "list":
        return [found]
    if fault == "empty":
        return {}
    if fault == "no choices":
        found["choices"] = []
    elif fault == "fewer choices":
        found["choices"] = found["choices"][:-1]
    elif fault == "no logprobs":
        choice["logprobs"] = None
    elif fault == "other text":
        (choice.get("message") or choice)["content" if entries else "text"] = "something else"
    elif fault == "few":
        (entries or values).pop()
    else:
        wrong = {"nan": float("nan"), "null": None, "positive": 3.5}[fault]
        if entries:
            entries[-1]["logprob"] = wrong
        else:
            values[-1] = wrong
    return found


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._json({"data": [{"id": "tiny", "owned_by": self.server.kind}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        if len(raw) < int(self.headers["Content-Length"]):  # the client was killed
            return
        body = json.loads(raw)
        with self.server.lock:
            number = self.server.asked[raw]
            self.server.asked[raw] += 1
            self.server.bodies.append(body)
            self.server.authorizations.append(self.headers.get("Authorization"))
            self.server.times.append(time.monotonic())
        fault = self.server.fault(body, number)
        with contextlib.suppress(OSError):
            self._answer(body, fault)

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        if isinstance(fault, tuple):  # status, text, headers
            status, text, headers = fault
            self._send(status, text.encode(), headers)
        elif fault in ("500", "503"):
            self._send(int(fault), b'{"error": {"message": "overloaded"}}')
        elif fault == "429":
            self._send(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"})
        elif fault == "429 later":
            self._send(429, b"slow down", {"Retry-After": "0.2"})
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif fault == "hang":
            self.server.ended.wait(30)
        elif fault == "html":
            self._send(200, b"<html>gateway</html>")
        else:
            found = self.server.respond(body, "chat" in self.path)
            if fault in ("drip", "cut"):
                self._slowly(json.dumps(found).encode(), fault)
            else:
                self._json(found if fault is None else spoil(found, fault))

    def _slowly(self, data: bytes, fault: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for byte in data:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.ended.wait(0.05):
                return

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class Server(ThreadingHTTPServer):
    """`fault(body, times this body was asked before)` tells what goes wrong; `respond(body, chat)` makes the answer."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, fault: Callable[[dict, int], Any], respond: Callable[[dict, bool], dict], kind: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.respond, self.kind = fault, respond, kind
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.asked: Counter[bytes] = Counter()
        self.bodies: list[dict] = []
        self.authorizations: list[str | None] = []
        self.times: list[float] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextlib.contextmanager
def serving(
    fault: Callable[[dict, int], Any] = lambda body, number: None,
    respond: Callable[[dict, bool], dict] = answer,
    kind: str = "me",
) -> Iterator[Server]:
    server = Server(fault, respond, kind)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()
