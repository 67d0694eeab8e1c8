"""Each recipe makes the pairs that its docstring shows; matchers tell right from wrong as a person would."""

import json
import random

import pytest
from dpop_trainer.measure.matchers import matches_choice, matches_exactly, matches_number, regex_matcher
from dpop_trainer.tools.pairs.arc import NO_LABEL as NO_GOLD
from dpop_trainer.tools.pairs.arc import NO_WRONG_OPTION, Arc
from dpop_trainer.tools.pairs.edit import OPPOSITES, EditRule, code_places, corrupt, number_places, word_places
from dpop_trainer.tools.pairs.from_samples import ALL_RIGHT, NO_ANSWER, NO_LABEL, FromSamples
from dpop_trainer.tools.pairs.hellaswag import HellaSwag, clean
from dpop_trainer.tools.pairs.metamath import MetaMath
from dpop_trainer.tools.pairs.recipe import Edit, SkippedRecord, edit_between

ARC = {
    "id": "q1",
    "question": "Which was developed most recently?",
    "choices": {"text": ["telephone", "television", "telephone", "radio"], "label": ["1", "2", "3", "4"]},
    "answerKey": "2",
}
SWAG = {
    "activity_label": "Baking",
    "ctx_a": "How to bake a pie [title] Heat the oven.",
    "ctx_b": "she",
    "endings": ["eats [step] it .", "sells the  oven.", "runs."],
    "label": "1",
}


def spans(places):
    return [(place.start, place.end, place.replacements) for place in places]


@pytest.mark.parametrize(
    ("chosen", "rejected", "edit"),
    [
        ("a 12 b", "a 17 b", Edit("2", "7", 3, 4)),
        ("77", "777", Edit("", "7", 2, 2)),  # prefix first: nothing of the chosen answer is replaced
        ("777", "77", Edit("7", "", 2, 3)),
        ("abc", "xyz", Edit("abc", "xyz", 0, 3)),
        ("yes", "", Edit("yes", "", 0, 3)),
    ],
)
def test_edit_between(chosen, rejected, edit):
    assert edit_between(chosen, rejected) == edit
    assert chosen[: edit.start] + edit.replacement + chosen[edit.end :] == rejected


def test_metamath_record():
    record = {"question": "How many?", "answer": "1+1 = <<1+1=2>>2. 2+2 = <<2+2=4>>4.\n#### 4"}
    (pair,) = MetaMath().build(record, seed=0)
    assert pair.prompt == "How many?"
    assert pair.chosen == "1+1 = 2. 2+2 = 4.\n#### 4"
    assert (pair.edit.original, pair.edit.start, pair.edit.end) == ("2", 6, 7)
    assert pair.rejected == f"1+1 = {pair.edit.replacement}. 2+2 = 4.\n#### 4"


def test_arc_holds_the_right_option_against_each_other_one():
    pairs = Arc().build(ARC, seed=0)
    # "telephone" stands there twice and makes one pair
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("television", "telephone"), ("television", "radio")]
    assert pairs[0].edit == Edit("vision", "phone", 4, 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answerKey": "B"}, r"answerKey: expected exactly one of choices.label \['1', '2', '3', '4'\], got 'B'"),
        ({"choices": {"text": ["a"], "label": ["1", "2"]}}, "choices: expected .* of equal lengths"),
        ({"choices": None}, "choices: expected .* got None"),
        ({"choices": {"text": ["a", ""], "label": ["1", "2"]}}, "choices: expected"),
        ({"question": " "}, "question: expected a non-empty string, got ' '"),
    ],
)
def test_arc_names_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        Arc().build({**ARC, **change}, seed=0)


def test_arc_without_another_option_is_skipped():
    with pytest.raises(SkippedRecord, match=NO_WRONG_OPTION):
        Arc().build({**ARC, "choices": {"text": ["a", "a"], "label": ["1", "2"]}}, seed=0)


def test_hellaswag_of_the_hub():
    first, second = HellaSwag().build(SWAG, seed=0)
    assert first.prompt == "Baking: How to bake a pie. Heat the oven. She"
    assert (first.chosen, first.rejected) == ("sells the oven.", "eats. it .")
    assert second.rejected == "runs."


