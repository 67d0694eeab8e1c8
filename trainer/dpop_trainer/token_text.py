"""Token ids as the pieces of text that they stand for, for people to read."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# what decoding leaves for bytes that are not whole characters yet
_REPLACEMENT = "\ufffd"


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    """One string per token; joined they are the decoded text.

    A character whose bytes are spread over several tokens stands at the last of them, and the others are empty. A
    tokenizer that writes no space before the first token of a text is given the context, so that it writes the spaces
    that are there.

    Args:
        tokenizer: what made the ids.
        ids: of the tokens wanted.
        context: ids before them; a few are enough.
    """

    def decode(some_ids: list[int]) -> str:
        return str(tokenizer.decode(some_ids))

    # Decoding a window and not all text before it, or a long answer would cost the square of its length. It begins
    # where a character does: bytes without their beginning would spoil those after them.
    window, ids = 8, [*context, *ids]
    texts: list[str] = []
    begin = max(0, len(context) - window)
    boundaries = [begin]  # tokens before which all text is written
    for end in range(begin + 1, len(ids) + 1):
        start, pending = boundaries[max(0, len(boundaries) - 1 - window)], boundaries[-1]
        before, text = decode(ids[start:pending]), decode(ids[start:end])
        piece = text[len(before) :] if text.startswith(before) else decode(ids[pending:end])
        # no character has more than four bytes: what is not whole by then never will be
        is_whole = not piece.endswith(_REPLACEMENT) or end - pending >= 4 or end == len(ids)
        texts.append(piece if is_whole else "")
        if is_whole:
            boundaries.append(end)
    return texts[len(context) - begin :]
