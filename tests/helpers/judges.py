"""Judges on this machine, which reply to chat completions as a test wants: well, badly, or without an end."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dpop_trainer.tools.mtbench.endpoint import Endpoint

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell of a dog.", "Now of a cat."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "2 + 2?"], "reference": ["It is 2.", "It is 4."]},
    {"question_id": 121, "category": "coding", "turns": ["Print x.", "Print y."]},
]
"""MT-Bench's, of three kinds; one has reference answers."""


def write_questions(path: Path) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


class Judge(ThreadingHTTPServer):
    """A server. `behave(number of the request, its body)` gives (status, headers, body), None to stay silent, or a
    function that writes to the connection itself."""

    daemon_threads = True

    def __init__(self, behave: Callable[[int, dict[str, Any]], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.requests: list[dict[str, Any]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def write_until_released(self, write: Callable[[bytes], Any], part: bytes, pause: float = 0.0) -> None:
        """The same bytes again and again, until the other side has gone or the test is over."""
        while not self.released.wait(pause):
            write(part)


class _Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "headers": dict(self.headers), **body})
            number = len(self.server.requests)
        reply = self.server.behave(number, body)
        if reply is None:
            self.server.released.wait(5)
        elif callable(reply):
            with suppress(OSError):  # the other side has gone
                reply(self.wfile.write)
        else:
            status, headers, content = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def running_judges() -> Iterator[Callable[[Callable[[int, dict[str, Any]], Any]], Judge]]:
    """A function that starts one; all are stopped in the end."""
    judges = []

    def start(behave: Callable[[int, dict[str, Any]], Any]) -> Judge:
        judge = Judge(behave)
        thread = threading.Thread(target=judge.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        judges.append((judge, thread))
        return judge

    yield start
    for judge, thread in judges:
        judge.released.set()
        judge.shutdown()
        judge.server_close()
        thread.join()


def says(text: str) -> tuple[int, dict[str, str], bytes]:
    """A whole and friendly reply."""
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def endpoint_of(judge: Judge, **options: Any) -> tuple[Endpoint, list[float]]:
    """One that does not wait between tries, but notes for how long it would have."""
    waits: list[float] = []
    settings = {"timeout": 5.0, "max_attempts": 4, **options}
    return Endpoint(url=judge.url, model="gpt-x", sleep=waits.append, **settings), waits
