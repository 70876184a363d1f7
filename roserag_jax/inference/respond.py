"""Greedy responses to prompts: what `evaluate`, `answer` and the evaluation during training show a user."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from roserag_jax.inference.engine import Engine, shared_prefix_length
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.scheduler import LengthClass, NumberedTask, length_classes, run_tasks
from roserag_jax.rag import answers


@dataclasses.dataclass(frozen=True)
class Response:
    """A response to a prompt.

    Args:
      number: the prompt's.
      text: the response, up to the first stop string.
      finished: False where it ran into the limit of new tokens.
      tokens: how many new tokens were generated.
    """

    number: int
    text: str
    finished: bool
    tokens: int


class NumberedPrompt(NamedTuple):
    """A prompt as tokens, and the number that its response has."""

    number: int
    tokens: list[int]


def respond(
    engine: Engine,
    tokenizer,
    prompts: Iterable[NumberedPrompt],
    *,
    classes: list[LengthClass],
    shared_prefix: list[int],
    slots: int,
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
) -> Iterator[Response]:
    """Respond to prompts greedily; yields each `Response` as soon as it is finished.

    Args:
      prompts: taken when slots are free for them.
      classes: the length classes of all prompts, as `scheduler.run_tasks` takes them.
      shared_prefix: tokens that prompts begin with.
      slots: prompts worked on at a time.
      stop_strings: texts that end a response.
    """
    shared = engine.prefill_shared_prefix(shared_prefix)
    stop_function = answers.ending(tokenizer, stop_strings)

    def task(number: int, prompt: list[int]) -> Task:
        yield PrefillRequest(prompt, shared.of(prompt))
        (completion,) = yield DecodeRequest([prompt[-1:]], max_new_tokens, stop_function=stop_function)
        text, stopped = answers.until(tokenizer.decode(completion.tokens), stop_strings)
        return Response(number, text, completion.finished or stopped, len(completion.tokens))

    capacity = DecoderCapacity(slots, 1, ((1, max_new_tokens),))
    tasks = (NumberedTask(number, len(tokens), task(number, tokens)) for number, tokens in prompts)
    for _, response in run_tasks(engine, tasks, classes, capacity):
        yield response


def respond_to_all(
    engine: Engine, tokenizer, prompts: Sequence[list[int]], *, slots: int, **limits
) -> Iterator[Response]:
    """`respond` to prompts that are all known, with the same `limits`; the number of each is its place among them."""
    return respond(
        engine,
        tokenizer,
        itertools.starmap(NumberedPrompt, enumerate(prompts)),
        classes=length_classes(map(len, prompts), slots),
        shared_prefix=prompts[0][: shared_prefix_length(prompts)],
        slots=slots,
        **limits,
    )
