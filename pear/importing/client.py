"""Asking an OpenAI-compatible server: bounded retries, one deadline for a whole answer, a key that goes nowhere else.

Standard library alone. Redirects are not followed (they would carry the key elsewhere) and proxies are not used.
"""

import contextlib
import http.client
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pear.importing.generation import Reject
from pear.io import DataError

T = TypeVar("T")

AGAIN = {408, 409, 425, 429}  # besides 500 and up
LONGEST_ANSWER = 1 << 28  # bytes
FIRST_DELAY, LONGEST_DELAY = 0.5, 60.0  # seconds
LONGEST_ASKED = 600.0  # seconds that a server may ask to wait by Retry-After
SECRET = 8  # shorter "keys" (EMPTY, none) are placeholders of local servers
_TOO_LONG = (
    "context_length_exceeded",
    "maximum context length",
    "context size",
    "context window",
    "exceed_context_size",
)


class ServerError(DataError):
    """The server refused, by `status`, in a way that asking again does not change; its words are in the message."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Failed(Reject):
    """All tries failed: of this row, or because the server is not there (`gone`)."""

    def __init__(self, reason: str, *, gone: bool = False):
        super().__init__(reason)
        self.gone = gone


class Stopped(Exception):
    """Another thread ended the run."""


class _Again(Exception):
    """This try failed; `wait` is what the server asked for, `gone` that there was no answer at all."""

    def __init__(self, reason: str, wait: float | None = None, gone: bool = False):
        super().__init__(reason)
        self.wait, self.gone = wait, gone


def read_key(name: str | None, default: str) -> str | None:
    """The API key in the environment variable `name`, or in `default` where that is set.

    Raises:
        DataError: `name` was given and is not set, or holds what cannot be a key. The value is never in the message.
    """
    key = os.environ.get(name or default, "").strip()
    if not key:
        if name is not None:
            raise DataError(f"--api_key_env {name}: no such environment variable, or it is empty")
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        raise DataError(
            f"the environment variable {name or default} does not hold a key: it has spaces or odd characters"
        )
    return key


class Client:
    """One server. Any number of threads may `ask` at once.

    Args:
        url: up to /v1, http or https.
        key: sent as a bearer token; appears in no message, and an answer that holds it is refused.
        timeout: seconds for one whole answer, from connecting to its last byte.
        retries: tries after the first.
        delay: the first back-off, doubled each time up to LONGEST_DELAY, with jitter.
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = 600.0, retries: int = 5, delay: float = FIRST_DELAY
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise DataError(f"--url must look like http://host:port/v1, got {_without_login(url)!r}")
        if "@" in parts.netloc or parts.query:
            raise DataError(
                "--url must hold no user, password or query: a key comes from the environment (--api_key_env)"
            )
        try:
            self._port = parts.port
        except ValueError:
            raise DataError(f"--url has no valid port: {url!r}") from None
        if not timeout > 0:
            raise DataError(f"--timeout must be positive, got {timeout}")
        if retries < 0:
            raise DataError(f"--retries must be at least 0, got {retries}")
        self.url = url.rstrip("/")
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._key, self._timeout, self._retries, self._delay = key, timeout, retries, delay
        self.stopped = threading.Event()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def stop(self) -> None:
        """End every `ask`, now and to come, with Stopped."""
        self.stopped.set()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def __repr__(self) -> str:  # a traceback that shows values must not show the key
        return f"Client({self.url!r})"

    def ask(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[dict[str, Any]], T],
        retries: int | None = None,
    ) -> T:
        """`read(answer)` of the first answer that it accepts; `retries` where not the client's own.

        Tried again, after a pause: no answer in time, connections that fail, answers 429 and 500 and up, answers that
        are cut off or no JSON, and those for which `read` raises a Reject with `again`.

        Raises:
            ServerError: the server says that it will never answer this (400, 401, 403, 404, ...).
            Failed: the last try failed too.
            Reject: by `read`; or the request is too long for the model.
            Stopped: `stopped` was set meanwhile.
        """
        data = None if body is None else json.dumps(body).encode()
        retries = self._retries if retries is None else retries
        for number in range(retries + 1):
            if self.stopped.is_set():
                raise Stopped
            try:
                return read(self._answer(method, path, data))
            except _Again as error:
                last: Exception = error
                wait = error.wait
            except Reject as error:
                if not error.again or number == retries:
                    raise
                last, wait = error, None
            if wait is not None and wait > LONGEST_ASKED:
                raise Failed(f"{last}; the server asks to wait {wait:.0f} s")
            if number < retries:
                pause = min(LONGEST_DELAY, self._delay * 2**number) * random.uniform(0.5, 1.0)
                if self.stopped.wait(max(pause, wait or 0.0)):
                    raise Stopped
        tries = f"{retries + 1} tries" if retries else "1 try"
        raise Failed(f"{last} (after {tries})", gone=getattr(last, "gone", False)) from None

    # -----------------------------------------------------------------------------------------------------------------

    def _answer(self, method: str, path: str, data: bytes | None) -> dict[str, Any]:
        status, headers, raw = self._exchange(method, path, data)
        text = raw.decode("utf-8", "replace")
        if 200 <= status < 300:
            return self._parse(text)
        said = self.scrub(_words(self.scrub(text)))  # before it is shortened, and once its escapes are read
        if status in AGAIN or status >= 500:
            raise _Again(f"the server answered {status} ({said})", _retry_after(headers.get("Retry-After")))
        if status in (400, 413, 422) and any(word in text.lower() for word in _TOO_LONG):
            raise Reject(f"too long for the model: the server answered {status} ({said})")
        hints = {
            401: " Is the key right (--api_key_env)?",
            403: " May this key use the model?",
            404: " Does --url end in /v1, and is --server_model served there?",
        }
        moved = " Redirects are not followed: give the new address." if 300 <= status < 400 else ""
        raise ServerError(
            f"{self.url}{path}: the server answered {status} and will not answer otherwise: {said}."
            f"{hints.get(status, moved)}",
            status,
        )

    def _parse(self, text: str) -> dict[str, Any]:
        try:
            answer = json.loads(text)
        except ValueError:
            raise _Again(f"the answer is no JSON ({_words(self.scrub(text))})") from None
        if not isinstance(answer, dict):
            raise _Again(f"the answer is no JSON object but {type(answer).__name__}")
        if self._key is not None and len(self._key) >= SECRET and _holds(answer, self._key):
            raise Reject("the answer holds the API key: it is written nowhere")
        return answer

    def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, Any, bytes]:
        """Status, headers and body; the connection is cut when the time is over, however slowly bytes still come."""
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        late = threading.Event()
        watch = sock = None
        try:
            connection.connect()
            sock = connection.sock
            with self._lock:
                self._open.add(sock)
            if self.stopped.is_set():  # before it could be cut
                raise Stopped

            def cut() -> None:
                late.set()
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

            watch = threading.Timer(self._timeout, cut)
            watch.daemon = True
            watch.start()
            headers = {"Accept": "application/json", "Connection": "close"}
            if data is not None:
                headers["Content-Type"] = "application/json"
            if self._key is not None:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, quote(self._path + path), body=data, headers=headers)
            response = connection.getresponse()
            raw = response.read(LONGEST_ANSWER + 1)
            if late.is_set():
                raise TimeoutError
            if len(raw) > LONGEST_ANSWER:
                raise _Again(f"the answer is longer than {LONGEST_ANSWER >> 20} MiB")
            expected = response.getheader("Content-Length")
            if expected is not None and expected.isdigit() and len(raw) < int(expected):
                raise _Again(f"the answer was cut off after {len(raw)} of {expected} bytes")
            return response.status, response.headers, raw
        except (OSError, http.client.HTTPException, ValueError) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                raise _Again(f"no whole answer within {self._timeout:g} s", gone=True) from None
            if isinstance(error, ConnectionRefusedError):
                raise _Again(f"{self._host} refuses the connection: nothing listens there", gone=True) from None
            if isinstance(error, socket.gaierror):
                raise _Again(f"{self._host}: no such host", gone=True) from None
            what = self.scrub(str(error) or type(error).__name__)
            raise _Again(
                f"the connection broke ({what})", gone=not isinstance(error, http.client.HTTPException)
            ) from None
        finally:
            if watch is not None:
                watch.cancel()
            with self._lock:
                self._open.discard(sock)
            connection.close()

    def scrub(self, text: str) -> str:
        """The text without the key, however it is written."""
        if self._key is None:
            return text
        for form in {self._key, json.dumps(self._key)[1:-1], quote(self._key), quote(self._key, safe="")}:
            text = text.replace(form, "[key]")
        return text


def _holds(value: Any, key: str) -> bool:
    if isinstance(value, str):
        return key in value
    if isinstance(value, dict):
        return any(_holds(item, key) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(_holds(item, key) for item in value)


def _words(text: str) -> str:
    """What a server says in an error: the message in its JSON, or the beginning of what it sent."""
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        for key in ("error", "message", "detail"):
            while isinstance(value, dict) and key in value:
                value = value[key]
        text = value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return (text if len(text) <= 500 else text[:497] + "...").rstrip(".") or "no words"


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a number of them or a date."""
    if value is None:
        return None
    with contextlib.suppress(ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _without_login(url: str) -> str:
    return url if "@" not in url else "..." + url.rsplit("@", 1)[1]
