"""Numbers in sentences."""


def counted(number: int, noun: str, plural: str = "") -> str:
    """ "1 pair", "2,000 pairs", "0 matches" (of `plural`, where an s is not all)."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
