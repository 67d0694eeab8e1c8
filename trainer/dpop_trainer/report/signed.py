"""Numbers as people read them, in pages, tables and sentences: with a minus sign. Machines are given the hyphen."""


def minus(told: str) -> str:
    """A number as Python writes it, "-2.91" or "1e-05", with minus signs in the place of its hyphens."""
    return told.replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """ "+1.50", "−0.25"; what rounds to zero is "+0.00", whichever side it came from."""
    return minus(f"{round(value, digits) + 0.0:+.{digits}f}")
