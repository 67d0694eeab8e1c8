"""Changes as text: with their sign, which zero does not have twice."""


def signed(value: float, digits: int = 2) -> str:
    """ "+1.50", "-0.25"; what rounds to zero is "+0.00", whichever side it came from."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"
