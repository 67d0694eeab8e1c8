"""What tells chosen from rejected answers at a glance is found and named, and what does not is not."""

import json
import math
import random
import string

import pytest
from dpop_trainer.measure.surface import GIVEN_AWAY, MAX_PAIRS, SurfaceSample
from dpop_trainer.tools.pairs.arc import Arc
from dpop_trainer.tools.pairs.hellaswag import HellaSwag
from dpop_trainer.tools.pairs.metamath import build_pairs

WORDS = ("so", "then", "clips", "sold", "each", "day", "half", "twice", "total", "apples", "more", "left", "over", "of")


def sentence(rng, length=12):
    return " ".join(rng.choices(WORDS, k=length))


def surface_of(pairs):
    sample = SurfaceSample()
    for prompt, chosen, rejected in pairs:
        sample.add(str(prompt), chosen, rejected)
    return sample.surface()


def alike(count, seed=0, prompts=None):
    """Pairs of sentences from one source: nothing tells the sides apart but chance."""
    rng = random.Random(seed)
    return [(i % (prompts or count), sentence(rng), sentence(rng)) for i in range(count)]


def records(shared_data, name, limit):
    path = shared_data / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]


def test_numbers_alone_give_nothing_to_go_by():
    """Every guess is a tie: one half, exactly, whatever the numbers are."""
    seen = surface_of((i, f"{i} + 2 = {i + 2}, {i + 2}.", f"{i} + 2 = {i + 9}, {i + 2}.") for i in range(300))
    assert (seen.num_pairs, seen.num_prompts, seen.guessed, seen.cues) == (300, 300, 0.5, ())
    assert not seen.gives_away
    assert str(seen) == "side guessed right from the surface alone in 50% of 300 pairs"


def test_marks_on_one_side_are_found():
    """The leak of calculator marks: 98.9% of the rejected answers hold them, and no chosen one does."""
    pairs = [
        (i, chosen, rejected if i % 90 == 7 else f"{rejected} <<{i}+1={i}>>{i}") for i, chosen, rejected in alike(450)
    ]
    seen = surface_of(pairs)
    assert seen.guessed == pytest.approx(0.99, abs=0.01)  # 445 of 450 pairs, and the others by a coin
    assert seen.is_format
    assert "<<" in seen.cues[0].what
    assert (seen.cues[0].chosen, seen.cues[0].rejected) == (0, 445 / 450)
    assert "[number]" in seen.cues[0].what


def test_another_ending_is_found():
    """The leak of a pattern that matched samples alone: they end "A: 18", labels "#### 18"."""
    seen = surface_of((i, f"{a}\n#### {i}", f"{b}\nA: {i + 1}") for i, a, b in alike(300))
    assert seen.guessed == 1
    assert seen.is_format
    assert any(cue.what.endswith("at the end") for cue in seen.cues)
    assert {(cue.chosen, cue.rejected) for cue in seen.cues} <= {(0, 1), (1, 0)}


@pytest.mark.parametrize(
    ("mark", "what"),
    [
        (lambda text: f"Sure! {text}", "'Sure! ' at the beginning"),
        (lambda text: f"{text}<|im_end|>", "'<|im_end|>' at the end"),
        (str.upper, "more capital letters"),
        (lambda text: text.replace(" ", "\n", 3), "more lines"),
        (lambda text: text + " да", "more characters beyond ASCII"),
    ],
)
def test_cues_are_named(mark, what):
    seen = surface_of((i, chosen, mark(rejected)) for i, chosen, rejected in alike(120))
    assert seen.guessed == 1
    told = {cue.what: (cue.chosen, cue.rejected) for cue in seen.cues}
    assert told[what] == (0, 1)


def test_sides_from_one_source_are_told_by_chance_alone():
    """Guesses of 600 independent pairs: a standard deviation of 0.5 / sqrt(600), six of which are 0.12."""
    assert surface_of(alike(600)).guessed == pytest.approx(0.5, abs=6 * 0.5 / math.sqrt(600))


