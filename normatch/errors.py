"""The one exception the command line turns into a line of text."""


class UserError(ValueError):
    """A mistake of the user's: shown as one line, without a traceback."""
