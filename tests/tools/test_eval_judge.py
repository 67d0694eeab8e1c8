"""MT-Bench graded by a judge that misbehaves: judgments are kept as they come, and asked for again where missing."""

import json
import threading
import time

import numpy as np
import pytest
from dpop_trainer.cli import main
from dpop_trainer.tools.mtbench.endpoint import Endpoint, EndpointError
from dpop_trainer.tools.mtbench.files import append_records, read_answers
from dpop_trainer.tools.mtbench.judge import rating_of, run_judge, scores_as_text
from dpop_trainer.tools.mtbench.prompts import FASTCHAT_NAMES, load_prompts
from judges import QUESTIONS, endpoint_of, running_judges, says, write_questions


@pytest.fixture
def questions_file(tmp_path):
    return write_questions(tmp_path / "question.jsonl")


@pytest.fixture
def start_judge():
    with running_judges() as start:
        yield start


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


def judged(out, questions_file, judge, **kwargs):
    report = run_judge(
        questions=str(questions_file), out=str(out), models=None, endpoint=endpoint_of(judge, **kwargs)[0], workers=2
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
    title, _, titles, row, _, legend = scores_as_text(report.scores).split("\n")
    assert title == "MT-Bench, judged by gpt-x"
    assert titles.split() == ["model", "first", "turn", "second", "turn", "both", "coding", "math", "writing"]
    assert row.startswith("m      5.67 ± 1.67 (3)  5.67 ± 1.67 (3)")  # under "model" and its neighbours
    assert legend.startswith("Mean grade from 1 to 10")


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


def test_missing_answers_are_named(tmp_path, questions_file, start_judge):
    judge = start_judge(lambda number, body: says("[[3]]"))
    with pytest.raises(ValueError, match=r"expected answers in .* found none"):
        judged(tmp_path / "empty", questions_file, judge)


JUDGMENT = {
    "question_id": 81,
    "model": "m",
    "judge": ["gpt-x", "single-v1"],
    "user_prompt": "?",
    "judgment": "[[5]]",
    "score": 5,
    "turn": 1,
}


@pytest.mark.parametrize(
    "change",
    [
        {"question_id": [81]},
        {"question_id": None},
        {"model": 3},
        {"judge": "gpt-x"},
        {"judge": ["gpt-x"]},
        {"judge": ["gpt-x", "single-v1", "more"]},
        {"judge": {"a": 1, "b": 2}},
        {"user_prompt": None},
        {"score": "5"},
        {"score": None},
        {"score": True},
        {"score": 11},
        {"score": float("nan")},
        {"turn": 3},
        {"turn": "1"},
    ],
    ids=str,
)
def test_judgments_of_another_shape_are_named(answered, questions_file, start_judge, change):
    path = answered / "model_judgment" / "gpt-x_single.jsonl"
    append_records(path, [{**JUDGMENT, **change}, JUDGMENT])
    judge = start_judge(lambda number, body: says("[[3]]"))
    with pytest.raises(ValueError, match=r"gpt-x_single\.jsonl, line 1: expected a judgment with model, question_id"):
        judged(answered, questions_file, judge)
    assert judge.requests == []


def test_less_than_one_worker_is_none(answered, questions_file, start_judge):
    judge = start_judge(lambda number, body: says("[[3]]"))
    with pytest.raises(ValueError, match="workers: expected at least 1 request at a time, got 0"):
        run_judge(
            questions=str(questions_file), out=str(answered), models=None, endpoint=endpoint_of(judge)[0], workers=0
        )


@pytest.mark.parametrize(
    "template", ["{verdict}", "{question.__class__}", "{question:99999999999}", "{question!r}", "{}", "{0}", "{", "", 3]
)
def test_a_prompt_that_says_more_than_its_fields_is_refused(tmp_path, template):
    path = tmp_path / "judge_prompts.jsonl"
    records = [{"name": name, "system_prompt": "", "prompt_template": template} for name in FASTCHAT_NAMES]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(ValueError, match=r"prompt_file: expected (fields among|texts in) .*'single-v1' (of|in) judge"):
        load_prompts(str(path))


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
        endpoint=endpoint_of(judge)[0],
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
