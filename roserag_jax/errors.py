"""The one exception that a person is meant to read, and what is quoted in it of others."""


class UserError(Exception):
    """Something the user can put right; the message names the file, row or option and says what to do.

    Commands print the message alone and exit with status 2. Everything else is a defect and keeps its traceback.
    """


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
