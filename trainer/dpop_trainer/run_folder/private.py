"""What of a configuration is a secret, and what is private: known here alone, at any depth, by key and by value.

A secret (a token, a key, a password) is written nowhere: not in a run's records, its pickles, on the terminal or to a
tracker. Its field stays, with nothing in it, so that a reader sees that one was given; where text merely contains one,
`HIDDEN` stands in its place. No number of a run depends on a secret, so that a run is the same under a new one.

A path of this machine is private: a run keeps it, since it is needed to run again; what is handed on has its last part.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from dpop_trainer.data.source_path import looks_local

HIDDEN = "<hidden>"


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SECRET_WORDS = _set_of(
    "apikey authorization bearer cookie cookies credential credentials passcode passphrase passwd password passwords "
    "pwd secret secrets"
)
_SECRET_LAST_WORDS = _set_of("auth key keys pass pat token tokens")
# of a word of `_SECRET_LAST_WORDS`: what makes it something else, as in pad_token, max_tokens, sort_key
_INNOCENT_BEFORE = _set_of(
    "bos boi cls end eoi eos extra fake image mask model next pad sep unk start stop video audio virtual special added "
    "new max min num total prompt input completion column columns metric sort group label ignore missing unexpected "
    "per output skip query value primary public past dataset state dict"
)
_PLURALS = {"keys", "tokens"}  # innocent on their own, as in a count of tokens

# in one pass over the text: a run's records have hundreds of texts
_SECRET_IN_TEXT = re.compile(
    "|".join(
        (
            r"\b(?:"
            r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
            r"|api_org_[A-Za-z0-9]{16,}"
            r"|sk-(?=[\w-]*\d)[\w-]{16,}"  # OpenAI and its kin
            r"|gh[opsur]_[A-Za-z0-9]{16,}"  # GitHub
            r"|github_pat_[A-Za-z0-9_]{16,}"
            r"|glpat-[A-Za-z0-9_-]{16,}"  # GitLab
            r"|xox[abeprs]-[A-Za-z0-9-]{10,}"  # Slack
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}\b"  # AWS
            r"|AIza[A-Za-z0-9_-]{30,}"  # Google
            r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"  # a JSON web token
            r")",
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
            r"(?<=\b[Bb][Ee][Aa][Rr][Ee][Rr] )[A-Za-z0-9._~+/=-]{6,}",
            r"(?<=\b[Bb][Aa][Ss][Ii][Cc] )[A-Za-z0-9+/=]{12,}",
            r"(?<=://)[^\s/@]+(?=@)",  # user and password of a URL
        )
    )
)
# "name": value, 'name': value or name=value in a text; `is_secret_key` says of which the value is a secret. A bare
# "name: " is left alone: so begin sentences.
_NAMED = re.compile(
    r"""((["'])(?P<quoted>[A-Za-z][\w.-]*)\2\s*[:=]\s*|(?P<bare>[A-Za-z][\w.-]*)=)"""
    r"""(?P<value>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|[^\s"',;&{}\[\]()]+)"""
)
_INNOCENT_VALUES = re.compile(r"(?i)true|false|null|none|auto|<.*>|\[.*\]|-?\d{1,5}")
# two parts or more, not within a URL, a hub id or a word
_PATH_IN_TEXT = re.compile(r"(?<![\w/:.~<>-])(?:~|\.{1,2})?/(?:[^\s\"'<>|:;,()\[\]{}/]+/)+[^\s\"'<>|:;,()\[\]{}/]*")
_FILE_URL = re.compile(r"\bfile://[^\s\"'<>]*")

# shorter ones would be found in words, and keep nobody out
_SHORTEST_OF_ENVIRONMENT = 8


@lru_cache(maxsize=4096)
def is_secret_key(key: str) -> bool:
    """Whether a field, an environment variable or a header of this name holds a secret."""
    words = _words(key)
    words = words[:-1] if len(words) > 1 and words[-1] in ("id", "value") else words  # AWS_ACCESS_KEY_ID
    if not words:
        return False
    if _SECRET_WORDS & set(words[-2:]) or words[-2:] == ["connection", "string"]:
        return True
    if words[-1] not in _SECRET_LAST_WORDS or (len(words) > 1 and words[-2] in _INNOCENT_BEFORE):
        return False
    return len(words) > 1 or words[-1] not in _PLURALS


def without_secrets(value: Any) -> Any:
    """A copy of a value in which no secret is left.

    Args:
        value: mappings, lists and texts, nested at will. Other objects are kept as they are.
    """
    return _walk(value, _hiding())


def text_without_secrets(text: str) -> str:
    """A message, such as an error's, with every secret in it replaced."""
    return _hiding()(text)


def shareable(value: Any) -> Any:
    """`without_secrets`, and of every path of this machine the last part alone: what may leave it."""
    hide = _hiding()
    return _walk(value, lambda text: _without_paths(hide(text)))


def secret_places(value: Any) -> list[str]:
    """Where in a value secrets stand: "model_init_kwargs.token", "dataset_mixture[1].path", ..."""
    return list(_places(value, "", _hiding()))


class SecretFreeRepr:
    """Dataclasses of arguments whose repr, which logs and tracebacks show, has no secrets. They say `repr=False`."""

    def __repr__(self) -> str:
        shown = without_secrets({item.name: getattr(self, item.name, None) for item in fields(self)})  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __str__(self) -> str:
        return repr(self)


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    """Every text changed, every secret's value None."""
    if type(value) is str:  # not an enum that is one as well
        return change(value)
    if isinstance(value, Mapping):
        return {
            change(key) if type(key) is str else key: None if _is_secret(key, entry) else _walk(entry, change)
            for key, entry in value.items()
        }
    if isinstance(value, list | tuple | set | frozenset):
        items = [_walk(entry, change) for entry in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _places(value: Any, place: str, hide: Callable[[str], str]) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            inner = f"{place}.{key}" if place else str(key)
            if _is_secret(key, entry):
                yield inner
            else:
                yield from _places(entry, inner, hide)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            yield from _places(entry, f"{place}[{i}]", hide)
    elif type(value) is str and hide(value) != value:
        yield place


def _is_secret(key: Any, value: Any) -> bool:
    """Under a secret's name; a switch (token: true, "log in"), a count or a special token (<pad>) is none."""
    if not isinstance(key, str) or value is None or isinstance(value, bool) or not is_secret_key(key):
        return False
    if isinstance(value, int | float):
        return bool(_SECRET_WORDS & set(_words(key)))
    return not (isinstance(value, str) and _INNOCENT_VALUES.fullmatch(value))


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def _hiding() -> Callable[[str], str]:
    """A function from texts to texts; the environment is read once, here."""
    known = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_OF_ENVIRONMENT and is_secret_key(name) and not os.path.exists(value)
    }
    of_environment = re.compile("|".join(re.escape(value) for value in sorted(known, key=len, reverse=True)))

    def hide(text: str) -> str:
        if known:
            text = of_environment.sub(HIDDEN, text)
        text = _SECRET_IN_TEXT.sub(HIDDEN, text)
        return _NAMED.sub(_hide_named, text) if "=" in text or ":" in text else text

    return hide


def _hide_named(match: re.Match[str]) -> str:
    value = match["value"]
    bare = value.strip("\"'")
    if not bare or not is_secret_key(match["quoted"] or match["bare"]) or _INNOCENT_VALUES.fullmatch(bare):
        return match[0]
    mark = value[0] if value[0] in "\"'" else ""
    return f"{match[1]}{mark}{HIDDEN}{mark}"


def _without_paths(text: str) -> str:
    if text.lstrip().startswith(("{", "[")):
        try:
            return json.dumps(_walk(json.loads(text), _without_paths), ensure_ascii=False)
        except ValueError:
            pass  # no JSON, a template
    if _is_path(text):
        kind = PureWindowsPath if PureWindowsPath(text).drive else PurePosixPath
        return kind(text).name or HIDDEN
    text = _FILE_URL.sub(lambda match: PurePosixPath(match[0]).name, text)
    return _PATH_IN_TEXT.sub(lambda match: PurePosixPath(match[0]).name or HIDDEN, text)


def _is_path(text: str) -> bool:
    """Whether all of a text is a path. A sentence or a template with slashes in it is none."""
    if "\n" in text or "://" in text or any(mark in text for mark in "{}<>"):
        return False
    is_rooted = text.startswith(("/", "~", "./", "../")) or PureWindowsPath(text).is_absolute()
    return is_rooted or (" " not in text and looks_local(text))
