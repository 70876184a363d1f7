"""The one exception that a person is meant to read, and how the text of others is quoted in it."""

LONGEST_MESSAGE = 1000


class UserError(Exception):
    """Something the user can put right; the message names the file, row or option and says what to do.

    The message is one line of at most 1,000 characters: what is longer is cut in its middle. Commands print it alone
    and exit with status 2. Everything else is a defect and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(shorten(" ".join(str(message).splitlines()), LONGEST_MESSAGE))


def shorten(text: str, limit: int) -> str:
    """A text of at most `limit` characters, its middle replaced by '...' where it is longer."""
    if len(text) <= limit:
        return text
    head = (limit - 3) * 2 // 3
    return f"{text[:head]}...{text[len(text) - (limit - 3 - head) :]}"


def quote(value: object) -> str:
    """A value of the user's as Python writes it, in at most 80 characters."""
    return shorten(repr(value[:200] if isinstance(value, str) else value), 80)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name where it has none."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
