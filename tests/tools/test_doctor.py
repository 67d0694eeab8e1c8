"""Measures of pairs by hand, and each finding on a file that has exactly that trouble."""

import json

import numpy as np
import pytest
from dpop_trainer.cli import main
from dpop_trainer.tools.doctor.examine import examine_pairs
from dpop_trainer.tools.doctor.findings import percent, repeated
from dpop_trainer.tools.doctor.measure import CUT, EMPTY, FITS, NO_ROOM, SAME_AFTER_CUT, has_hidden_characters
from dpop_trainer.tools.doctor.summary import as_dict, as_text, write_clean
from dpop_trainer.tools.doctor.texts import PairTexts, fingerprint, normalised, pair_texts
from dpop_trainer.tools.doctor.verdict import verdict
from tiny import tiny_llama, token_pairs, word_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def examine(tmp_path, records, **options):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return examine_pairs(str(path), show_progress=False, **options)


def pair(prompt="w1", chosen=" w2 w3", rejected=" w2 w4"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def found(examination):
    return {finding.name: finding.rows.tolist() for finding in examination.findings}


def levels(examination):
    return {finding.name: finding.level for finding in examination.findings}


def test_measures_of_one_pair(tmp_path):
    seen = examine(tmp_path, [pair("w1 w2", " w3 w4 w5 w6 w7", " w3 w8 w6 w7")], tokenizer=word_tokenizer())
    measures = seen.measures
    # [3 4 5 6 7] against [3 8 6 7]: one replaced, one deleted, of five
    assert measures.token_distance[0] == pytest.approx(2 / 5)
    assert (measures.prefix[0], measures.suffix[0]) == (1, 2)
    assert (measures.chosen_length[0], measures.rejected_length[0]) == (5, 4)
    # with the EOS that the trainer adds
    assert (measures.prompt_tokens[0], measures.chosen_tokens[0], measures.rejected_tokens[0]) == (2, 6, 5)
    assert measures.length[0] == 8
    assert measures.ratio[0] == 5 / 4
    # " w3 w4 w5 w6 w7" against " w3 w8 w6 w7": delete " w4" and make 5 an 8: 4 of 15 characters
    assert measures.char_distance[0] == pytest.approx(4 / 15)
    assert (measures.prompt_chars[0], measures.chosen_chars[0], measures.rejected_chars[0]) == (5, 15, 12)
    statistics = seen.statistics()
    assert statistics["first_difference"]["median"] == 1
    assert statistics["common_prefix_share"]["mean"] == pytest.approx(1 / 5)
    assert statistics["common_suffix_share"]["mean"] == pytest.approx(2 / 5)


def test_without_a_tokenizer_characters_are_measured(tmp_path):
    seen = examine(tmp_path, [pair("q", "abcXde", "abcYYde")])
    assert seen.measures.distance[0] == seen.measures.char_distance[0] == pytest.approx(2 / 7)
    assert (seen.measures.prefix[0], seen.measures.suffix[0]) == (3, 2)
    assert seen.measures.length[0] == -1
    assert "token_distance" not in seen.statistics()
    assert [item.setting for item in seen.recommendations] == ["loss_type"]


def test_outcomes_under_max_length(tmp_path):
    words = " w2 w3 w4 w5"
    records = [
        pair("w1", words, " w2 w3 w4 w6"),  # 1 + 5 = 6 tokens: fits exactly
        pair("w1 w1", words, " w6 w3 w4 w5"),  # 7 tokens: cut, and still different
        pair("w1 w1", words, " w2 w3 w4 w5 w6"),  # the same in the four tokens that are left
        pair("w1 w1 w1 w1 w1 w1", " w2", " w3"),  # the prompt alone fills six
        pair("w1", " w2 w3", " w2 w3"),  # the same to begin with
        {"prompt": "w9", "chosen": " ", "rejected": " w3"},  # no token
    ]
    seen = examine(tmp_path, records, tokenizer=word_tokenizer(), max_length=6)
    assert seen.measures.outcome.tolist() == [FITS, CUT, SAME_AFTER_CUT, NO_ROOM, FITS, EMPTY]
    assert found(seen) == {
        "cut": [1],
        "same_after_cut": [2],
        "no_room": [3],
        "identical": [4],
        "empty": [5],
    }
    assert set(levels(seen).values()) == {"serious"}  # one in six is much
    assert seen.drop == {4: "identical", 5: "empty"}  # at 64 tokens, which is told, the others have room
    # the end is kept: the answers' last tokens differ then
    seen = examine(tmp_path, records, tokenizer=word_tokenizer(), max_length=6, truncation_mode="keep_end")
    assert seen.measures.outcome.tolist() == [FITS, CUT, CUT, CUT, FITS, EMPTY]


def test_duplicates_and_contradictions(tmp_path):
    records = [
        pair("q", "yes", "no"),
        pair("q", "yes", "no"),  # to the letter
        pair("Q ", "yes\n", " no"),  # but for white space and the prompt's case
        pair("r", "yes", "no"),
        pair("r", "no", "yes"),  # against the one before
        pair("s", "a", "b"),
        pair("s", "b", "c"),  # b is rejected in the one before
        pair("t", "Cc or cc", "CC or Cc"),  # case counts in answers
        pair("t", "Cc or cc", "Cc only"),
    ]
    seen = examine(tmp_path, records)
    assert found(seen) == {"duplicate": [1], "near_duplicate": [2], "contradictory": [3, 4], "both_ways": [5, 6]}
    assert levels(seen) == {
        "duplicate": "serious",
        "near_duplicate": "serious",
        "contradictory": "serious",
        "both_ways": "note",
    }
    assert seen.is_serious
    assert seen.drop == {1: "duplicate", 2: "near_duplicate", 3: "contradictory", 4: "contradictory"}


def test_answers_that_differ_in_white_space_alone(tmp_path):
    seen = examine(tmp_path, [pair("q", "a b", "a  b"), pair("r", "a\u200bb", "ab"), pair("s", "a", "b")])
    # not contradictory: such a pair is its own opposite
    assert found(seen) == {"same_when_normalised": [0, 1]}


def test_over_represented_prompts(tmp_path):
    records = [pair("often", f"a{i}", f"b{i}") for i in range(10)]
    records += [pair(f"q{i}", *("ab" if i % 2 else "ba")) for i in range(50)]  # neither letter tells the side
    seen = examine(tmp_path, records)
    assert found(seen) == {"over_represented": list(range(10))}
    assert "the most frequent: 10 pairs" in seen.findings[0].message
    assert not seen.is_serious
    assert found(examine(tmp_path, records[1:])) == {}  # nine are not often


def test_leaks_into_the_evaluation_set(tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(
        "".join(json.dumps(p) + "\n" for p in [pair("Q1", "x", "y"), pair("q2", "a", "b"), pair("q9", "a", "b")])
    )
    records = [pair(question, "a", "b") for question in ("q1", "q2", "q3")]
    seen = examine(tmp_path, records, eval_source=str(held_out))
    assert found(seen) == {"leaked": [0, 1]}
    assert "2 of its 3 pairs are met in training, 1 of them with both answers" in seen.findings[0].message
    assert levels(seen) == {"leaked": "serious"}
    assert seen.drop == {0: "leaked", 1: "leaked"}


def test_length_as_a_cue(tmp_path):
    records = [pair(f"q{i}", "long answer", "short") for i in range(28)]
    records += [pair(f"r{i}", "short", "long answer") for i in range(12)]
    seen = examine(tmp_path, records)
    assert found(seen)["length_cue"] == list(range(28))  # 28 of 40: 70 %
    assert "70% of those whose lengths differ (median chosen / rejected 2.20)" in seen.findings[0].message
    assert "length_cue" not in found(examine(tmp_path, [*records, pair("s", "short", "long answer")]))
    seen = examine(tmp_path, [pair(p["prompt"], p["rejected"], p["chosen"]) for p in records])
    assert "the shorter answer as the chosen one: 70%" in seen.findings[0].message


@pytest.mark.parametrize(("mark", "level"), [("<<1>>", "serious"), ("!", "warning")])
def test_what_the_surface_gives_away(tmp_path, mark, level):
    """A mark in every rejected answer is a format; one in 80% of them gives most pairs away."""
    records = [pair(f"q{i}", f"{i}", f"{i + 1}{mark if level == 'serious' or i % 5 else ''}") for i in range(200)]
    seen = examine(tmp_path, records)
    assert levels(seen)["surface"] == level
    (finding,) = [finding for finding in seen.findings if finding.name == "surface"]
    guessed, share = ("100%", "100%") if level == "serious" else ("90%", "80%")  # 0.8 + 0.2 / 2
    assert finding.message.startswith(f"Side guessed right from the surface alone in {guessed} of 200 pairs (")
    assert f"in 0% of the chosen and {share} of the rejected answers" in finding.message
    told = verdict(seen).sentence
    look_first = f". But read some pairs first: side guessed right from the surface alone in {guessed} of 200 pairs."
    assert told.startswith("Do not train on this: side guessed right") if level == "serious" else look_first in told
    swapped = [pair(p["prompt"], p["rejected"], p["chosen"]) if i % 2 else p for i, p in enumerate(records)]
    assert "surface" not in found(examine(tmp_path, swapped))
    assert "read some pairs" not in verdict(examine(tmp_path, swapped)).sentence


def test_one_sentence_first(tmp_path):
    """What to do, with values that can be pasted; what plain DPO would do to low-edit pairs; what is lost."""
    low = [pair(f"w{i}", f" w2 w{3 + i % 40} w4 w5 w6 w7", f" w2 w{4 + i % 40} w4 w5 w6 w7") for i in range(40)]
    seen = examine(tmp_path, [*low, low[0], {**low[0], "chosen": None}], tokenizer=word_tokenizer())
    told = verdict(seen)
    assert told.sentence == ("Train with DPOP (dpop_lambda 50, max_length 64) after dropping 1 pair and 1 bad record.")
    assert told.options == "--loss_type dpop --dpop_lambda 50 --max_length 64"  # of a clean file, wherever that is
    assert told.reasons[0].startswith("41 of 41 pairs (100.0%) are low-edit")
    assert "Plain DPO would part the answers at the edit and lower what follows it in both" in told.reasons[0]
    assert told.reasons[1] == "1 of 41 pairs (2.4%) repeats an earlier pair to the letter"
    assert len(told.reasons) == 3
    assert as_text(seen).startswith(f"{told.sentence}\n  {told.reasons[0]}.\n")
    assert as_dict(seen)["verdict"]["sentence"] == told.sentence
    assert "max_length" not in found(seen)  # nobody asked for one

    # at 6 tokens all 41 pairs are cut; at 64, which is what is told, none is
    seen = examine(tmp_path, [*low, low[0]], tokenizer=word_tokenizer(), max_length=6)
    assert {"cut", "duplicate"} <= set(found(seen))
    assert verdict(seen).sentence == "Train with DPOP (dpop_lambda 50, max_length 64) after dropping 1 pair."
    (cut,) = [finding for finding in seen.findings if finding.name == "cut"]
    assert cut.remedy == "Raise max_length to 64: a cut answer teaches not to end."


def test_what_another_length_mends_does_not_speak_against_training(tmp_path):
    records = [pair("w1 " * (9 if i % 2 else 1), f" w2 w{3 + i}", f" w2 w{4 + i}") for i in range(10)]
    seen = examine(tmp_path, records, tokenizer=word_tokenizer(), max_length=6)
    assert (len(found(seen)["no_room"]), seen.drop) == (5, {})  # at 6 tokens, and at 64
    assert verdict(seen).sentence == "Train with DPOP (dpop_lambda 50, max_length 64)."


def test_do_not_train_on_this(tmp_path):
    hidden = [pair(f"q{i}\x00", f"a{i}", f"b{i} x") for i in range(10)]
    told = verdict(examine(tmp_path, hidden))
    assert told.sentence.startswith("Do not train on this: 10 of 10 pairs (100.0%) hold control or bidirectional")
    assert (told.options, told.is_yes) == ("", False)
    same = verdict(examine(tmp_path, [pair("q", "a", "a")]))
    assert same.sentence == "Do not train on this: no pair has two different answers."
    half = [pair(f"q{i}", "a", "b") for i in range(3)] + [{**pair(), "chosen": None}]
    assert verdict(examine(tmp_path, half)).sentence == ("Do not train on this: 1 of 4 records (25.0%) would be lost.")


def test_low_edit_pairs(tmp_path):
    low, high = pair("q", "aaaaXbbbb.", "aaaaYbbbb."), pair("r", "abc", "xyz")  # 1 of 10, 3 of 3
    seen = examine(tmp_path, [low, *({**high, "prompt": f"r{i}"} for i in range(3))])
    assert found(seen) == {"low_edit": [0]}  # a quarter of the pairs
    assert "with 5 characters on average after the edit" in seen.findings[0].message
    assert seen.recommendations[0].value == "dpop with dpop_lambda 50"
    seen = examine(tmp_path, [low, *({**high, "prompt": f"r{i}"} for i in range(4))])
    assert found(seen) == {}
    assert seen.recommendations[0].value == "dpop with dpop_lambda 5 to 50"


def test_hidden_characters(tmp_path):
    seen = examine(tmp_path, [pair("a\u202eb"), pair("q\x00"), pair("broken \ufffd"), pair("עברית 👩‍👩‍👧 é\t\n")])
    assert found(seen)["hidden_characters"] == [0, 1, 2]
    assert not has_hidden_characters("fine\r\n\ttext 中文 ‏")
    assert has_hidden_characters("\x1b[31m")


def test_max_length_and_layout(tmp_path):
    # P=2, C=R=5+EOS=6, prefix 4: rows 2*2+6+6 = 16, tree 16-2-4 = 10
    records = [pair("w1 w2", " w3 w4 w5 w6 w7", " w3 w4 w5 w6 w8") for _ in range(4)]
    seen = examine(tmp_path, records, tokenizer=word_tokenizer(), max_length=7)
    by_setting = {item.setting: item for item in seen.recommendations}
    assert by_setting["max_length"].value == "64"
    assert "the longest has 8 tokens, the median 8. At 7, as asked for, 4 do not" in by_setting["max_length"].why
    # four pairs: 64 and 40 tokens; prompts 16 of 64, common beginnings 2 * 16 of 64
    assert "One tree per pair holds 40 tokens, two rows 64: 38% less" in by_setting["layout"].why
    assert "prompts are 25% of the rows and the answers' common beginnings 50%" in by_setting["layout"].why


def test_a_few_very_long_pairs_do_not_set_max_length(tmp_path):
    records = [pair(f"w{i % 50}", f" w2 w{i % 50}", " w3") for i in range(199)]
    records.append(pair("w1", " w2" * 300, " w3" * 20))
    seen = examine(tmp_path, records, tokenizer=word_tokenizer())
    (length,) = [item for item in seen.recommendations if item.setting == "max_length"]
    assert length.value == "64"
    # 1 + 300 + EOS = 302, the next multiple of 64 is 320
    assert "99% fit, 1 longer pair is cut; to keep it whole takes 320" in length.why


def test_forms(tmp_path):
    turns = [{"role": "user", "content": "hi"}]
    chosen, rejected = ([*turns, {"role": "assistant", "content": text}] for text in ("yes", "no"))
    seen = examine(tmp_path, [{"chosen": chosen, "rejected": rejected}])
    assert pair_texts(seen.pair_file.pair(0)) == PairTexts("user: hi", "yes", "no")
    seen = examine(tmp_path, token_pairs(3), tokenizer=word_tokenizer())
    # token_pairs change one of 4, 6 and 8 tokens
    np.testing.assert_allclose(seen.measures.token_distance, [1 / 4, 1 / 6, 1 / 8], rtol=1e-6)


def test_a_single_pair_and_no_pair(tmp_path):
    seen = examine(tmp_path, [pair()], tokenizer=word_tokenizer(), model=tiny_llama())
    assert seen.num_pairs == 1
    assert len(seen.model_scores.rows) == 1
    with pytest.raises(ValueError, match="expected at least one pair, got none"):
        examine(tmp_path, [])


def test_bad_records_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 2: chosen: expected text, got null"):
        examine(tmp_path, [pair(), {**pair(), "chosen": None}], on_bad_record="error")
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 1: chosen: expected text, got null"):
        examine(tmp_path, [{**pair(), "chosen": None}])  # nothing is left
    with pytest.raises(ValueError, match="max_scored: expected at least 1, got 0"):
        examine(tmp_path, [pair()], max_scored=0)
    with pytest.raises(ValueError, match="tokenizer: expected the model's tokenizer"):
        examine(tmp_path, [pair()], model=tiny_llama())


def test_bad_records_and_ties_do_not_stop_it(tmp_path):
    """HH-RLHF has answers in which nothing is said. Rows are those of the file, whatever was left out before them."""
    records = [
        {**pair("w1"), "chosen": None},
        pair("w1"),
        pair(""),  # no token from which the first of an answer is predicted: the tokenizer's word
        pair("w2", " w3", " w3"),
        {**pair("w4"), "rejected": 3},
        pair("w5"),
    ]
    seen = examine(tmp_path, records, tokenizer=word_tokenizer())
    assert (seen.num_pairs, seen.pair_file.num_records) == (3, 6)
    assert [bad.place.rpartition(" ")[2] for bad in seen.pair_file.bad] == ["1", "5", "3"]
    assert seen.pair_file.numbers.tolist() == [1, 3, 5]
    assert found(seen)["identical"] == [1]
    result, text = as_dict(seen), as_text(seen)
    assert [finding["rows"] for finding in result["findings"] if finding["name"] == "identical"] == [[3]]
    assert (result["num_bad"], result["num_ties"]) == (3, 0)
    assert "left out: 3 records of 6 that cannot be used" in text
    assert "line 1: chosen: expected text, got null. Fill the field or remove the record." in text
    assert write_clean(seen, tmp_path / "clean.jsonl") == 2
    assert [json.loads(line) for line in (tmp_path / "clean.jsonl").read_text().splitlines()] == [
        pair("w1"),
        pair("w5"),
    ]
    assert json.loads((tmp_path / "clean.dropped.jsonl").read_text()) == {"row": 3, "reason": "identical"}

    two = {"input": "w1", "output_1": "w2", "output_2": "w3"}
    seen = examine(tmp_path, [{**two, "label": label} for label in (1, "tie", 2)])
    assert (seen.num_pairs, seen.pair_file.num_ties) == (2, 1)
    assert "left out: 1 tie, which the trainer leaves out too" in as_text(seen)
    with pytest.raises(ValueError, match=r"expected at least one pair, got none in .*, but 1 tie"):
        examine(tmp_path, [{**two, "label": "tie"}])


def test_a_tokenizer_that_names_no_end_is_told_of_and_each_answer_counted_with_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair("w1", " w2 w3", " w2 w4 w5")))
    ends = {}
    for name, words, stops in (
        ("usual", ["<unk>", "</s>", "<eot>"], None),
        ("of the model", ["<unk>", "</s>", "<eot>"], 2),
        ("none", ["<unk>"], None),
    ):
        vocabulary = {word: i for i, word in enumerate([*words, *(f"w{i}" for i in range(6))])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(name)
        if stops is not None:
            (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        assert main(["pairs", "inspect", "pairs.jsonl", "--tokenizer", f"./{name}", "--out", name]) == 0
        result = json.loads((tmp_path / name / "doctor.json").read_text())
        (finding,) = [item for item in result["findings"] if item["name"] == "no_end_token"]
        assert finding["level"] == "warning"
        assert finding["message"] in capsys.readouterr().out
        ends[name] = finding["message"].partition(": ")[2]
        # two words and three, each with its end
        assert [result["statistics"][f"{side}_tokens"]["max"] for side in ("chosen", "rejected")] == [3, 4]
    counted = "{} is counted as the end of each answer"
    made_up = "<|end of sequence|>"
    assert list(ends.values()) == [counted.format(end) for end in ("</s>", "<eot>", made_up)]


def test_another_models_tokenizer_is_named(tmp_path):
    model = tiny_llama()
    model.resize_token_embeddings(5)
    with pytest.raises(ValueError, match=r"expected ids in \[0, 5\)"):
        examine(tmp_path, [pair()], tokenizer=word_tokenizer(), model=model)


def test_scored_pairs_are_spread_evenly_over_those_that_can_be_trained_on(tmp_path):
    records = [pair(f"w{i}", " w2 w3", " w2 w3" if i == 4 else " w4") for i in range(9)]
    options = {"tokenizer": word_tokenizer(), "model": tiny_llama()}
    assert examine(tmp_path, records, **options).model_scores.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    seen = examine(tmp_path, records, max_scored=3, **options)
    # first, middle, last of eight: places 0, 3.5 -> 4, 7, of which place 4 is row 5
    assert seen.model_scores.rows.tolist() == [0, 5, 8]


def test_what_counts_as_the_same_text():
    assert normalised(" a\t b\n\nc ") == "a b c"
    assert normalised("caf\u00e9") == normalised("cafe\u0301")
    assert normalised("a < b") != normalised("a <= b")
    assert fingerprint("ab", "c") != fingerprint("a", "bc")
    assert fingerprint("", "a") != fingerprint("a", "")
    assert repeated(np.array([3, 1, 3, 3, 2], np.uint64)).tolist() == [False, False, True, True, False]


def test_percent_never_rounds_to_nothing_or_all():
    assert [percent(x) for x in (0, 1e-6, 0.001, 0.25, 0.9999, 1)] == [
        "0.0%",
        "<0.1%",
        "0.1%",
        "25.0%",
        ">99.9%",
        "100.0%",
    ]
