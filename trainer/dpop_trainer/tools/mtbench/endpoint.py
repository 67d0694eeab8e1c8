"""One chat completion from an OpenAI-compatible endpoint: retried where trying again may help, refused where not."""

import asyncio
import email.utils
import json
import math
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import httpx2

# too many requests, request timeout, too early, conflict, and failures of the server: worth another try
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# the key, the address or the model's name is wrong: every request will fail
FATAL = (300, 301, 302, 303, 307, 308, 401, 403, 404, 405)
LONGEST_WAIT = 120.0  # seconds
LONGEST_TIMEOUT = 86400.0


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: a request spends a hundred times less than on reading all that the system trusts."""
    return httpx2.create_ssl_context()


class JudgeError(Exception):
    """This request got no reply; others may."""


class EndpointError(ValueError):
    """No request to this endpoint can succeed as it is called; stop."""


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Args:
        url: up to and without /chat/completions, such as https://api.openai.com/v1 or http://localhost:8000/v1.
        model: the model's name there.
        api_key_env: the environment variable that holds the key; None sends none.
        timeout: seconds for one try, from the connection to the reply's last byte.
        max_attempts: tries for each request.
        max_reply_mib: MiB that a reply may have; a judgment with all that its model thought has less than one.
        first_wait: seconds before the second try; doubled before each further one.
        request_fields: added to every request, in place of ours where they have the same name; null removes ours.
        sleep: how to wait for so many seconds, in place of the clock.

    Raises:
        ValueError: a value that cannot be used, or an environment variable that is not set.
    """

    url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 120.0
    max_attempts: int = 6
    max_reply_mib: float = 16.0
    first_wait: float = 2.0
    request_fields: dict[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], Any] | None = None

    def __post_init__(self) -> None:
        _check_url(self.url)
        if self.api_key_env is not None:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):  # which may be the key itself
                raise ValueError(
                    "api_key_env: expected the name of an environment variable (letters, digits and _), got something "
                    "else. Put the key into one, and give its name."
                )
            key = os.environ.get(self.api_key_env)
            if not key:
                raise ValueError(f"api_key_env: expected a key in ${self.api_key_env}, found it empty or not set.")
            if not (key.isascii() and key.isprintable()) or " " in key:
                raise ValueError(
                    f"api_key_env: expected a key of letters, digits and signs in ${self.api_key_env}, got one with a "
                    "blank, a line's end or another character that no key has. Set it anew."
                )
        if self.max_attempts < 1 or not 0 < self.timeout <= LONGEST_TIMEOUT:
            raise ValueError(
                f"max_attempts, timeout: expected at least 1 try and more than 0 seconds, at most {LONGEST_TIMEOUT:g}, "
                f"got {self.max_attempts} and {self.timeout}."
            )
        if not 0 < self.max_reply_mib < math.inf:
            raise ValueError(f"max_reply_mib: expected more than 0 MiB, got {self.max_reply_mib}.")

    def chat(self, messages: list[dict[str, str]], *, stop: threading.Event | None = None) -> str:
        """The reply's text.

        Args:
            messages: the conversation, by role and content.
            stop: once it is set, nothing is waited for or tried again.

        Raises:
            JudgeError: no reply after all tries, or one without text; the request itself may be at fault.
            EndpointError: the endpoint refuses every request: its answer, and what to check.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": 2048, **self.request_fields}
        body = {name: value for name, value in body.items() if value is not None}
        wait, reason = self.first_wait, "nothing was tried"
        for attempt in range(1, self.max_attempts + 1):
            try:
                reply = asyncio.run(asyncio.wait_for(self._post(body), self.timeout))
                if 200 <= reply.status < 300:
                    return self._text(reply.content)
                said = self._excerpt(reply.content, 200) or httpx2.codes.get_reason_phrase(reply.status)
                reason, asked_to_wait = f"HTTP {reply.status}: {said}", _retry_after(reply)
                if reply.status in FATAL:
                    raise EndpointError(
                        f"endpoint: expected replies from {self.url!r}, got {reason}. {_hint(reply.status)}"
                    )
                if reply.status not in RETRIED:
                    raise JudgeError(reason)
            except asyncio.TimeoutError:
                reason, asked_to_wait = f"no whole reply within {self.timeout:g} seconds (timeout)", None
            except (httpx2.HTTPError, OSError, _NonsenseError) as error:
                reason, asked_to_wait = f"{type(error).__name__.lstrip('_')}: {error}", None
            if attempt < self.max_attempts:
                # spread out, so that several workers do not come back at the same moment
                pause = asked_to_wait if asked_to_wait is not None else wait * random.uniform(0.75, 1.25)
                wait_for = self.sleep or (time.sleep if stop is None else stop.wait)
                wait_for(min(pause, LONGEST_WAIT))
                if stop is not None and stop.is_set():
                    raise JudgeError(f"{reason} (stopped)")
                wait *= 2
        raise JudgeError(f"{reason} ({self.max_attempts} tries)")

    async def _post(self, body: dict[str, Any]) -> "_Reply":
        # no compression: what is counted is what is held
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        # a redirect would take the key and the answers to an address that nobody named; `chat` has the one timeout, as
        # those of the client begin anew with every byte
        async with (
            httpx2.AsyncClient(verify=_certificates(), follow_redirects=False, timeout=None) as client,
            client.stream(
                "POST", self.url.rstrip("/") + "/chat/completions", content=json.dumps(body), headers=headers
            ) as response,
        ):
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > self._longest_reply:
                    break
            return _Reply(response.status_code, response.headers.get("Retry-After"), bytes(content))

    @property
    def _longest_reply(self) -> int:
        return int(self.max_reply_mib * 2**20)

    def _text(self, content: bytes) -> str:
        if len(content) > self._longest_reply:
            raise _NonsenseError(
                f"expected a chat completion of at most {self.max_reply_mib:g} MiB (max_reply_mib), got more"
            )
        try:
            message = json.loads(content)["choices"][0]["message"]
            text = message.get("content")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise _NonsenseError(f"expected a chat completion, got {self._excerpt(content, 80)!r}") from None
        if isinstance(text, str) and text.strip():
            return text
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal:
            return refusal
        raise _NonsenseError("expected a message with text, got an empty one")

    def _excerpt(self, content: bytes, length: int) -> str:
        text = content.decode("utf-8", errors="replace").strip()
        if self.api_key_env is not None:  # which some servers repeat
            text = text.replace(os.environ[self.api_key_env], "<the key>")
        return text[:length]


class _Reply(NamedTuple):
    """What a server has sent, whether it is of use or not."""

    status: int
    retry_after: str | None
    content: bytes


class _NonsenseError(Exception):
    """A reply that is not a chat completion."""


def _check_url(text: str) -> None:
    """
    Raises:
        ValueError: no request can be sent there.
    """
    try:
        url = httpx2.URL(text)
        port = url.port
    except (httpx2.InvalidURL, ValueError):  # a port of letters, half of a surrogate pair
        url, port = httpx2.URL(), None
    is_whole = url.scheme in ("http", "https") and url.host and (port is None or 0 < port < 2**16)
    if is_whole and url.userinfo:
        raise ValueError("endpoint: expected a URL without a key in it. Name an environment variable: --api_key_env.")
    if not is_whole or url.query or url.fragment:
        raise ValueError(
            f"endpoint: expected a URL such as http://localhost:8000/v1, without ? and #, got {_shown_url(text)!r}."
        )


def _shown_url(text: str) -> str:
    """Without what may be a key in it, and not all of one without an end."""
    return re.sub(r"(?<=//)[^/@]*@|[?#].*", "...", text)[:200]


def _retry_after(reply: _Reply) -> float | None:
    """Seconds; None where the server says nothing that can be read."""
    value = (reply.retry_after or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _hint(code: int) -> str:
    if code in (401, 403):
        return "Check the key that --api_key_env names."
    if code in (404, 405):
        return "Check --endpoint (up to /v1, without /chat/completions) and --judge_model."
    return "It sends requests elsewhere, which is not followed: give the final address."