def test_what_pairs_of_one_prompt_share_is_not_learned_by_heart():
    """Each prompt has its own right answer, letters that no other has, in all its pairs."""
    rng = random.Random(0)
    right = ["".join(rng.choices(string.ascii_letters, k=40)) for _ in range(100)]
    pairs = [(i, right[i], "".join(rng.choices(string.ascii_letters, k=40))) for i in range(100) for _ in range(5)]
    seen = surface_of(pairs)
    assert (seen.num_pairs, seen.num_prompts) == (500, 100)
    assert not seen.gives_away
    assert seen.guessed == pytest.approx(0.5, abs=6 * 0.5 / math.sqrt(100))


@pytest.mark.parametrize(("marked", "gives_away"), [(100, False), (160, True)])
def test_most_pairs_is_what_counts(marked, gives_away):
    """Of 200 pairs so many are told by a mark and the others, which differ in a number, by a coin: 1/2 + s/2."""
    pairs = [(i, f"{i} !!" if i < marked else f"{i}", f"{i + 1}") for i in range(200)]
    seen = surface_of(pairs)
    share = 0.5 + marked / 200 / 2
    assert seen.guessed == pytest.approx(share)
    z = 3.09
    bound = (share + z**2 / 400 - z * math.sqrt(share * (1 - share) / 200 + z**2 / 160_000)) / (1 + z**2 / 200)
    assert seen.at_least == pytest.approx(bound)  # 0.65 and 0.82
    assert seen.gives_away is gives_away is (bound > GIVEN_AWAY)


def test_few_prompts_tell_nothing():
    """Of n guesses that are all right the bound is n / (n + 3.09²): above 3/4 from 28.6 on."""
    seen = [surface_of((i, f"yes {i}", f"no! {i}") for i in range(n)) for n in (28, 29)]
    assert [surface.guessed for surface in seen] == [1, 1]
    assert [(surface.is_told, surface.gives_away) for surface in seen] == [(False, False), (True, True)]
    assert str(seen[0]) == "too few prompts (28) to tell whether the surface gives the sides away"
    assert surface_of([]).num_pairs == surface_of([("q", "same", "same")]).num_pairs == 0
    assert not surface_of([]).gives_away


def test_of_many_pairs_some_are_looked_at_from_beginning_to_end():
    sample = SurfaceSample()
    for i in range(4 * MAX_PAIRS + 1):
        sample.add(str(i), "a", "b")
    kept = [key for key, _, _ in sample._pairs]
    assert MAX_PAIRS / 2 <= len(kept) <= MAX_PAIRS
    spread = SurfaceSample()
    for i in range(0, 4 * MAX_PAIRS + 1, 8):  # every eighth, from the first to the last
        spread.add(str(i), "a", "b")
    assert kept == [key for key, _, _ in spread._pairs]


def test_any_text_is_looked_at():
    texts = ["", "\x00", "\ud800", "é" * 5000, "a" * 1200 + "z" * 1200, "\ue000\ue003"]
    seen = surface_of((i, a, b) for i in range(9) for a in texts for b in texts)
    assert (seen.num_pairs, seen.num_prompts) == (9 * 6 * 5, 9)  # all but those of one text with itself
    assert not seen.gives_away  # each pair stands there both ways


def test_the_paper_s_pairs_give_nothing_away(shared_data):
    """GSM8K with a wrong result, the right ARC option and the right HellaSwag ending against wrong ones."""
    gsm8k = build_pairs(records(shared_data, "gsm8k/train.jsonl", 200), seed=0)
    arc = (
        pair
        for record in records(shared_data, "arc/ARC-Challenge_validation.jsonl", 120)
        for pair in Arc().build(record, 0)
    )
    swag = (
        pair
        for record in records(shared_data, "hellaswag/hellaswag_val_1000.jsonl", 200)
        for pair in HellaSwag().build(record, 0)
    )
    found = surface_of((pair["prompt"], pair["chosen"], pair["rejected"]) for pair in gsm8k)
    assert (found.guessed, found.gives_away) == (0.5, False)
    for pairs in (arc, swag):
        found = surface_of(pair[:3] for pair in pairs)
        assert found.is_told
        assert not found.gives_away
