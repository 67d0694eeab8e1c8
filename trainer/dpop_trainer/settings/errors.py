"""Errors that the command line tells apart."""


class UsageError(ValueError):
    """The command line itself is wrong, whatever its values: exit code 2."""
