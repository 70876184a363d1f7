"""The one exception that a person is meant to read."""


class UserError(Exception):
    """Something the user can put right; the message names the file, row or option and says what to do.

    Commands print the message alone and exit with status 2. Everything else is a defect and keeps its traceback.
    """
