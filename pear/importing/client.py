"""Asking an OpenAI-compatible server: bounded retries, one deadline for a whole answer, a key that goes nowhere else.

Standard library alone. Redirects are not followed (they would carry the key elsewhere) and proxies are not used.
"""

import base64
import contextlib
import html
import http.client
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pear.importing.generation import Reject
from pear.io import DataError
from pear.strict_json import parse_json

T = TypeVar("T")

AGAIN = {408, 409, 425, 429}  # besides 500 and up
LONGEST_ANSWER = 1 << 26  # bytes: log-probs of 200,000 tokens; parsed, JSON takes up to twenty times as much
LONGEST_REFUSAL = 1 << 16  # bytes of an error's body that are read
_LONGER = f"the answer is longer than {LONGEST_ANSWER >> 20} MiB"
PIECE = 1 << 16  # bytes read at once
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
        parts, self._port = _split(url)
        if not timeout > 0:
            raise DataError(f"--timeout must be positive, got {timeout}")
        if retries < 0:
            raise DataError(f"--retries must be at least 0, got {retries}")
        self.url = url.rstrip("/")
        self._secure, self._host, self._path = parts.scheme == "https", parts.hostname, parts.path.rstrip("/")
        self._forms = _forms(key) if key is not None and len(key) >= SECRET else []
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
        if 200 <= status < 300:
            return self._parse(raw, headers.get("Content-Encoding"))
        text = raw.decode("utf-8", "replace")
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

    def _parse(self, raw: bytes, coding: str | None) -> dict[str, Any]:
        if coding not in (None, "", "identity"):
            raise _Again(f"the answer is compressed ({self.scrub(coding):.40}), which was not asked for")
        try:
            text = raw.decode("utf-8-sig")
            answer = parse_json(text)
        except UnicodeDecodeError as error:
            raise _Again(f"the answer is not UTF-8 ({error.reason} at byte {error.start})") from None
        except ValueError as error:
            why = "" if isinstance(error, json.JSONDecodeError) else f"{error}: "
            raise _Again(f"the answer is no JSON ({self.scrub(why + _words(self.scrub(text)))})") from None
        if not isinstance(answer, dict):
            raise _Again(f"the answer is no JSON object but {type(answer).__name__}")
        if self._forms and (self._reveals(text) or _any_text(answer, self._reveals)):
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
            refused = not 200 <= response.status < 300
            expected = response.length  # None where the server does not say
            if not refused and (expected or 0) > LONGEST_ANSWER:
                raise Reject(_LONGER)
            raw = _body(response, expected, LONGEST_REFUSAL if refused else LONGEST_ANSWER)
            if late.is_set():
                raise TimeoutError
            if len(raw) > LONGEST_ANSWER:
                raise Reject(_LONGER)
            if not refused and len(raw) < (expected or 0):
                raise _Again(f"the answer was cut off after {len(raw)} of {expected} bytes")
            return response.status, response.headers, raw
        except Reject:
            raise
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
        if not self._forms:  # a placeholder such as EMPTY
            return text.replace(self._key, "[key]")
        for form in self._forms:
            text = re.sub(re.escape(form), "[key]", text, flags=re.IGNORECASE)
        if self._reveals(text):  # escaped here and there
            return "[words that hold the key]"
        return text

    def _reveals(self, text: str) -> bool:
        """Whether the key is in a text, or in what a program makes of its escapes."""
        if len(text) < SECRET:
            return False
        together = "".join(text.split())  # base64 is wrapped at 76 characters, say
        readings = {text, together, unquote(text), html.unescape(text), _unescape(text)}
        return any(form in reading.lower() for form in self._forms for reading in readings)


def _body(response: http.client.HTTPResponse, expected: int | None, most: int) -> bytes:
    """The body, or a little more than `most` bytes of one that is longer."""
    raw = bytearray()
    while len(raw) <= most and (left := PIECE if expected is None else min(PIECE, expected - len(raw))) > 0:
        if not (piece := response.read1(left)):  # in pieces: http.client reads a chunk of negative size without end
            break
        raw += piece
    return bytes(raw)


def _unescape(text: str) -> str:
    r"""Without the escapes \xNN and \uNNNN."""
    return re.sub(r"\\+(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))", lambda m: chr(int(m[1] or m[2], 16)), text)


def _any_text(value: Any, holds: Callable[[str], bool]) -> bool:
    """Whether it holds for any string or key of an answer."""
    if isinstance(value, str):
        return holds(value)
    if isinstance(value, dict):
        return any(_any_text(item, holds) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(_any_text(item, holds) for item in value)


def _words(text: str) -> str:
    """What a server says in an error: the message in its JSON, or the beginning of what it sent."""
    with contextlib.suppress(ValueError):
        value = parse_json(text)
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
    with contextlib.suppress(ValueError, TypeError, OverflowError, OSError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _split(url: str) -> tuple[SplitResult, int | None]:
    """The parts of --url and its port. No message repeats the URL, which may hold a password where none is looked for.

    Raises:
        DataError: what is wrong with it.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:  # brackets around what is no address, say
        raise DataError("--url must look like http://host:port/v1, got one whose host is none") from None
    if parts.scheme not in ("http", "https"):
        raise DataError(
            "--url must look like http://host:port/v1, got one that does not start with http:// or https://"
        )
    if "@" in unquote(parts.netloc) or parts.query or parts.fragment:
        raise DataError("--url must hold no user, password or query: a key comes from the environment (--api_key_env)")
    if not host or not _HOST.fullmatch(host):
        raise DataError("--url must look like http://host:port/v1, got one without a host's name")
    try:
        return parts, parts.port
    except ValueError:
        raise DataError("--url has no valid port: it must be a number up to 65535, as in http://host:port/v1") from None


_HOST = re.compile(r"[\w.:%-]{1,253}")  # names, international ones too, and addresses


def _forms(key: str) -> list[str]:
    """The key as servers and proxies write it, in lower case: as it is, escaped, reversed, in hex and in base64."""
    raw = key.encode()
    forms = {key, key[::-1], json.dumps(key)[1:-1], quote(key), quote(key, safe=""), html.escape(key), raw.hex()}
    forms.add("".join(f"%{byte:02x}" for byte in raw))
    forms.add("".join(f"\\u{byte:04x}" for byte in raw))
    forms.add("".join(f"\\x{byte:02x}" for byte in raw))
    for shift in range(3):  # base64 of "Bearer <key>", say: what its alignment leaves of the key alone
        text = base64.b64encode(b"\0" * shift + raw).decode()
        first, last = -(-8 * shift // 6), (8 * (shift + len(raw))) // 6
        forms |= {text[first:last], text[first:last].replace("+", "-").replace("/", "_")}
    return sorted({form.lower() for form in forms}, key=len, reverse=True)
