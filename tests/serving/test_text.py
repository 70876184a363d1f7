"""The text of a completion while its tokens come."""

import pytest

from roserag_jax.serving.text import TextStream


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", "replace")


def stream(text, stop=(), chunk=1, more=b""):
    """What is shown of a text that comes `chunk` bytes at a time until a stop string ends it; and what ends it."""
    shown, tokens, whole = TextStream(Bytes(), stop), [], list(text.encode() + more)
    pieces = []
    while len(tokens) < len(whole):
        tokens = whole[: len(tokens) + chunk]
        new, stopped = shown.add(tokens)
        pieces.append(new)
        if stopped:
            break
    new, stopped, count = shown.end(tokens)
    assert "".join([*pieces, new]) == shown.text
    return [*pieces, new], stopped, count


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_text_is_the_same_in_chunks_of_any_size(chunk):
    """Characters of several bytes, beginnings of stop strings that do not go on, and the end within one."""
    text = "caf\u00e9 \u71d5 \U0001f33f and\n\nmore"
    assert "".join(stream(text, ("\n\n\n", "mor\u00e9"), chunk)[0]) == text
    pieces, stopped, count = stream(text, ("and\n\nm", "\U0001f33f a"), chunk)
    assert ("".join(pieces), stopped, count) == (
        "caf\u00e9 \u71d5 ",
        True,
        len("caf\u00e9 \u71d5 \U0001f33f a".encode()),
    )


def test_what_may_begin_a_stop_string_is_held_back():
    pieces, stopped, count = stream("a END", ("\nEND", " END!"))
    assert pieces == ["a", "", "", "", "", " END"] and not stopped and count == 5
    pieces, stopped, count = stream("a END! b", ("\nEND", " END!"))
    assert "".join(pieces) == "a" and stopped and count == 6


def test_bytes_that_are_no_text_are_shown_at_the_end():
    pieces, _, count = stream("ab", more=b"\xe2\x82")
    assert pieces[:2] == ["a", "b"] and "".join(pieces) == "ab\ufffd" and count == 4
