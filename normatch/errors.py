"""The exceptions that the command line turns into one line of text and an exit status."""


class UserError(ValueError):
    """A mistake of the user's: shown as one line, without a traceback."""

    status = 1  # the exit status of the command


class Interrupted(UserError):
    """A run that was told to stop and has saved its state; the status is the shell's for the signal."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.status = 128 + signal
