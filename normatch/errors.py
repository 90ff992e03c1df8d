"""The exceptions that the command line turns into one line of text and an exit status."""

from difflib import get_close_matches


class UserError(ValueError):
    """Something the user can fix: shown as one line, without a traceback."""

    status = 1  # the exit status of the command


class Interrupted(UserError):
    """A run was told to stop and has saved its state; the exit status is the shell's for the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal


def nearest(name: str, known) -> str:
    """What to append to a message about an unknown name: "; did you mean 'digits'?", or nothing if none is close."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
