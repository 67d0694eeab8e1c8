"""One tokenised pair, as the token ids of a prompt and two answers, and as a tree that stores common tokens once."""

from typing import NamedTuple

from dpop_trainer.data.edits import common_prefix_length


class PairIds(NamedTuple):
    """A tokenised pair: the prompt's token ids and each whole answer's."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class PairTree(NamedTuple):
    """A tokenised pair whose answers are split where they part.

        chosen answer   = shared_ids + chosen_ids
        rejected answer = shared_ids + rejected_ids

    Either tail may be empty: one answer can be the beginning of the other, or both can be the same.
    """

    prompt_ids: list[int]
    shared_ids: list[int]
    """The answer tokens, after the prompt, that both answers begin with. Empty without prefix sharing."""
    chosen_ids: list[int]
    """The rest of the chosen answer."""
    rejected_ids: list[int]
    """The rest of the rejected answer."""

    @classmethod
    def from_ids(
        cls, prompt_ids: list[int], chosen_ids: list[int], rejected_ids: list[int], *, share_prefix: bool
    ) -> "PairTree":
        """Split two whole answers into what they share and their tails.

        Args:
            prompt_ids: the prompt's token ids.
            chosen_ids: the whole chosen answer's token ids.
            rejected_ids: the whole rejected answer's token ids.
            share_prefix: False leaves `shared_ids` empty and both answers whole.
        """
        num_shared = common_prefix_length(chosen_ids, rejected_ids) if share_prefix else 0
        return cls(prompt_ids, chosen_ids[:num_shared], chosen_ids[num_shared:], rejected_ids[num_shared:])