def test_hellaswag_prepared():
    record = {"ind": 3, "query": "Tango: They [sic]", "choices": ["dance.", "sleep."], "gold": 0}
    (pair,) = HellaSwag().build(record, seed=0)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("Tango: They [sic]", "dance.", "sleep.")  # left as it is


@pytest.mark.parametrize("query", ["What flies?", "Question: What flies?\nAnswer:"])
def test_arc_prepared(query):
    """The frame that an evaluation has put around the question is not put there twice."""
    (pair,) = Arc().build({"query": query, "choices": ["a stone", "a bird"], "gold": "1"}, seed=0)
    assert (pair.prompt, pair.chosen, pair.rejected) == ("What flies?", "a bird", "a stone")
    with pytest.raises(ValueError, match="gold: expected the index of one of 1 choices, got 1"):
        Arc().build({"query": query, "choices": ["a stone"], "gold": 1}, seed=0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wash it [title] Dry it. [step] Use [substeps] air", "Wash it. Dry it. Use. air"),
        (" a  b [header] c ", "a b c"),
        ("a [unclosed", "a [unclosed"),
    ],
)
def test_wikihow_marks(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize("label", ["3", -1, "x", None, True, 1.0])
def test_hellaswag_label_outside_is_named(label):
    with pytest.raises(ValueError, match="label: expected the index of one of 3 endings"):
        HellaSwag().build({**SWAG, "label": label}, seed=0)


def test_hellaswag_test_split_has_no_labels():
    with pytest.raises(SkippedRecord, match=NO_GOLD):
        HellaSwag().build({**SWAG, "label": ""}, seed=0)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("48/2 = 24 clips", ["48", "2", "24"]),
        ("$1,250.50 and 3.5%", ["1,250.50", "3.5"]),
        ("x1, 3rd, v1.2.3 and 7.", ["7"]),
        ("٤٢ and 0", ["٤٢", "0"]),
        ("none", []),
    ],
)
def test_number_rule(text, numbers):
    places = list(number_places(text, random.Random(0)))
    assert [text[place.start : place.end] for place in places] == numbers
    for place in places:
        (replacement,) = place.replacements
        assert replacement != text[place.start : place.end]
        assert len(replacement) == place.end - place.start


def test_word_rule_keeps_the_case():
    text = "Before that the price INCREASED, before; afterwards nothing."
    assert spans(word_places(text, random.Random(0))) == [
        (0, 6, ["After"]),
        (22, 31, ["DECREASED"]),
        (33, 39, ["after"]),
    ]


def test_opposites_are_never_themselves():
    assert all(word != opposite and word == word.lower() for word, opposite in OPPOSITES.items())
    assert OPPOSITES["increase"] == "decrease"
    assert OPPOSITES["decrease"] == "increase"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("while i < n:", [("<", ["<="])]),
        ("if a <= 10 and b:", [("<=", ["<"]), ("10", ["11", "9"]), ("and", ["or"])]),
        ("x = a - b  # a + b < 3", [("-", ["+"])]),  # nothing inside the comment
        ('print("1 < 2")', []),  # nor inside a string
        ("return True", [("True", ["False"])]),
        ("def f(a) -> int: ...", []),  # an arrow is no comparison
        ("x += 0", [("0", ["1"])]),  # no negative bound from 0
        ("a << 2", [("2", ["3", "1"])]),
    ],
)
def test_code_rule(code, found):
    assert [(code[p.start : p.end], p.replacements) for p in code_places(code, random.Random(0))] == found


def test_code_rule_stays_inside_fences():
    text = "It is 5 < 6.\n```python\nif x > 1:\n```\nSo 3 < 4."
    assert [text[p.start : p.end] for p in code_places(text, random.Random(0))] == [">", "1"]


