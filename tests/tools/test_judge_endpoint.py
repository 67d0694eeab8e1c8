"""A judge's endpoint: what is waited for, tried again, refused; and no server can hold, flood or expose the command."""

import time

import pytest
from dpop_trainer.tools.mtbench.endpoint import LONGEST_WAIT, Endpoint, EndpointError, JudgeError
from judges import endpoint_of, running_judges, says

QUESTION = [{"role": "user", "content": "?"}]


@pytest.fixture
def start_judge():
    with running_judges() as start:
        yield start


def test_overload_is_waited_out(start_judge):
    replies = [(429, {"Retry-After": "7"}, b""), (500, {}, b"oops"), (503, {}, b""), says("[[5]]")]
    judge = start_judge(lambda number, body: replies[number - 1])
    asked, waits = endpoint_of(judge, first_wait=2.0)
    assert asked.chat(QUESTION) == "[[5]]"
    assert waits[0] == 7  # as the judge asks
    # the wait doubles with every try, within a quarter either way
    assert 4 * 0.75 <= waits[1] <= 4 * 1.25
    assert 8 * 0.75 <= waits[2] <= 8 * 1.25
    judge.requests.clear()
    judge.behave = lambda number, body: (500, {}, b"down")
    with pytest.raises(JudgeError, match=r"HTTP 500: down \(4 tries\)"):
        asked.chat(QUESTION)
    assert len(judge.requests) == 4


def test_a_timeout_is_tried_again(start_judge):
    judge = start_judge(lambda number, body: None if number == 1 else says("[[6]]"))
    asked, waits = endpoint_of(judge, timeout=0.2)
    started = time.monotonic()
    assert asked.chat(QUESTION) == "[[6]]"
    assert len(waits) == 1
    assert time.monotonic() - started < 4


def test_redirects_are_not_followed(start_judge):
    other = start_judge(lambda number, body: says("[[1]]"))
    judge = start_judge(lambda number, body: (307, {"Location": other.url + "/chat/completions"}, b""))
    with pytest.raises(EndpointError, match="give the final address"):
        endpoint_of(judge)[0].chat(QUESTION)
    assert other.requests == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "localhost:8000"}, "endpoint: expected a URL"),
        *(
            ({"url": url}, "endpoint: expected a URL such as")
            for url in (
                "http://[::1/v1",
                "http://host:port/v1",
                "http://host:99999/v1",
                "http://host:-1/v1",
                "http://host:0/v1",
                "http://ho\x1bst/v1",
                "http://host/v1\n",
                "http://ho\udcffst/v1",
                "http:///v1",
                "file:///v1",
                "http://" + "a" * 70_000,
                "http://host/v1?a=1",
                "http://host/v1#a",
                "",
            )
        ),
        ({"url": "https://sk-1:x@host/v1"}, "expected a URL without a key"),
        ({"url": "http://host/v1", "api_key_env": "NO_SUCH_KEY"}, r"expected a key in \$NO_SUCH_KEY"),
        ({"url": "http://host/v1", "api_key_env": "sk-0a1"}, r"expected the name of an environment variable"),
        ({"url": "http://host/v1", "max_attempts": 0}, "expected at least 1 try"),
        *(
            ({"url": "http://host/v1", "max_reply_mib": size}, "max_reply_mib: expected more than 0 MiB")
            for size in (0.0, -1.0, float("nan"), float("inf"))
        ),
        *(
            ({"url": "http://host/v1", "timeout": timeout}, "more than 0 seconds")
            for timeout in (0.0, -1.0, float("nan"), float("inf"), 1e9)
        ),
    ],
)
def test_bad_endpoints_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(model="gpt-x", **kwargs)
    assert not any(key in str(caught.value) for key in ("sk-1", "sk-0a1", "a=1"))  # which may be a key


