"""Token ids as the pieces of text that they stand for, for people to read."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# what decoding leaves for bytes that are not whole characters yet
_REPLACEMENT = "\ufffd"
_WINDOW = 8
_MOST_BYTES = 4
"""Of a character in UTF-8, and so the most tokens that can stand for one."""


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

    all_ids, first = [*context, *ids], len(context)

    def decode(begin: int, end: int) -> str:
        return str(tokenizer.decode(all_ids[begin:end], clean_up_tokenization_spaces=False)) if begin < end else ""

    # Decoding a window and not all text before it, or a long answer would cost the square of its length. It begins
    # where a character does: where bytes fall back to tokens, one without its beginning spoils all that follow.
    earliest = max(0, first - _WINDOW)
    begin = next(
        (
            start
            for start in range(earliest, max(-1, earliest - _MOST_BYTES), -1)
            if _REPLACEMENT not in decode(start, first)
        ),
        first,
    )
    texts: list[str] = []
    boundaries = [begin]  # tokens before which all text is written
    for end in range(begin + 1, len(all_ids) + 1):
        texts.append("")
        while boundaries[-1] < end:
            start, pending = boundaries[max(0, len(boundaries) - 1 - _WINDOW)], boundaries[-1]
            before, text = decode(start, pending), decode(start, end)
            piece = text[len(before) :] if text.startswith(before) else decode(pending, end)
            if not piece.endswith(_REPLACEMENT) or end == len(all_ids):
                texts[-1] = piece
                boundaries.append(end)
            elif end - pending < _MOST_BYTES:
                break  # the rest of the character may follow
            else:
                # never a character: the first byte is one by itself, the next may begin one
                texts[pending - begin] = decode(pending, pending + 1)
                boundaries = [pending + 1]
    return texts[first - begin :]
