"""What an option is: a default, one line of help, and what is allowed, by itself and together with others."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ml_collections import ConfigDict


def not_utf8(value: Any) -> str | None:
    """What is wrong with a text that has bytes which are not UTF-8; JSON and most libraries cannot name such a file."""
    texts = value if isinstance(value, list | tuple) else [value]
    found = [text for text in texts if isinstance(text, str) and re.search("[\ud800-\udfff]", text)]
    return "is not UTF-8 text; rename the file or folder" if found else None


class Option(NamedTuple):
    """A default, one line of help, and the values that are allowed.

    Args:
      check: returns what is wrong with a value by itself, or None.
      value_type: where values need not have the type of the default, theirs; `check` then looks at it.
    """

    default: Any
    help: str
    choices: tuple = ()
    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None
    check: Callable[[Any], str | None] | None = None
    value_type: Any = None

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, as a phrase; None if it is allowed."""
        if why := not_utf8(value):
            return why
        if self.choices and value not in self.choices:
            return f"choose one of {', '.join(map(str, self.choices))}"
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most}"
        if self.above is not None and value <= self.above:
            return f"must be more than {self.above}"
        if self.below is not None and value >= self.below:
            return f"must be less than {self.below}"
        return self.check(value) if self.check else None


Faults = Iterator[tuple[str, str]]
Check = Callable[[ConfigDict], Faults]
TOGETHER: list[Check] = []
TOGETHER_IN_RUNS: list[Check] = []  # not where neither a workdir nor a model is needed, as to build or serve an index


def together(check: Check) -> Check:
    """Register a check of options that only make sense together."""
    TOGETHER.append(check)
    return check


def together_in_runs(check: Check) -> Check:
    """Register such a check for commands that show passages to a model, or fetch them for one."""
    TOGETHER_IN_RUNS.append(check)
    return check