DRIPS = {
    "headers": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
    "body": (b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "provisional replies": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "an error's body": (b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000\r\n\r\n", b" "),
}


@pytest.mark.parametrize("what", DRIPS)
def test_the_deadline_is_for_the_whole_reply(start_judge, what):
    """A byte every hundredth of a second is no silence that a socket's timeout would end."""
    begin, part = DRIPS[what]

    def drip(write):
        write(begin)
        judge.write_until_released(write, part, pause=0.01)

    judge = start_judge(lambda number, body: drip)
    started = time.monotonic()
    with pytest.raises(JudgeError, match=r"no whole reply within 0\.3 seconds \(timeout\) \(2 tries\)"):
        endpoint_of(judge, timeout=0.3, max_attempts=2)[0].chat(QUESTION)
    assert 2 * 0.3 <= time.monotonic() - started < 5
    assert len(judge.requests) == 2


@pytest.mark.parametrize(
    ("status", "reason"), [("200 OK", r"at most 16 MiB \(max_reply_mib\), got more"), ("400 Bad", "HTTP 400: x{200}$")]
)
def test_a_reply_without_an_end_is_not_held(start_judge, status, reason):
    sent = []

    def flood(write):
        write(f"HTTP/1.1 {status}\r\n\r\n".encode())
        judge.write_until_released(lambda part: sent.append(write(part)), b"x" * 2**20)

    judge = start_judge(lambda number, body: flood)
    with pytest.raises(JudgeError, match=reason):
        endpoint_of(judge, max_attempts=1)[0].chat(QUESTION)
    # what was on its way when the reading stopped is in the buffers of two sockets, a few MiB each
    assert 16 * 2**20 < sum(sent) < 64 * 2**20


def test_a_reply_may_be_as_long_as_is_said(start_judge):
    content = says("x" * 2**20)
    judge = start_judge(lambda number, body: content)
    with pytest.raises(JudgeError, match=r"at most 0\.5 MiB \(max_reply_mib\), got more"):
        endpoint_of(judge, max_attempts=1, max_reply_mib=0.5)[0].chat(QUESTION)
    assert endpoint_of(judge, max_reply_mib=2.0)[0].chat(QUESTION) == "x" * 2**20


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("1000000000", LONGEST_WAIT, LONGEST_WAIT),
        ("9" * 400, LONGEST_WAIT, LONGEST_WAIT),  # beyond fp64
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT, LONGEST_WAIT),
        ("Mon, 01 Jan 1990 00:00:00 GMT", 0, 0),
        # what says nothing is as if it were not there: the first wait of 2 s, within a quarter
        ("-5", 1.5, 2.5),
        ("\xb2", 1.5, 2.5),  # a digit to Python, of which it makes no number
        ("soon", 1.5, 2.5),
    ],
)
def test_a_judge_cannot_ask_for_a_long_wait(start_judge, value, least, most):
    judge = start_judge(lambda number, body: (429, {"Retry-After": value}, b"") if number == 1 else says("[[5]]"))
    asked, waits = endpoint_of(judge, first_wait=2.0)
    asked.chat(QUESTION)
    assert least <= waits[0] <= most


@pytest.mark.parametrize("key", ["sk-secret\n", "sk-\r\nX-Other: 1", "sk secret", "sk-\u2028secret", "sk-\x7fsecret"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(start_judge, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    judge = start_judge(lambda number, body: says("[[5]]"))
    with pytest.raises(
        ValueError, match=r"api_key_env: expected a key of letters, digits and signs in \$JUDGE_KEY"
    ) as caught:
        endpoint_of(judge, api_key_env="JUDGE_KEY")
    assert "sk" not in str(caught.value)
    assert judge.requests == []


@pytest.mark.parametrize("status", [401, 200])
def test_a_key_that_the_judge_repeats_is_not_shown(start_judge, monkeypatch, status):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    judge = start_judge(lambda number, body: (status, {}, b"Incorrect API key provided: sk-secret."))
    with pytest.raises((EndpointError, JudgeError), match=r"Incorrect API key provided: <the key>\."):
        endpoint_of(judge, api_key_env="JUDGE_KEY")[0].chat(QUESTION)


def test_lists_within_lists_are_no_completion(start_judge):
    judge = start_judge(lambda number, body: (200, {}, b"[" * 100_000))
    with pytest.raises(JudgeError, match="NonsenseError: expected a chat completion"):
        endpoint_of(judge, max_attempts=1)[0].chat(QUESTION)
