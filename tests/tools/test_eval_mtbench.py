"""MT-Bench in FastChat's formats: two turns through the chat template, resumption, and a judge that misbehaves."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from dpop_trainer.cli import main
from dpop_trainer.models.trained import load_trained
from dpop_trainer.tools.mtbench import answer as answer_module
from dpop_trainer.tools.mtbench.endpoint import Endpoint, EndpointError, JudgeError
from dpop_trainer.tools.mtbench.files import append_records, read_answers, read_questions
from dpop_trainer.tools.mtbench.judge import rating_of, run_judge
from dpop_trainer.tools.mtbench.prompts import FASTCHAT_NAMES, load_prompts

TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}<assistant> "
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell of a dog.", "Now of a cat."]},
    {"question_id": 111, "category": "math", "turns": ["1 + 1?", "2 + 2?"], "reference": ["It is 2.", "It is 4."]},
    {"question_id": 121, "category": "coding", "turns": ["Print x.", "Print y."]},
]


@pytest.fixture
def questions_file(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


# --- answers


@pytest.fixture
def answering(tiny_llama, questions_file, tmp_path):
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    return [
        *("mtbench", "answer", "--model", str(tiny_llama), "--questions", str(questions_file)),
        *(
            "--out",
            str(tmp_path / "out"),
            "--max_new_tokens",
            "12",
            "--chat_template",
            str(tmp_path / "template.jinja"),
        ),
        *("--device", "cpu", "--model_id", "tiny"),
    ]


def greedy(trained, text, num_tokens):
    ids = trained.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(num_tokens):
        ids.append(int(trained.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == trained.tokenizer.eos_token_id:
            break
    return trained.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@torch.no_grad()
def test_answers_are_fastchats_records_of_two_turns(answering, tiny_llama, tmp_path):
    assert main(answering) == 0
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["question_id"] for record in records] == [81, 111, 121]
    for record in records:
        assert set(record) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert record["model_id"] == "tiny"
        assert [set(choice) for choice in record["choices"]] == [{"index", "turns"}]
    # math is greedy: what an argmax loop of our own says, the first answer standing in the second prompt
    trained = load_trained(str(tiny_llama), device="cpu")
    first, second = records[1]["choices"][0]["turns"]
    assert first == greedy(trained, "<user> 1 + 1?\n<assistant> ", 12)
    assert second == greedy(trained, f"<user> 1 + 1?\n<assistant> {first}\n<user> 2 + 2?\n<assistant> ", 12)


def test_answering_goes_on_where_it_was_stopped(answering, tmp_path, monkeypatch, capsys):
    assert main(answering) == 0
    path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    # the greedy batch was never reached, and the last line was cut short by a kill
    path.write_text(json.dumps(whole[0]) + "\n" + json.dumps(whole[1])[:40])
    assert main(answering) == 0
    assert "3 questions, 1 answered before" in capsys.readouterr().out
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert again[0] == whole[0]
    assert [record["choices"] for record in again] == [record["choices"] for record in whole]
    monkeypatch.setattr(answer_module, "load_trained", None)
    assert main(answering) == 0  # nothing is left to do: no model is loaded
    assert main([*answering, "--num_choices", "2"]) == 1
    assert "different: num_choices" in capsys.readouterr().err


def test_sampled_answers_repeat_and_choices_differ(answering, tmp_path):
    runs = []
    for out in ("a", "b"):
        assert main([*answering, "--out", str(tmp_path / out), "--num_choices", "2"]) == 0
        runs.append(read_answers(tmp_path / out / "model_answer" / "tiny.jsonl"))
    first, second = runs
    assert [first[i]["choices"] for i in first] == [second[i]["choices"] for i in second]
    writing, math = first[81]["choices"], first[111]["choices"]
    assert writing[0]["turns"] != writing[1]["turns"]  # temperature 0.7
    assert math[0]["turns"] == math[1]["turns"]  # temperature 0


def test_a_conversation_that_fills_the_context_is_counted(answering, questions_file, tmp_path, capsys):
    question = {"question_id": 1, "category": "math", "turns": ["once upon a time " * 400, "and?"]}
    questions_file.write_text(json.dumps(question))
    assert main(answering) == 0
    assert "2 answers left empty" in capsys.readouterr().out
    answers = read_answers(tmp_path / "out" / "model_answer" / "tiny.jsonl")
    assert answers[1]["choices"][0]["turns"] == ["", ""]


def test_a_model_without_a_chat_template_is_refused_before_it_is_loaded(answering, monkeypatch, capsys):
    monkeypatch.setattr(answer_module, "load_trained", None)
    position = answering.index("--chat_template")
    assert main([*answering[:position], *answering[position + 2 :]]) == 1
    assert "expected a tokenizer with a chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": 1, "turns": []}', "line 1: turns: expected a list of texts"),
        ('{"turns": ["a"]}', "question_id: expected a number or a text, got none"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "1 repeated ids"),
        ("", "expected at least one question"),
        ("{", "line 1: expected a JSON object"),
    ],
)
def test_bad_questions_are_named(tmp_path, text, message):
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "question.jsonl")


def test_a_line_cut_short_is_replaced_not_continued(tmp_path):
    path = tmp_path / "model_answer" / "m.jsonl"
    answer = {"question_id": 1, "choices": [{"index": 0, "turns": ["a", "b"]}]}
    append_records(path, [answer])
    with path.open("a") as file:
        file.write('{"question_id": 2, "cho')
    append_records(path, [{**answer, "question_id": 3}])
    assert list(read_answers(path)) == [1, 3]


def test_any_text_survives_the_files(tmp_path):
    path = tmp_path / "model_answer" / "m.jsonl"
    # line separators of Unicode, half a surrogate pair as a careless server sends it, Chinese, right to left
    turns = ["a\u2028b\x85c\x0cd", "\ud800 骰子 مرحبا\n\r\n"]
    append_records(path, [{"question_id": 1, "choices": [{"index": 0, "turns": turns}]}])
    assert read_answers(path)[1]["choices"][0]["turns"] == turns
    (tmp_path / "question.jsonl").write_text('{"question_id": 1, "turns": ["a\u2028b"]}\n', encoding="utf-8")
    assert read_questions(tmp_path / "question.jsonl")[0].turns == ["a\u2028b"]


# --- grades


class Judge(ThreadingHTTPServer):
    """A judge on this machine: `behave(number of the request, its body)` -> (status, headers, body) or None to hang."""

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.released = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append({"path": self.path, "headers": dict(self.headers), **body})
            number = len(self.server.requests)
        reply = self.server.behave(number, body)
        if reply is None:
            self.server.released.wait(5)
            return
        status, headers, content = reply
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def start_judge():
    judges = []

    def start(behave):
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


def says(text):
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def answered(tmp_path):
    records = [
        {
            "question_id": question["question_id"],
            "answer_id": "x",
            "model_id": "m",
            "choices": [{"index": 0, "turns": [f"first answer to {question['question_id']}", "second answer"]}],
            "tstamp": 0.0,
        }
        for question in QUESTIONS
    ]
    append_records(tmp_path / "out" / "model_answer" / "m.jsonl", records)
    return tmp_path / "out"


def endpoint(judge, **kwargs):
    """One that does not wait between tries, but notes for how long it would have."""
    waits = []
    settings = {"timeout": 5.0, "max_attempts": 4, **kwargs}
    return Endpoint(url=judge.url, model="gpt-x", sleep=waits.append, **settings), waits


def judged(out, questions_file, judge, **kwargs):
    report = run_judge(
        questions=str(questions_file), out=str(out), models=None, endpoint=endpoint(judge, **kwargs)[0], workers=2
    )
    path = out / "model_judgment" / "gpt-x_single.jsonl"
    return report, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_grades_of_both_turns_by_category(answered, questions_file, start_judge):
    def behave(number, body):
        user = body["messages"][-1]["content"]
        return says(f"A [[3]] would be unjust.\nRating: [[{9 if 'Dog' in user or 'dog' in user else 4}]]")

    judge = start_judge(behave)
    report, records = judged(answered, questions_file, judge)
    assert report.failures == []
    assert len(records) == len(judge.requests) == 6
    scores = report.scores["models"]["m"]
    # writing 9 in both turns, math and coding 4
    assert scores["first_turn"]["value"] == scores["second_turn"]["value"] == pytest.approx((9 + 4 + 4) / 3)
    assert scores["first_turn"]["stderr"] == pytest.approx(np.std([9, 4, 4], ddof=1) / np.sqrt(3))
    assert scores["both"]["num_grades"] == 6
    assert {name: part["value"] for name, part in scores["categories"].items()} == {
        "writing": 9,
        "math": 4,
        "coding": 4,
    }
    assert all(
        set(record) >= {"question_id", "model", "judge", "user_prompt", "judgment", "score", "turn"}
        for record in records
    )
    by_key = {(record["question_id"], record["turn"]): record for record in records}
    # math has a reference; coding wants one and has none; the second turn is graded in sight of the first
    assert "It is 2." in by_key[111, 1]["user_prompt"]
    assert by_key[111, 2]["judge"] == ["gpt-x", "dpop-second-turn-reference"]
    assert by_key[121, 1]["judge"] == ["gpt-x", "dpop-first-turn"]
    for text in ("Tell of a dog.", "first answer to 81", "Now of a cat.", "second answer"):
        assert text in by_key[81, 2]["user_prompt"]
    assert {request["path"] for request in judge.requests} == {"/v1/chat/completions"}
    assert all("Authorization" not in request["headers"] for request in judge.requests)
    assert "| m | 5.67 ± 1.67 (3) |" in (answered / "scores_gpt-x.md").read_text()


def test_a_second_run_asks_nothing_and_a_changed_answer_is_graded_anew(answered, questions_file, start_judge):
    judge = start_judge(lambda number, body: says("[[7]]"))
    judged(answered, questions_file, judge)
    judged(answered, questions_file, judge)
    assert len(judge.requests) == 6
    changed = read_answers(answered / "model_answer" / "m.jsonl")[81]
    changed["choices"][0]["turns"][1] = "a better second answer"
    append_records(answered / "model_answer" / "m.jsonl", [changed])
    report, _ = judged(answered, questions_file, judge)
    assert len(judge.requests) == 7
    assert report.scores["models"]["m"]["both"]["num_grades"] == 6


def test_overload_is_waited_out(start_judge):
    replies = [(429, {"Retry-After": "7"}, b""), (500, {}, b"oops"), (503, {}, b""), says("[[5]]")]
    judge = start_judge(lambda number, body: replies[number - 1])
    asked, waits = endpoint(judge, first_wait=2.0)
    assert asked.chat([{"role": "user", "content": "?"}]) == "[[5]]"
    assert waits[0] == 7  # as the judge asks
    # the wait doubles with every try, within a quarter either way
    assert 4 * 0.75 <= waits[1] <= 4 * 1.25
    assert 8 * 0.75 <= waits[2] <= 8 * 1.25
    judge.requests.clear()
    judge.behave = lambda number, body: (500, {}, b"down")
    with pytest.raises(JudgeError, match=r"HTTP 500: down \(4 tries\)"):
        asked.chat([{"role": "user", "content": "?"}])
    assert len(judge.requests) == 4


def test_a_timeout_is_tried_again(start_judge):
    judge = start_judge(lambda number, body: None if number == 1 else says("[[6]]"))
    asked, waits = endpoint(judge, timeout=0.2)
    started = time.monotonic()
    assert asked.chat([{"role": "user", "content": "?"}]) == "[[6]]"
    assert len(waits) == 1
    assert time.monotonic() - started < 4


def test_refusals_and_nonsense_lose_nothing_and_are_asked_again(answered, questions_file, start_judge):
    def behave(number, body):
        user = body["messages"][-1]["content"]
        if "first answer to 81" in user and "Now of a cat." not in user:
            refusal = {"content": None, "refusal": "I cannot grade this."}
            return 200, {}, json.dumps({"choices": [{"message": refusal}]}).encode()
        if "Print y." in user:
            return says("Splendid! [[11]] of 10")
        if "2 + 2?" in user:
            return 200, {}, b"<html>not a completion</html>"
        return says("[[8]]")

    judge = start_judge(behave)
    report, records = judged(answered, questions_file, judge)
    reasons = sorted(report.failures)
    assert len(reasons) == 3
    assert "question 111, turn 2: NonsenseError: expected a chat completion" in reasons[0]
    assert "question 121, turn 2: no rating from 1 to 10 in 'Splendid!" in reasons[1]
    assert "question 81, turn 1: no rating from 1 to 10 in 'I cannot grade this.'" in reasons[2]
    # FastChat's mark for a judgment without a rating; means leave it out
    assert sorted(record["score"] for record in records) == [-1, -1, 8, 8, 8]
    assert report.scores["models"]["m"]["both"] == {"value": 8.0, "stderr": 0.0, "num_grades": 3}
    assert "3 of 6 judgments are missing" in (answered / "scores_gpt-x.md").read_text()
    before = len(judge.requests)
    judge.behave = lambda number, body: says("[[2]]")
    report, records = judged(answered, questions_file, judge)
    assert report.failures == []
    assert len(judge.requests) - before == 3
    assert sorted(record["score"] for record in records) == [2, 2, 2, 8, 8, 8]


def test_a_judge_that_dies_halfway_loses_no_grade(answered, questions_file, start_judge):
    judge = start_judge(lambda number, body: says("[[8]]") if number <= 4 else (401, {}, b"key revoked"))
    with pytest.raises(EndpointError, match=r"HTTP 401: key revoked. Check the key that --api_key_env names"):
        judged(answered, questions_file, judge)
    path = answered / "model_judgment" / "gpt-x_single.jsonl"
    assert len(path.read_text().splitlines()) == 4  # all that the judge replied, whoever was refused meanwhile
    judge.behave = lambda number, body: says("[[8]]")
    before = len(judge.requests)
    report, records = judged(answered, questions_file, judge)
    assert report.scores["models"]["m"]["both"]["num_grades"] == len(records) == 6
    assert len(judge.requests) - before == 2


def test_a_run_that_stops_does_not_wait_for_its_retries(answered, questions_file, start_judge):
    waiting = threading.Event()

    def behave(number, body):
        if number == 1:
            waiting.set()
            return 429, {"Retry-After": "100"}, b""
        waiting.wait(5)
        return 401, {}, b"key revoked"

    judge, started = start_judge(behave), time.monotonic()
    patient = Endpoint(url=judge.url, model="gpt-x", timeout=5.0)
    with pytest.raises(EndpointError, match="key revoked"):
        run_judge(questions=str(questions_file), out=str(answered), models=None, endpoint=patient, workers=2)
    assert time.monotonic() - started < 20
    assert len(judge.requests) == 2  # one that was to wait for 100 seconds, one that was refused


def test_an_endpoint_that_never_replies_is_given_up(answered, questions_file, start_judge):
    judge = start_judge(lambda number, body: (400, {}, b"unknown field"))
    with pytest.raises(EndpointError, match="the first 3 requests got none"):
        judged(answered, questions_file, judge)


def test_redirects_are_not_followed(start_judge):
    other = start_judge(lambda number, body: says("[[1]]"))
    judge = start_judge(lambda number, body: (307, {"Location": other.url + "/chat/completions"}, b""))
    with pytest.raises(EndpointError, match="give the final address"):
        endpoint(judge)[0].chat([{"role": "user", "content": "?"}])
    assert other.requests == []


def test_the_key_goes_to_the_endpoint_alone(answered, questions_file, start_judge, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    judge = start_judge(lambda number, body: says("[[3]]"))
    argv = ["mtbench", "judge", "--endpoint", judge.url, "--judge_model", "gpt-x", "--questions", str(questions_file)]
    argv += ["--out", str(answered), "--api_key_env", "JUDGE_KEY"]
    argv += ["--request_fields", '{"max_tokens": null, "max_completion_tokens": 9}']
    assert main(argv) == 0
    assert {request["headers"]["Authorization"] for request in judge.requests} == {"Bearer sk-secret"}
    assert all("max_tokens" not in request and request["max_completion_tokens"] == 9 for request in judge.requests)
    assert "3.00 ± 0.00 (3)" in capsys.readouterr().out
    assert not any("sk-secret" in file.read_text() for file in answered.rglob("*") if file.is_file())


def test_nothing_is_sent_without_an_endpoint(answered, questions_file, monkeypatch, capsys):
    monkeypatch.setattr(Endpoint, "_post", None)
    argv = ["mtbench", "judge", "--judge_model", "gpt-4", "--questions", str(questions_file), "--out", str(answered)]
    assert main(argv) == 2
    assert "--endpoint" in capsys.readouterr().err
    assert not (answered / "model_judgment").exists()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"url": "localhost:8000"}, "endpoint: expected a URL"),
        ({"url": "https://sk-1:x@host/v1"}, "expected a URL without a key"),
        ({"url": "http://host/v1", "api_key_env": "NO_SUCH_KEY"}, r"expected a key in \$NO_SUCH_KEY"),
        ({"url": "http://host/v1", "max_attempts": 0}, "expected at least 1 try"),
    ],
)
def test_bad_endpoints_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(model="gpt-x", **kwargs)


def test_missing_answers_are_named(tmp_path, questions_file, start_judge):
    judge = start_judge(lambda number, body: says("[[3]]"))
    with pytest.raises(ValueError, match=r"expected answers in .* found none"):
        judged(tmp_path / "empty", questions_file, judge)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("not [[2]] but [[ 8.5 ]]", 8.5),
        ("[[0]]", None),
        ("[[11]]", None),
        ("[7]", None),
        ("[[seven]]", None),
        ("", None),
    ],
)
def test_ratings_are_read_from_the_last_brackets(text, rating):
    assert rating_of(text) == rating


def test_fastchats_prompt_file_takes_the_place_of_ours(tmp_path, answered, questions_file, start_judge):
    template = {name: f"{name} Q={{question_1}} A={{answer_1}} R={{ref_answer_1}}" for name in FASTCHAT_NAMES[2:]}
    template |= {name: f"{name} Q={{question}} A={{answer}}" for name in FASTCHAT_NAMES[:2]}
    records = [
        {"name": name, "type": "single", "system_prompt": f"system {name}", "prompt_template": template[name]}
        for name in FASTCHAT_NAMES
    ]
    path = tmp_path / "judge_prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    judge = start_judge(lambda number, body: says("[[5]]"))
    run_judge(
        questions=str(questions_file),
        out=str(answered),
        models=["m"],
        endpoint=endpoint(judge)[0],
        prompt_file=str(path),
    )
    sent = {tuple(message["content"] for message in request["messages"]) for request in judge.requests}
    assert ("system single-math-v1", "single-math-v1 Q=1 + 1? A=first answer to 111") in sent
    assert ("system single-v1", "single-v1 Q=Tell of a dog. A=first answer to 81") in sent
    path.write_text(json.dumps(records[0]))
    with pytest.raises(ValueError, match="lacks"):
        load_prompts(str(path))
    records[0]["prompt_template"] = "{verdict}"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match="got 'verdict'"):
        load_prompts(str(path))
