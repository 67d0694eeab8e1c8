"""What tokenising did to a data set, in numbers."""

from typing import NamedTuple


class TokeniseCounts(NamedTuple):
    """How many pairs came in, went out, were dropped and why; all other counts are over the pairs that went out."""

    num_pairs_in: int
    """Records in the data set that was given: `num_pairs` plus everything skipped and dropped."""
    num_pairs: int
    """Pairs kept."""
    skipped_bad: int
    """Records that cannot be used, left out because `on_bad_record` is "skip"."""
    dropped_empty: int
    """Pairs of which an answer has no tokens."""
    dropped_no_room: int
    """Pairs whose prompt alone fills `max_length`."""
    dropped_identical: int
    """Pairs whose answers have the same tokens: nothing to prefer."""
    dropped_identical_after_truncation: int
    """Pairs whose answers differ only in what `max_length` cut off."""
    dropped_zero_weight: int
    """Pairs of weight 0, which are not tokenised."""
    dropped_tied: int
    """Records whose two answers are equally good by the data set's own word."""
    truncated_prompts: int
    """Prompts that lost tokens to `max_length`."""
    truncated_chosen: int
    """Chosen answers that lost tokens to `max_length`."""
    truncated_rejected: int
    """Rejected answers that lost tokens to `max_length`."""
    merged_boundaries: int
    """Pairs whose prompt is shorter than when tokenised alone: tokens merge across its end, or the chat template
    renders it differently there. The model is then trained on another context than it sees when it generates."""
    mended_seams: int
    """Pairs of which a second BOS or a second end of a turn was left out."""
    stray_specials: int
    """Pairs in which a special token stands where texts meet and none should, or twice; they are left as they are."""
    left_out: int
    """Pairs of which the chat template leaves out a part of an answer (reasoning, a tool call) or a tool."""
    foreign_turns: int
    """Pairs whose answers go on over turns that the model does not write (a user's, a tool's); they are scored."""
    plain_text: int
    """Pairs of text whose prompt has none of the turns that the tokenizer's chat template writes."""
    endless_answers: int
    """Pairs with an answer that ends in no token at which the model stops; 0 where these are not known."""
    equal_scores: int
    """Pairs whose answers the data set's own scores call equally good."""
    inverted_scores: int
    """Pairs whose rejected answer has the better score."""
    weighted: int
    """Pairs whose weight in the loss is another than 1."""
    prompt_tokens: int
    """Tokens of all prompts."""
    chosen_tokens: int
    """Tokens of all chosen answers."""
    rejected_tokens: int
    """Tokens of all rejected answers."""

    def __add__(self, other: "TokeniseCounts") -> "TokeniseCounts":  # type: ignore[override]
        """The counts of both parts of a data set."""
        return TokeniseCounts(*(ours + theirs for ours, theirs in zip(self, other, strict=True)))

    def as_metrics(self) -> dict[str, int]:
        """Every count under the name "data/<count>"."""
        return {f"data/{name}": count for name, count in self._asdict().items()}

    def summary(self) -> str:
        """In plain words: what was kept and dropped, what was changed, and which scores contradict their pair."""
        dropped = _listed(
            {
                "that cannot be used": self.skipped_bad,
                "with an empty answer": self.dropped_empty,
                "whose prompt leaves no room for an answer": self.dropped_no_room,
                "with identical answers": self.dropped_identical,
                "with answers identical after truncation": self.dropped_identical_after_truncation,
                "of weight zero": self.dropped_zero_weight,
                "that are ties": self.dropped_tied,
            }
        )
        changed = _listed(
            {
                "prompt{s} truncated": self.truncated_prompts,
                "chosen answer{s} truncated": self.truncated_chosen,
                "rejected answer{s} truncated": self.truncated_rejected,
                "prompt{s} shortened where prompt and answer meet": self.merged_boundaries,
            }
        )
        notes = _listed(
            {
                "with a special token twice where texts meet, one left out": self.mended_seams,
                "with a special token where texts meet that should not be there": self.stray_specials,
                "of which the chat template leaves a part out": self.left_out,
                "whose answers go on over turns that the model does not write, which are scored": self.foreign_turns,
                "with an answer that ends in no token at which the model stops": self.endless_answers,
            }
        )
        weighted = _counted(self.weighted, "pair{s} {have}")
        plain = _counted(self.plain_text, "pair{s} {are}")
        scores = _listed({"equal": self.equal_scores, "inverted": self.inverted_scores})
        return (
            f"{self.num_pairs:,} of {_counted(self.num_pairs_in, 'pair{s}')} kept; dropped: {dropped}.\n"
            f"{self.prompt_tokens:,} prompt, {self.chosen_tokens:,} chosen and {self.rejected_tokens:,} rejected "
            f"tokens; changed: {changed}."
            + (
                f"\n{plain} plain text, without the turns of the tokenizer's chat template: a "
                "chat model is asked in turns (give it messages); for a base model text is right."
                if self.plain_text
                else ""
            )
            + (f"\nPairs to look at: {notes} (docs/data.md, Seams)." if notes != "nothing" else "")
            + (f"\nScores of the two answers: {scores}." if self.equal_scores or self.inverted_scores else "")
            + (f"\n{weighted} a weight other than 1 in the loss." if self.weighted else "")
        )


NO_COUNTS = TokeniseCounts(*[0] * len(TokeniseCounts._fields))


def _listed(counts: dict[str, int]) -> str:
    nonzero = [_counted(count, what) for what, count in counts.items() if count]
    return ", ".join(nonzero) if nonzero else "nothing"


def _counted(count: int, what: str) -> str:
    s, have, are = ("", "has", "is") if count == 1 else ("s", "have", "are")
    return f"{count:,} {what.format(s=s, have=have, are=are)}"
