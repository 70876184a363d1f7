"""Errors that a person is meant to read: what is wrong, where and what to do; and how others are quoted in them."""

import errno
import os
import re
from collections.abc import Iterator

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


# What a disk refuses, and what to do about it.
_REFUSALS = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some space or raise the quota, and run the same command again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f) and run the same command again",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "name a folder that can be written, or change its permissions",
    errno.EPERM: "name a folder that can be written, or change its permissions",
}
_QUOTED_PATH = re.compile(r"""["'](/[^"'\n]+)["']""")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and the members of groups."""
    seen, pending = set(), [error]
    while pending:
        error = pending.pop()
        if error is not None and id(error) not in seen:
            seen.add(id(error))
            yield error
            pending += [*getattr(error, "exceptions", ()), error.__context__, error.__cause__]


def disk_error(error: BaseException | None, place: str = "") -> str | None:
    """The message for an error of the disk (full, read-only, not permitted), named with its file; None for any other.

    Libraries written in C++ report theirs as text, and some do not name the file.

    Args:
      place: what is named where the file is not.
    """
    for cause in causes(error):
        for code, advice in _REFUSALS.items():
            said = (
                cause.errno == code if isinstance(cause, OSError) else os.strerror(code).lower() in str(cause).lower()
            )
            quoted = _QUOTED_PATH.search(str(cause))
            file = getattr(cause, "filename", None) or (quoted.group(1) if quoted else None)
            if said and (file or code not in (errno.EACCES, errno.EPERM)):  # which are not of the disk alone
                where = f"{file or place}: " if file or place else ""
                return f"{where}{os.strerror(code).lower()}; {advice}."
    return None
