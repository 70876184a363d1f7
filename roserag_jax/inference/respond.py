"""Greedy responses to prompts: what `evaluate`, `answer` and the evaluation during training show a user."""

import dataclasses
from collections.abc import Iterator

from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest, Task
from roserag_jax.inference.scheduler import run_tasks
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


def respond(
    engine: Engine,
    tokenizer,
    prompts: list[list[int]],
    *,
    slots: int,
    max_new_tokens: int,
    stop_strings: tuple[str, ...] = (),
    only: list[int] | None = None,
) -> Iterator[Response]:
    """Respond to prompts greedily; yields each `Response` as soon as it is finished.

    Args:
      slots: prompts worked on at a time.
      stop_strings: texts that end a response.
      only: the prompts to respond to; None is all. The shapes are those of all either way.
    """
    shared_prefix = engine.prefill_shared_prefix(prompts)
    stop_function = answers.ending(tokenizer, stop_strings)

    def task(number: int) -> Task:
        prompt = prompts[number]
        yield PrefillRequest(prompt, shared_prefix)
        (completion,) = yield DecodeRequest([prompt[-1:]], max_new_tokens, stop_function=stop_function)
        text, stopped = answers.until(tokenizer.decode(completion.tokens), stop_strings)
        return Response(number, text, completion.finished or stopped, len(completion.tokens))

    capacity = DecoderCapacity(slots, 1, ((1, max_new_tokens),))
    tasks = {number: task(number) for number in (range(len(prompts)) if only is None else only)}
    for _, response in run_tasks(engine, tasks, list(map(len, prompts)), capacity):
        yield response
