"""Errors in what a user gave, which a program reports in one line."""

__all__ = ['InputError']


class InputError(ValueError):
    """Something that a user gave is wrong; the message names what is allowed and what was given.

    It is raised where input is judged. A program catches it once, prints one line and ends with `exit_status`; every
    other exception is a bug and keeps its traceback.
    """

    exit_status = 2
