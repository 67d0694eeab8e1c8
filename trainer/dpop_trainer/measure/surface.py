"""What tells chosen from rejected answers without reading them: a string, a beginning, an ending, a length.

A classifier looks at two answers and guesses which is the chosen one. All that it sees is which n-grams of characters
stand in one of the two alone, and which of the two has more of what `_COUNTED` counts. Every number is one sign to it:
which number stands there is what an answer says, not how it looks, so that pairs that differ in numbers alone give it
nothing to go by and are guessed right in half of the cases.

It is boosted (Schapire & Singer 1999, "Improved boosting algorithms using confidence-rated predictions", section 3:
weak rules that may abstain), so that it is a short list of strings and their weights, and cross-validated: all pairs of
one prompt are guessed by strings learned from other prompts' pairs. If a share s of the pairs gives its side away and
the rest is guessed by a coin, 1/2 + s/2 of the guesses are right. The surface gives the sides away where s is above one
half, most of the pairs, as far as the number of prompts can tell: where the lower bound on the guesses that are right
is above 3/4. The bound is Wilson's, which one draw in a thousand exceeds.

Time and memory are bounded by `MAX_PAIRS` pairs and `_BEGINNING` + `_END` characters of each answer.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_PAIRS = 2000
GIVEN_AWAY = 0.75
"""Share of guesses that are right where half of the pairs give their side away and the others none."""

NEARLY = 0.1
"""What "nearly all" lacks, and "nearly none" has; our choice."""

SURFACE_REMEDY = "Training teaches that instead of what makes an answer good: write both sides in one format."

_BEGINNING, _END = 900, 300
_LENGTHS = (1, 2, 3, 5)  # of n-grams
_BITS = 18
_COUNTS_BEGIN = 1 << _BITS  # the features behind the strings
_ROUNDS = 24
_FOLDS = 5
_Z = 3.09  # one in a thousand, one-sided
_STRONGEST = 2000  # n-grams that are weighed, by how unevenly they stand on the two sides
_SHOWN = 3
_WORTH = 0.05  # by how much a string's shares differ on the two sides, for it to be shown
_LONGEST_SHOWN = 40

_NUMBER = re.compile(r"\d+")
# of private use: in no text that means them
_START, _STOP, _CUT, _ANY_NUMBER = "\ue000", "\ue001", "\ue002", "\ue003"
_COUNTED = {
    "more characters": re.compile("(?s:.)"),
    "more lines": re.compile("\n"),
    "more capital letters": re.compile("[A-ZÀ-ÖØ-ÞА-ЯΑ-Ω]"),
    "more punctuation": re.compile("[^\\w\\s\ue000-\ue003]"),
    "more characters beyond ASCII": re.compile("[^\x00-\x7f\ue000-\ue003]"),
}
"""What an answer can have more of than the other."""


class Cue(NamedTuple):
    """Something that stands on one side more often than on the other."""

    what: str
    """A string in quotes and where it stands, or one of `_COUNTED`."""
    chosen: float
    """Share of the chosen answers that have it."""
    rejected: float

    @property
    def is_string(self) -> bool:
        return self.what not in _COUNTED

    def __str__(self) -> str:
        return f"{self.what} in {self.chosen:.0%} of the chosen and {self.rejected:.0%} of the rejected answers"


class Surface(NamedTuple):
    """What the surface of pairs gives away."""

    num_pairs: int
    num_prompts: int
    guessed: float
    """Share of the sides that are guessed right, a tie counted half; of each prompt its mean."""
    at_least: float
    """Lower bound of that share."""
    cues: tuple[Cue, ...]
    """What tells the sides apart; empty where little does."""

    @property
    def gives_away(self) -> bool:
        """Whether most pairs give their side away."""
        return self.at_least > GIVEN_AWAY

    @property
    def is_told(self) -> bool:
        """Whether there are enough prompts to tell: with fewer, guesses that are all right would say nothing."""
        return _lower_bound(1.0, self.num_prompts) > GIVEN_AWAY

    @property
    def is_format(self) -> bool:
        """Whether one string alone stands in nearly all answers of one side and in nearly none of the other."""
        nearly_all = (max(cue[1:]) >= 1 - NEARLY and min(cue[1:]) <= NEARLY for cue in self.cues if cue.is_string)
        return self.gives_away and any(nearly_all)

    def __str__(self) -> str:
        if not self.is_told:
            return f"too few prompts ({self.num_prompts}) to tell whether the surface gives the sides away"
        return f"{self.guess} ({'; '.join(map(str, self.cues))})" if self.gives_away else self.guess

    @property
    def guess(self) -> str:
        """Without the strings that do it."""
        return f"side guessed right from the surface alone in {self.guessed:.0%} of {self.num_pairs:,} pairs"


class SurfaceSample:
    """Pairs spread evenly over all that are shown to it, at most `MAX_PAIRS`, of as many as there are."""

    def __init__(self) -> None:
        self._pairs: list[tuple[int, str, str]] = []
        self._seen, self._stride = 0, 1

    def add(self, prompt: str, chosen: str, rejected: str) -> None:
        """Show it one pair."""
        if chosen == rejected:
            return
        if self._seen % self._stride == 0:
            key = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
            self._pairs.append((key, _looks(chosen), _looks(rejected)))
        self._seen += 1
        if len(self._pairs) > MAX_PAIRS:
            self._pairs = self._pairs[::2]
            self._stride *= 2

    def surface(self) -> Surface:
        """What was seen."""
        if not self._pairs:
            return Surface(0, 0, 0.5, 0.0, ())
        differences = _differences(self._pairs)
        prompts, groups = np.unique([key for key, _, _ in self._pairs], return_inverse=True)
        right = np.zeros(len(self._pairs))
        for fold in range(_FOLDS):
            held_out = groups % _FOLDS == fold
            scores = _scores(differences, _boost(differences, ~held_out))
            right[held_out] = (np.sign(scores[held_out]) + 1) / 2
        per_prompt = np.bincount(groups, right) / np.bincount(groups)
        guessed = float(per_prompt.mean())
        found = Surface(len(self._pairs), len(prompts), guessed, _lower_bound(guessed, len(prompts)), ())
        if not found.gives_away:
            return found
        return found._replace(cues=tuple(self._cues(differences)))

    def _cues(self, differences: "_Differences") -> Iterator[Cue]:
        """Strings that together tell the sides apart, and what of `_COUNTED` does so for most pairs by itself."""
        n = len(self._pairs)
        strings = differences.where(differences.features < _COUNTS_BEGIN)
        told: list[str] = []
        for bucket in _boost(strings, np.ones(n, np.bool_)):
            cue = self._string(bucket, strings)
            if abs(cue.chosen - cue.rejected) >= _WORTH and not any(cue.what in t or t in cue.what for t in told):
                told.append(cue.what)
                yield cue
            if len(told) == _SHOWN:
                break
        for i, name in enumerate(_COUNTED):
            signs = differences.signs[differences.features == _COUNTS_BEGIN + i]
            if abs(int(signs.sum(dtype=np.int64))) > n / 2:
                yield Cue(name, int((signs > 0).sum()) / n, int((signs < 0).sum()) / n)

    def _string(self, bucket: int, differences: "_Differences") -> Cue:
        entries = differences.where(differences.features == bucket)
        on_chosen = entries.signs.sum(dtype=np.int64) > 0
        rows = entries.rows[(entries.signs > 0) == on_chosen].tolist()
        having = [self._pairs[row][1 if on_chosen else 2] for row in rows]
        # a bucket may hold several n-grams
        gram = Counter(_gram_of(text, bucket) for text in having[:50]).most_common(1)[0][0]
        gram = _extended(gram, [text for text in having if gram in text])
        _, *sides = zip(*self._pairs, strict=True)
        chosen, rejected = (sum(gram in text for text in side) / len(side) for side in sides)
        return Cue(_shown(gram), chosen, rejected)


class _Differences(NamedTuple):
    """The features that stand on one side of a pair alone, one entry each."""

    rows: NDArray[np.int32]
    features: NDArray[np.int32]
    signs: NDArray[np.int8]
    """+1 where the chosen answer has it, -1 where the rejected one does."""
    num_pairs: int

    def where(self, mask: NDArray[np.bool_]) -> "_Differences":
        return _Differences(self.rows[mask], self.features[mask], self.signs[mask], self.num_pairs)


def _looks(text: str) -> str:
    """Beginning and end of an answer, every number one sign."""
    if len(text) > _BEGINNING + _END:
        text = f"{text[:_BEGINNING]}{_CUT}{text[-_END:]}"
    return f"{_START}{_NUMBER.sub(_ANY_NUMBER, text)}{_STOP}"


def _buckets(text: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each length of n-grams, and the bucket of the one that begins at each place."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    hashes, done = np.zeros(len(codes), np.uint64), 0
    for length in _LENGTHS:
        for k in range(done, min(length, len(codes))):
            hashes = hashes[: len(codes) - k] * np.uint64(0x9E3779B97F4A7C15) + codes[k:] + np.uint64(1)
        done = length
        if length <= len(codes):
            mixed = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            yield length, (mixed >> np.uint64(64 - _BITS)).astype(np.int64)


def _gram_of(text: str, bucket: int) -> str:
    for length, buckets in _buckets(text):
        places = np.flatnonzero(buckets == bucket)
        if len(places):
            return text[places[0] : places[0] + length]
    return ""


def _differences(pairs: list[tuple[int, str, str]]) -> _Differences:
    rows, features, signs = [], [], []
    seen = np.zeros(1 << _BITS, np.int8)
    for row, (_, chosen, rejected) in enumerate(pairs):
        ours, theirs = (np.concatenate([buckets for _, buckets in _buckets(text)]) for text in (chosen, rejected))
        seen[ours] |= 1
        seen[theirs] |= 2
        counts = [[len(pattern.findall(text)) for text in (chosen, rejected)] for pattern in _COUNTED.values()]
        more, less = ([_COUNTS_BEGIN + i for i, (a, b) in enumerate(counts) if sign * (a - b) > 0] for sign in (1, -1))
        for sign, only, counted in ((1, ours[seen[ours] == 1], more), (-1, theirs[seen[theirs] == 2], less)):
            found = np.concatenate([np.unique(only), np.array(counted, np.int64)])
            rows.append(np.full(len(found), row, np.int32))
            features.append(found.astype(np.int32))
            signs.append(np.full(len(found), sign, np.int8))
        seen[ours] = seen[theirs] = 0
    return _Differences(np.concatenate(rows), np.concatenate(features), np.concatenate(signs), len(pairs))


def _boost(differences: _Differences, training: NDArray[np.bool_]) -> dict[int, float]:
    """Feature -> its weight, in the order in which they were taken. [pairs] says which pairs to learn from."""
    if not training.any():
        return {}
    rows, features, signs, _ = differences.where(training[differences.rows])
    size = _COUNTS_BEGIN + len(_COUNTED)
    chosen, rejected = (np.bincount(features[signs == sign], minlength=size) for sign in (1, -1))
    unevenness = (chosen - rejected) ** 2 / np.maximum(chosen + rejected, 1)
    strongest = np.argsort(-unevenness, kind="stable")[:_STRONGEST]
    index = np.full(size, -1)
    index[strongest] = np.arange(len(strongest))
    kept = index[features] >= 0
    rows, columns, is_chosen = rows[kept], index[features[kept]], signs[kept] > 0

    weights = training / training.sum()
    smoothing = 1 / training.sum()
    learned: dict[int, float] = {}
    for _ in range(_ROUNDS):
        total = np.bincount(columns, weights[rows], len(strongest))
        good = np.bincount(columns[is_chosen], weights[rows[is_chosen]], len(strongest))
        bad = np.maximum(total - good, 0)
        # Z = W0 + 2 sqrt(W+ W-), to be made small
        best = int(np.argmax(np.abs(np.sqrt(good + smoothing) - np.sqrt(bad + smoothing))))
        if np.isclose(good[best], bad[best], atol=1e-12):
            break  # nothing tells the sides apart
        alpha = 0.5 * float(np.log((good[best] + smoothing) / (bad[best] + smoothing)))
        feature = int(strongest[best])
        learned[feature] = learned.get(feature, 0.0) + alpha
        touched = columns == best
        weights[rows[touched]] *= np.exp(-alpha * np.where(is_chosen[touched], 1.0, -1.0))
        weights /= weights.sum()
    return learned


def _scores(differences: _Differences, learned: dict[int, float]) -> NDArray[np.float64]:
    """[pairs] above 0 where the chosen answer is taken for the chosen one."""
    weights = np.zeros(_COUNTS_BEGIN + len(_COUNTED))
    weights[list(learned)] = list(learned.values())
    votes = weights[differences.features] * differences.signs
    return np.bincount(differences.rows, votes, differences.num_pairs).astype(np.float64)


def _lower_bound(share: float, count: int) -> float:
    """Wilson's, one-sided, of a share of so many draws."""
    if not count:
        return 0.0
    square = _Z**2 / count
    spread = _Z * np.sqrt(share * (1 - share) / count + square / (4 * count))
    return float((share + square / 2 - spread) / (1 + square))


def _extended(gram: str, texts: list[str]) -> str:
    """The longest string around an n-gram that nearly as many of the texts hold."""
    enough = 0.95 * sum(gram in text for text in texts)
    for forwards in (True, False):
        while len(gram) < _LONGEST_SHOWN:
            after = Counter(_neighbour(text, gram, forwards) for text in texts if gram in text)
            neighbour = after.most_common(1)[0][0]
            longer = gram + neighbour if forwards else neighbour + gram
            if not neighbour or sum(longer in text for text in texts) < enough:
                break
            gram = longer
    return gram


def _neighbour(text: str, gram: str, forwards: bool) -> str:
    place = text.index(gram)
    return text[place + len(gram) :][:1] if forwards else text[:place][-1:]


def _shown(gram: str) -> str:
    begins, ends = gram.startswith(_START), gram.endswith(_STOP)
    text = repr(gram.strip(_START + _STOP))
    for sign, name in ((_ANY_NUMBER, "[number]"), (_CUT, "[...]")):
        text = text.replace(repr(sign)[1:-1], name)
    if begins and ends:
        return f"nothing but {text}"
    return f"{text} at the beginning" if begins else f"{text} at the end" if ends else text
