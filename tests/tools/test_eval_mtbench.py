"""MT-Bench's answers in FastChat's formats: two turns through the chat template, resumption, any text."""

import json

import pytest
import torch
from dpop_trainer.cli import main
from dpop_trainer.models.trained import load_trained
from dpop_trainer.tools.mtbench import answer as answer_module
from dpop_trainer.tools.mtbench.files import append_records, read_answers, read_questions
from judges import write_questions

TEMPLATE = "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}<assistant> "


ODD = ["null", "true", "1.5", "[1]", '{"a": 1}']
NO_TEXTS = ["null", "1", '"a"', "{}", "[1]", '[["a"]]', '["a", null]']
GOOD = '{"turns": ["a"]}'


@pytest.fixture
def questions_file(tmp_path):
    return write_questions(tmp_path / "question.jsonl")


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
        ('{"turns": ["a"]}', "question_id: expected a whole number or a text, got none"),
        *(
            (f'{{"question_id": {odd}, "turns": ["a"]}}', "question_id: expected a whole number or a text")
            for odd in ODD
        ),
        *((f'{{"question_id": 1, "turns": {odd}}}', "line 1: turns: expected a list of texts") for odd in NO_TEXTS),
        *(
            (f'{{"question_id": 1, "turns": ["a"], "reference": {odd}}}', "reference: expected a list of texts, one")
            for odd in NO_TEXTS
            if odd != "null"
        ),
        ('{"question_id": 1, "turns": ["a"], "category": ["math"]}', "category: expected a text, got"),
        ('{"question_id": 1, "turns": ["\\ud800"]}', "turns: expected a list of texts"),
        ('{"question_id": 1, "turns": ["a"]}\n{"question_id": 1, "turns": ["b"]}', "1 repeated ids"),
        ("", "expected at least one question"),
        ("{", "line 1: expected a JSON object"),
    ],
)
def test_bad_questions_are_named(tmp_path, text, message):
    (tmp_path / "question.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "question.jsonl")


@pytest.mark.parametrize(
    "choices", ['"ab"', "{}", "[]", "[1]", '[{"turns": "ab"}]', '[{"turns": [1]}]', '[{"turns": null}]', "null"]
)
def test_answers_of_another_shape_are_named(tmp_path, choices):
    path = tmp_path / "m.jsonl"
    for record in (f'{{"question_id": 1, "choices": {choices}}}', f'{{"question_id": {choices}, "choices": [{GOOD}]}}'):
        path.write_text(record + "\n" + record + "\n")  # of which the last may have been cut short
        if choices == '"ab"' and GOOD in record:
            assert list(read_answers(path)) == ["ab"]
            continue
        with pytest.raises(ValueError, match=r"m\.jsonl, line 1: expected an answer with question_id and choices"):
            read_answers(path)


def test_a_name_or_a_count_that_cannot_be_is_refused_before_the_model(answering, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answer_module, "load_trained", None)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff{{ messages }}")
    for flag, value, message in (
        ("--model_id", "..", "model_id: expected the name of a file, got '..'"),
        ("--model_id", "a/b", "model_id: expected the name of a file, got 'a/b'"),
        ("--limit", "-1", "limit: expected at least 1 question, got -1"),
        ("--num_choices", "0", "num_choices, batch_size: expected at least 1"),
        ("--chat_template", str(tmp_path / "bytes.jinja"), "chat_template: expected a Jinja file in UTF-8, got"),
    ):
        assert main([*answering, flag, value]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[7].content + 1 }}", "conversation of 1 turns, got its err"),
        ("", "conversation, got nothing of it"),
    ],
)
def test_a_template_that_renders_nothing_is_named(answering, tmp_path, template, message, capsys):
    (tmp_path / "template.jinja").write_text(template)
    assert main(answering) == 1
    assert f"chat_template: expected one that renders a {message}" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path):
    (tmp_path / "question.jsonl").write_bytes(b'{"question_id": 1, "turns": ["a"]}\n{"turns": ["\xff"]}\n')
    with pytest.raises(ValueError, match=r"question\.jsonl, line 2: expected a JSON object, got .*utf-8"):
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
