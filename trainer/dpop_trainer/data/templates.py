"""What a chat template may raise, and what it may take for one record: it is a program that came with a model.

Jinja's sandbox bounds what a template reaches, and not how long it runs. The time is kept by a signal of the system's,
and so in a process's main thread alone, which is where data are tokenised, in one process or in several.
"""

import contextlib
import mmap
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from dpop_trainer.data.limits import RECORD, TEMPLATE_MEMORY, TEMPLATE_SECONDS, longest_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# what a template's expressions raise on a message of another shape than they were written for
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class TemplateLimitError(ValueError):
    """A template took more than it may."""


def render_within(render: Callable[[], str]) -> str:
    """What `render` gives.

    Raises:
        TemplateLimitError: it takes too long, too much memory, or gives too much text.
    """
    try:
        with _time_limit(), _memory_limit():
            text = render()
    except MemoryError:
        raise TemplateLimitError(f"it took more than {TEMPLATE_MEMORY.told()} of memory") from None
    longest = longest_text()
    if len(text) > longest:
        raise TemplateLimitError(f"it gave {len(text)} characters, of at most {longest} (four times {RECORD.name})")
    return text


def turn_opening(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """What the chat template writes on the line before a user's words, such as "<|im_start|>user"; None where there is
    no template, or one that writes nothing there."""
    if not tokenizer.chat_template:
        return None
    words = "Hello"
    turn = [{"role": "user", "content": words}]
    try:
        text = render_within(lambda: str(tokenizer.apply_chat_template(turn, tokenize=False)))
    except (TemplateLimitError, *TEMPLATE_ERRORS):
        return None  # one that takes no user's turn alone; of messages that it does not take, every record says so
    before = text.partition(words)[0].removeprefix(str(tokenizer.bos_token or ""))
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    return lines[-1] if lines else None


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0] > 0:
        yield
        return

    def stop(*_: object) -> None:
        raise TemplateLimitError(f"it did not end within {TEMPLATE_SECONDS.told()}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    used = _address_space()
    if resource is None or used is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceilings = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([used + int(TEMPLATE_MEMORY() * 2**30), *ceilings]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space() -> int | None:
    """Bytes; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[0]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return None