@pytest.mark.parametrize(
    ("text", "rule", "found", "spared"),
    [
        ("[asy] draw((0, 0)--(3, 4)); [/asy] So 5.", "number", ["5"], ("drawing code",)),
        ("[asy] draw((0, 0)); never closed 5", "number", [], ("drawing code",)),
        ("\\begin{tikzpicture} 1 \\end{tikzpicture} 2", "number", ["2"], ("drawing code",)),
        ("```\nx = 1\n```\nso 2", "number", ["2"], ("code fences",)),
        ("```\nx = 1\n```\nso 2", "code", ["1"], ()),
        ("48/2 = <<48/2=24>>24", "number", ["48", "2", "24"], ("calculator marks",)),
        ("see https://a.org/on?page=2 or 3", "number", ["3"], ("URLs",)),
        ("see https://a.org/on?page=2 or 3", "word", ["or"], ("URLs",)),
        ("on 2024-03-15, 7 came", "number", ["7"], ("dates",)),
        ("on 3/15/2024 and 15.3.2024, 7 came", "number", ["7"], ("dates",)),
        ("from March 15, 2024 to 2nd of May; in June 2025 7", "number", ["7"], ("dates",)),
        ("15/3 = 5, 2000-12 = 1988", "number", ["15", "3", "5", "2000", "12", "1988"], ()),  # no dates
        ("May I take 3?", "number", ["3"], ()),
    ],
)
def test_protected_spans(text, rule, found, spared):
    """Over many draws, exactly the places outside of them are edited."""
    edits = [corrupt(text, rule, random.Random(seed)) for seed in range(100)]
    assert {kinds for _, kinds in edits} == {spared}
    drawn = {(edit.start, edit.original) for edit, _ in edits if edit is not None}
    # six places at most, 100 draws: one of them is never met with probability 6 * (5/6)**100 = 7e-8
    assert [original for _, original in sorted(drawn)] == found


def test_results_in_drawing_code_are_left_alone():
    record = {"question": "Area?", "answer": "[asy] pair A = 12; [/asy] 3*4 = 12, so 12+1 = 13.\n#### 13"}
    pairs = [pair for seed in range(20) for pair in MetaMath().build(record, seed)]
    assert {pair.edit.start for pair in pairs} == {record["answer"].index("12, so")}
    assert {pair.spared for pair in pairs} == {("drawing code",)}


def test_edit_recipe():
    record = {"prompt": "Q:", "chosen": "no numbers but 7"}
    (pair,) = EditRule().build(record, seed=0)
    assert (pair.prompt, pair.chosen) == ("Q:", "no numbers but 7")
    assert (pair.edit.original, pair.edit.start, pair.edit.end) == ("7", 15, 16)
    assert pair.rejected == f"no numbers but {pair.edit.replacement}"
    with pytest.raises(SkippedRecord, match="'code'"):
        EditRule(rule="code").build({"prompt": "Q:", "chosen": "nothing"}, seed=0)
    with pytest.raises(ValueError, match="rule: expected one of number, word, code, got 'line'"):
        EditRule(rule="line")


def test_every_place_is_drawn():
    # two places, 60 draws: one of them is never met with probability 2**-59
    edits = {corrupt("1 and 2", "number", random.Random(i))[0].start for i in range(60)}
    assert edits == {0, 6}


@pytest.mark.parametrize(
    ("sample", "label", "verdict"),
    [
        ("so 2+2 = 4\n#### 4", "#### 4", True),
        ("The answer is: $1,250.00.", "#### 1250", True),
        ("the answer is 7. Or rather, the answer is -7", "7", False),
        ("\\boxed{ -7 }", "-7", True),
        ("I get 4", "#### 4", None),  # announces nothing: cut off, perhaps
        ("#### none", "#### 4", None),
        ("#### .5", "0.50", True),
        ("#### 5", "he has 3, so 5", True),  # a label without mark: its last number
        ("A: 18", "#### 18", True),
        ("So it is 9 each.\n**A:** 17", "#### 18", False),
        ("A: 18\nB: 20", "#### 18", None),  # the first of several, not an announcement
        ("#### 5600", "#### 5,600", True),
    ],
)
def test_numeric_matcher(sample, label, verdict):
    assert matches_number(sample, label) is verdict


@pytest.mark.parametrize(
    ("sample", "label", "verdict"),
    [
        ("The answer is (B).", "B", True),
        ("B) television", "B", True),
        ("B", "C", False),
        ("A dog is an animal. The answer is C", "C", True),
        ("A dog is an animal", "A", None),  # an article is no option
        ("", "A", None),
    ],
)
def test_choice_matcher(sample, label, verdict):
    assert matches_choice(sample, label) is verdict


