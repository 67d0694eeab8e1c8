"""A model's own mistakes become pairs that are right, or none: small files of shapes in which such data is published.

The shape of OpenAI's solutions to GSM8K: a question, its ground truth, and for each model {solution, is_correct}, all
written with calculator marks.
"""

import json

import pytest
from dpop_trainer.cli import main
from dpop_trainer.tools.pairs.from_samples import LABEL_WITHOUT_ANSWER, NO_ANSWER, SAME_AS_LABEL, FromSamples
from dpop_trainer.tools.pairs.recipe import SkippedRecord, field_value


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def solutions(count):
    """Question i has the answer 2i; the small model is right of every third, and says 2i + 1 of the others."""
    records = []
    for i in range(count):
        said = 2 * i if i % 3 == 0 else 2 * i + 1
        records.append(
            {
                "question": f"Twice {i}?",
                "ground_truth": f"It is 2*{i} = <<2*{i}={2 * i}>>{2 * i}.\n#### {2 * i}",
                "small": {
                    "solution": f"That makes 2*{i} = <<2*{i}={said}>>{said}.\r\n#### {said}",
                    "is_correct": i % 3 == 0,
                },
            }
        )
    return records


def build(tmp_path, records, *options):
    source = write(tmp_path / "solutions.jsonl", records)
    argv = ["pairs", "build", "from-samples", "--source", source, "--labels", source, "--answer_field", "ground_truth"]
    return main([*argv, "--sample_field", "small.solution", "--out", str(tmp_path / "out.jsonl"), *options])


@pytest.mark.parametrize("options", [(), ("--correct_field", "small.is_correct")])
def test_both_sides_are_written_alike(tmp_path, capsys, options):
    """By the matcher and by the file's own word the same pairs, without marks or \\r on either side."""
    assert build(tmp_path, solutions(9), *options) == 0
    assert "6 pairs built; 3 skipped: every sample of the record is right" in capsys.readouterr().out
    pairs = read(tmp_path / "out.jsonl")
    wrong = [i for i in range(9) if i % 3]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (f" It is 2*{i} = {2 * i}.\n#### {2 * i}", f" That makes 2*{i} = {2 * i + 1}.\n#### {2 * i + 1}") for i in wrong
    ]


def test_a_pattern_that_matches_few_labels_is_refused(tmp_path, capsys):
    """Else a whole label stands for itself, no sample equals it, and right samples are rejected answers."""
    assert build(tmp_path, solutions(9), "--matcher", "regex", "--answer_regex", r"A: (\d+)") == 1
    told = capsys.readouterr().err
    assert "answer_regex: expected a match of 'A: (\\\\d+)' in the labels, got one in 0 of 9 labels" in told
    assert "one without ends 'It is 2*0 = 0.\\n#### 0'" in told
    assert not (tmp_path / "out.jsonl").exists()
    assert build(tmp_path, solutions(9), "--matcher", "regex", "--answer_regex", r"#### (\d+)") == 0
    assert "6 pairs built" in capsys.readouterr().out


def test_bare_labels_need_not_match_the_pattern(tmp_path):
    records = [{"question": "Twice 3?", "answer": "2*3 = 6", "final": "6"}]
    recipe = FromSamples(
        labels=write(tmp_path / "labels.jsonl", records), label_field="final", matcher="regex", answer_regex=r"A: (\S+)"
    )
    (pair,) = recipe.build({"question": "Twice 3?", "samples": ["A: 6", "A: 5"]}, seed=0)
    assert (pair.chosen, pair.rejected) == ("2*3 = 6", "A: 5")


def test_a_label_that_the_matcher_does_not_read_makes_no_pair_and_is_shown(tmp_path, capsys):
    records = solutions(9)
    records[4]["ground_truth"] = "It is eight."
    assert build(tmp_path, records) == 0
    out = capsys.readouterr().out
    assert f"5 pairs built; 3 skipped: every sample of the record is right; 1 skipped: {LABEL_WITHOUT_ANSWER}" in out
    assert f"{LABEL_WITHOUT_ANSWER}, as {tmp_path / 'solutions.jsonl'}, line 5: the label ends 'It is eight.'" in out


def test_what_is_skipped_is_shown_with_the_remedy(tmp_path):
    labels = write(tmp_path / "labels.jsonl", [{"question": "Twice 3?", "answer": "#### 6"}])
    with pytest.raises(SkippedRecord, match=NO_ANSWER) as caught:
        FromSamples(labels=labels).build({"question": "Twice 3?", "samples": ["#### 6", "I say 7"]}, seed=0)
    assert caught.value.example == "a sample ends 'I say 7'"
    assert caught.value.remedy.startswith('--matcher numeric looks for a number behind "####"')
    recipe = FromSamples(labels=labels, correct_field="ok")
    with pytest.raises(SkippedRecord, match=SAME_AS_LABEL):
        recipe.build({"question": "Twice 3?", "sample": " #### 6", "ok": False}, seed=0)


def test_the_file_s_own_word_is_read_as_it_stands(tmp_path):
    labels = write(tmp_path / "labels.jsonl", [{"question": "Twice 3?", "answer": "six"}])
    recipe = FromSamples(labels=labels, correct_field="ok")
    # no final answer is asked for; null is not known; a text that is right once is right
    samples = {"question": "Twice 3?", "samples": ["five", "half a dozen", "?", "seven", "seven "]}
    pairs = recipe.build({**samples, "ok": [False, True, None, 0, 1]}, seed=0)
    assert [pair.rejected for pair in pairs] == ["five"]
    for wrong in ([True], "yes", 2, None):
        with pytest.raises(ValueError, match="ok: expected true or false for each of 5 samples"):
            recipe.build({**samples, "ok": wrong}, seed=0)
    with pytest.raises(ValueError, match="correct_field: expected no --answer_regex and no --label_field beside it"):
        FromSamples(labels=labels, correct_field="ok", label_field="answer")


def test_a_path_is_a_field_of_that_name_first():
    record = {"a.b": 1, "a": {"b": 2, "c.d": 3, "e": {"f": None}}}
    assert [field_value(record, name) for name in ("a.b", "a.c.d", "a.e.f", "a.x", "x", "a.b.c")] == [
        1,
        3,
        None,
        None,
        None,
        None,
    ]
