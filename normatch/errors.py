"""The exceptions that the command line turns into one line of text and an exit status."""

from difflib import get_close_matches


class UserError(ValueError):
    """A mistake of the user's: shown as one line, without a traceback."""

    status = 1  # the exit status of the command


class Interrupted(UserError):
    """A run that was told to stop and has saved its state; the status is the shell's for the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal


def nearest(name: str, known) -> str:
    """What to put behind an unknown name: "; did you mean 'digits'?", or nothing where no known name is like it."""
    match = get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
