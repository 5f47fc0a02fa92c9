"""The error in what a user gave, which a program reports in one line."""

__all__ = ['InputError']


_MAX_LENGTH = 1_000


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

    def __str__(self) -> str:
        """Return the message; what is given may be of any size, so the middle of a long one is left out."""
        message = super().__str__()
        if len(message) <= _MAX_LENGTH:
            return message
        return f'{message[:_MAX_LENGTH // 2]} ... {message[-_MAX_LENGTH // 2:]}'
