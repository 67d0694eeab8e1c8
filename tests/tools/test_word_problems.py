"""The generated problems are right, distinct, repeatable and worded at random; their tokenizer loses nothing."""

import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest
from dpop_trainer.data.edits import EditRegions, edit_regions
from dpop_trainer.tools.demo import word_problems
from dpop_trainer.tools.demo.word_problems import (
    MAX_NUMBER,
    OPENERS,
    STATES,
    build_tokenizer,
    final_answer,
    generate,
)
from dpop_trainer.tools.pairs.metamath import corrupt_intermediate_result, format_completion
from transformers import AutoTokenizer

EQUATION = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
# what a reader takes from the questions' verbs; every other verb adds
LOSING = re.compile(r" (eats|gives|bakes|sells|lends|leaves|loses|drops|sets|cuts|throws) ")


@pytest.fixture(scope="module")
def problems():
    return generate(2000, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_answers_solve_their_questions(problems):
    for question, answer in problems:
        sentences = re.split(r"(?<=[.?]) ", question)
        total = int(re.search(r"\d+", sentences[0]).group())
        lines = answer.split("\n")
        assert len(lines) == len(sentences) - 1 in (3, 4)  # opening and asking against the final answer alone
        for sentence, line in zip(sentences[1:-1], lines[:-1], strict=True):
            b = int(re.search(r"\d+", sentence).group())
            losing = LOSING.search(sentence)
            result = total - b if losing else total + b
            assert EQUATION.search(line).groups() == (str(total), "-" if losing else "+", str(b), str(result))
            assert 1 <= result <= MAX_NUMBER
            total = result
        assert lines[-1] == f"#### {total}"
        assert final_answer(answer) == str(total)


def test_both_operations_occur(problems):
    symbols = Counter(EQUATION.search(line).group(2) for p in problems for line in p.answer.split("\n")[:-1])
    assert min(symbols.values()) > 0.4 * symbols.total()


def test_questions_are_distinct(problems):
    assert len({problem.question for problem in problems}) == len(problems)


def test_a_question_drawn_again_is_passed_over(problems, monkeypatch):
    first, second, third = problems[:3]
    draws = iter([first, second, first._replace(answer="worded otherwise"), third])
    monkeypatch.setattr(word_problems, "_draw_problem", lambda rng: next(draws))
    assert generate(3, seed=0) == [first, second, third]


def test_the_seed_decides_and_a_longer_list_begins_with_the_shorter(problems):
    assert generate(300, seed=3) == problems[:300]
    assert not {p.question for p in generate(300, seed=4)} & {p.question for p in problems}
    assert generate(0, seed=3) == []


def test_problems_and_vocabulary_do_not_depend_on_string_hashing(problems, tokenizer):
    code = (
        "from dpop_trainer.tools.demo.word_problems import build_tokenizer, generate\n"
        "print(repr(generate(20, seed=3)), build_tokenizer()(generate(1, seed=3)[0].answer)['input_ids'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == f"{problems[:20]!r} {tokenizer(problems[0].answer)['input_ids']}"


def test_a_negative_number_of_problems_is_refused():
    with pytest.raises(ValueError, match="num_problems: expected a number >= 0, got -1"):
        generate(-1, seed=0)


def test_wording_is_drawn_anew_in_every_line(problems):
    lines = [line for problem in problems for line in problem.answer.split("\n")[:-1]]
    for choices in (OPENERS, STATES):
        drawn = (next(choice for choice in choices if re.search(rf"\b{choice}\b", line)) for line in lines)
        counts = Counter(drawn)
        expected = len(lines) / len(choices)
        # uniform draws: each count is binomial, with a standard deviation below sqrt(expected)
        assert all(abs(counts[choice] - expected) < 5 * expected**0.5 for choice in choices)


def test_prompt_and_completion(problems):
    question, answer = problems[0]
    assert problems[0].prompt == f"Question: {question}\nAnswer:"
    assert problems[0].completion == f" {answer}"


def test_answers_have_the_intended_length(problems, tokenizer):
    lengths = [len(tokenizer(problem.completion)["input_ids"]) for problem in problems]
    assert min(lengths) >= 30
    assert max(lengths) <= 110
    assert 55 <= sum(lengths) / len(lengths) <= 70


def test_decoding_restores_the_text(problems, tokenizer):
    for problem in problems:
        for text in (problem.prompt, problem.completion, problem.question, problem.answer):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_prompt_and_completion_encode_alike_together_and_apart(problems, tokenizer):
    for problem in problems:
        apart = tokenizer(problem.prompt)["input_ids"] + tokenizer(problem.completion)["input_ids"]
        assert tokenizer(problem.prompt + problem.completion)["input_ids"] == apart


def test_encoding_adds_no_special_tokens(tokenizer):
    ids = tokenizer("Answer: 7 + 5 = 12")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["Answer", ":", " 7", " +", " 5", " =", " 12"]
    assert [tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token] == ["<pad>", "<bos>", "<eos>"]
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "Answer: 7 + 5 = 12"


def test_a_corrupted_result_is_one_known_token(problems, tokenizer):
    rng = random.Random(0)
    for problem in problems:
        corruption = corrupt_intermediate_result(problem.answer, rng)
        chosen, rejected = (
            tokenizer(format_completion(text))["input_ids"] for text in (problem.answer, corruption.rejected)
        )
        assert tokenizer.unk_token_id not in rejected
        position = chosen.index(tokenizer(f" {corruption.original}")["input_ids"][0])
        start, end = edit_regions(chosen, rejected)
        assert end == start + 1
        assert start >= position
        assert tokenizer.decode(rejected[start:end]) == f" {corruption.replacement}"


def test_the_tokenizer_survives_saving(problems, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = problems[0].prompt + problems[0].completion
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 + 5 = 12\n#### 12", "12"),
        ("#### 12\nThe answer is: 13", "12"),  # up to the end of its line
        ("#### 12 #### 13", "13"),  # the last word of that line
        ("a\n#### 1\n#### 2", "1"),  # the first of two
        ("####12", "12"),
        ("#### $1,450", "$1450"),
        ("#### about 3 apples  ", "apples"),
        ("#### ", None),
        ("####\n5", None),
        ("the answer is 12", None),
        ("", None),
    ],
)
def test_final_answer(text, expected):
    assert final_answer(text) == expected


def test_regions_of_a_known_pair(tokenizer):
    chosen = tokenizer(" Then 3 + 4 = 7, so")["input_ids"]
    rejected = tokenizer(" Then 3 + 4 = 9, so")["input_ids"]
    assert edit_regions(chosen, rejected) == EditRegions(5, 6)  # " Then" " 3" " +" " 4" " =" | " 7" | "," " so"
