"""The error in what a user gave, which a program reports in one line."""

__all__ = ['InputError']


class InputError(ValueError):
    """Something that a user gave is wrong; the message names what is allowed and what was given.

    It is raised where input is judged. A program catches it once, in `timm_ddnn_cli.arguments.run`, prints one line and
    ends with `exit_status`. Any other exception but an OSError is a bug and keeps its traceback.

    Attributes:
        exit_status: Status of a program that ends by it.
        on_every_process: Whether a single one of several processes may meet it, so that each prints it. If not, the
            first of every machine does.
    """

    exit_status = 2
    on_every_process = False