def test_exact_and_regex_matchers():
    assert matches_exactly(" a  b\n", "a b") is True
    assert matches_exactly("a c", "a b") is False
    assert matches_exactly("  ", "a b") is None
    matches = regex_matcher(r"<ans>(.*?)</ans>")
    assert matches("<ans>x</ans> <ans> y</ans>", "y") is True
    assert matches("<ans>x</ans>", "<ans>y</ans>") is False
    assert matches("x", "x") is None
    assert regex_matcher(r"\d+")("a 12 b 13", "13") is True
    assert matches_exactly("5600 clips", "5,600 clips") is True
    assert matches_exactly("1,2,345", "12345") is False  # no thousands
    assert regex_matcher(r"so (\S+)")("so 5,600", "5600") is True
    with pytest.raises(ValueError, match="answer_regex: expected a regular expression"):
        regex_matcher("(")


def test_labels_without_an_answer_are_named():
    with pytest.raises(ValueError, match=r"label: expected a number behind .*, got 'none'"):
        matches_number("#### 1", "none")
    with pytest.raises(ValueError, match="label: expected an option"):
        matches_choice("B", "the second")


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    records = [
        {"question": "How many?", "answer": "1+1 = <<1+1=2>>2\n#### 2"},
        {"question": "Who?", "answer": "#### 3", "n": 8},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_from_samples(labels):
    recipe = FromSamples(labels=str(labels), max_per_record=2)
    samples = ["#### 2", "#### 5", " #### 5 ", "no end", "#### 7", "#### 9"]
    pairs = recipe.build({"question": "How many?", "samples": samples}, seed=0)
    # right ones, unfinished ones and repetitions are left out; two at most
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("1+1 = 2\n#### 2", "#### 5"),
        ("1+1 = 2\n#### 2", "#### 7"),
    ]
    assert pairs[0].prompt == "How many?"
    (pair,) = recipe.build({"question": " Who? ", "sample": "#### 4"}, seed=0)
    assert (pair.chosen, pair.rejected) == ("#### 3", "#### 4")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "How many?", "sample": "#### 2"}, ALL_RIGHT),
        ({"question": "How many?", "sample": "2"}, NO_ANSWER),
        ({"question": "Which?", "sample": "#### 2"}, NO_LABEL),
    ],
)
def test_samples_that_make_no_pair(labels, record, reason):
    with pytest.raises(SkippedRecord, match=reason):
        FromSamples(labels=str(labels)).build(record, seed=0)


def test_bad_samples_and_labels_are_named(labels):
    with pytest.raises(ValueError, match="sample: expected a text or a list of texts, got 3"):
        FromSamples(labels=str(labels)).build({"question": "Who?", "sample": 3}, seed=0)
    with pytest.raises(ValueError, match="labels: expected a file of labelled records, got none"):
        FromSamples()
    with pytest.raises(ValueError, match="answer_regex: expected a pattern with matcher 'regex'"):
        FromSamples(labels="x", matcher="regex")
    labels.write_text(labels.read_text() + '{"question": "Who?", "answer": "#### 4"}\n')
    with pytest.raises(ValueError, match=r"labels.jsonl, line 3: question: expected one answer per key, got a second"):
        FromSamples(labels=str(labels)).build({"question": "Who?", "sample": "#### 1"}, seed=0)


def test_whole_files_of_arc_and_hellaswag(shared_data):
    for name in ("ARC-Challenge", "ARC-Easy"):
        path = shared_data / "arc" / f"{name}_validation.jsonl"
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            pairs = Arc().build(record, seed=0)
            right = dict(zip(record["choices"]["label"], record["choices"]["text"], strict=True))[record["answerKey"]]
            assert {pair.chosen for pair in pairs} == {right}
            assert sorted(pair.rejected for pair in pairs) == sorted({*record["choices"]["text"]} - {right})
    path = shared_data / "hellaswag" / "hellaswag_val_1000.jsonl"
    pairs = [HellaSwag().build(json.loads(line), 0) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(pairs) == 1000
    assert sum(map(len, pairs)) == 3000
