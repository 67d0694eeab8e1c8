"""One chat completion from an OpenAI-compatible endpoint: retried where trying again may help, refused where not."""

import email.utils
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

# too many requests, request timeout, too early, conflict, and failures of the server: worth another try
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
# the key, the address or the model's name is wrong: every request will fail
FATAL = (300, 301, 302, 303, 307, 308, 401, 403, 404, 405)
LONGEST_WAIT = 120.0  # seconds


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
        timeout: seconds to wait for a reply.
        max_attempts: tries for each request.
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
    first_wait: float = 2.0
    request_fields: dict[str, Any] = field(default_factory=dict)
    sleep: Callable[[float], Any] | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint: expected a URL such as http://localhost:8000/v1, got {self.url!r}.")
        if parts.username or parts.password:
            raise ValueError(
                "endpoint: expected a URL without a key in it. Name an environment variable: --api_key_env."
            )
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ValueError(f"api_key_env: expected a key in ${self.api_key_env}, found it empty or not set.")
        if self.max_attempts < 1 or self.timeout <= 0:
            raise ValueError(
                f"max_attempts, timeout: expected at least 1 try and more than 0 seconds, got {self.max_attempts} and "
                f"{self.timeout}."
            )

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
                return _text(self._post(body))
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}: {_excerpt(error)}"
                if error.code in FATAL:
                    raise EndpointError(
                        f"endpoint: expected replies from {self.url!r}, got {reason}. {_hint(error.code)}"
                    ) from error
                if error.code not in RETRIED:
                    raise JudgeError(reason) from error
                asked_to_wait = _retry_after(error)
            except (OSError, HTTPException, _NonsenseError) as error:  # timeouts and broken connections are OSError
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

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.api_key_env]}"
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions", data=json.dumps(body).encode(), headers=headers, method="POST"
        )
        with _OPENER.open(request, timeout=self.timeout) as response:
            return response.read()


class _NonsenseError(Exception):
    """A reply that is not a chat completion."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # following one would take the key and the answers to an address that nobody named


_OPENER = urllib.request.build_opener(_NoRedirects)


def _text(content: bytes) -> str:
    try:
        message = json.loads(content)["choices"][0]["message"]
        text = message.get("content")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _NonsenseError(f"expected a chat completion, got {content[:80]!r}") from None
    if isinstance(text, str) and text.strip():
        return text
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return refusal
    raise _NonsenseError("expected a message with text, got an empty one")


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    value = error.headers.get("Retry-After") if error.headers else None
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode("utf-8", errors="replace").strip()[:200] or str(error.reason)
    except (OSError, HTTPException):
        return str(error.reason)


def _hint(code: int) -> str:
    if code in (401, 403):
        return "Check the key that --api_key_env names."
    if code in (404, 405):
        return "Check --endpoint (up to /v1, without /chat/completions) and --judge_model."
    return "It sends requests elsewhere, which is not followed: give the final address."
