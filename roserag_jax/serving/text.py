"""The text of a completion while its tokens come."""

import bisect

from roserag_jax.rag.answers import until

_UNFINISHED = "\ufffd"  # what a tokenizer makes of a character whose last bytes are not there yet


class TextStream:
    """Turns the tokens of one completion into text that can be shown at once, up to the first stop string.

    What is shown is never taken back: a character without its last bytes, and what may be the beginning of a stop
    string, are held back until more is known.

    Args:
      stop: stop strings; they are not part of the text.
    """

    def __init__(self, tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""  # shown so far

    def add(self, tokens: list[int]) -> tuple[str, bool]:
        """Take all tokens so far; returns the text that is new, and whether a stop string ended the completion."""
        text, stopped = self._until_stop(tokens)
        return self._show(text if stopped else self._settled(text)), stopped

    def end(self, tokens: list[int]) -> tuple[str, bool, int]:
        """Take all tokens of the finished completion.

        Returns:
          The text that is new, whether a stop string ended the completion, and how many tokens there are up to the end
          of that: the decoder may have gone on for a few.
        """
        text, stopped = self._until_stop(tokens)
        ends = lambda n: self._until_stop(tokens[:n])[1]
        count = bisect.bisect_left(range(len(tokens)), True, key=ends) if stopped else len(tokens)
        return self._show(text), stopped, count

    def _until_stop(self, tokens: list[int]) -> tuple[str, bool]:
        return until(self.tokenizer.decode(tokens), self.stop)

    def _settled(self, text: str) -> str:
        """A text without its last characters that may still change or begin a stop string."""
        text = text.rstrip(_UNFINISHED)
        longest = max(map(len, self.stop), default=1) - 1
        may_stop = lambda end: any(stop.startswith(end) for stop in self.stop)
        held = next((n for n in range(min(longest, len(text)), 0, -1) if may_stop(text[-n:])), 0)
        return text[: len(text) - held]

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        self.text += new
        return new
