"""What is served: the base model and the adapter, each as it is and with passages retrieved for the question.

Both have a decoder of their own and share the frozen weights. The retrieving ones answer as the command `answer` does:
the last user message is the question, the passages found for it are put into the prompt.
"""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jinja2 import TemplateError

from roserag_jax.errors import UserError, first_line
from roserag_jax.inference.engine import Engine, shared_prefix_length
from roserag_jax.inference.requests import Completion, DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import TASKS_LOCK
from roserag_jax.inference.service import DecoderService, Generation
from roserag_jax.models.cache import PrefixCache
from roserag_jax.rag import answers, documents
from roserag_jax.rag.chat import TurnMarks, opens_thoughts, render_chat
from roserag_jax.rag.prompts import PromptBuilder, prompt_tokens
from roserag_jax.serving.protocol import ApiError, ChatRequest, Finish
from roserag_jax.serving.text import TextStream


class Retriever(Protocol):
    """What finds passages."""

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The best k passages of each query."""


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model that a request can name.

    Args:
      retrieves: whether it puts passages into the prompt.
      shared_prefix: the cache of the tokens `shared` that its prompts begin with, if they do.
    """

    name: str
    description: str
    decoder: DecoderService
    retrieves: bool
    shared: tuple[int, ...] = ()
    shared_prefix: PrefixCache | None = None

    def card(self, created: int) -> dict:
        """Its entry in the list of models."""
        card = {"id": self.name, "object": "model", "created": created, "owned_by": "roserag_jax"}
        return card | {"roserag": {"description": self.description, "retrieves": self.retrieves}}


@dataclasses.dataclass(frozen=True)
class PreparedPrompt:
    """A request's prompt, ready for the decoder.

    Args:
      thinking: whether it ends inside a block of thoughts.
      extra: what the reply says of it.
    """

    tokens: list[int]
    stop: tuple[str, ...]
    max_new_tokens: int
    thinking: bool
    extra: dict


class Models:
    """The served models by name.

    Args:
      config: the whole configuration.
      engines: of the base model and, where there is one, of the adapter, by name.
      retriever: what the retrieving models search; None where there is no corpus.
    """

    def __init__(self, config, tokenizer, engines: dict[str, Engine], retriever: Retriever | None):
        self.tokenizer, self.retriever, self.serve = tokenizer, retriever, config.serve
        self.builder = PromptBuilder(tokenizer, **config.prompt)
        self._marks = TurnMarks(tokenizer, self.builder.template_arguments)
        self._searching = threading.Lock()  # a retriever is not made for several threads at once
        self.created = int(time.time())
        capacity = DecoderCapacity(self.serve.slots, 1, ((1, self.serve.max_tokens),))
        self.by_name: dict[str, ServedModel] = {}
        self.decoders: list[DecoderService] = []
        retrieving = []
        for name, engine in engines.items():
            decoder = DecoderService(engine, capacity, config.prompt.max_tokens, self.serve.waiting)
            self.decoders.append(decoder)
            self._add(ServedModel(name, f"the {name} model, as it is", decoder, False))
            # The last is called by the project's name, with or without an adapter.
            rag_name = "roserag" if name == [*engines][-1] else f"roserag-{name}"
            retrieving.append((rag_name, f"the {name} model, with passages of the corpus", decoder, engine))
        if retriever is not None:
            shared = self._shared_tokens() if config.prompt.passages else []
            for *fields, decoder, engine in retrieving:
                cache = engine.prefill([shared], len(shared) - 1) if shared else None
                self._add(ServedModel(*fields, decoder, True, tuple(shared[:-1]), cache))

    def _add(self, model: ServedModel) -> None:
        self.by_name[model.name] = model

    def _shared_tokens(self) -> list[int]:
        """What all retrieving prompts begin with, and one token more; empty where that is short."""
        row = lambda word: {"id": word, "question": word, "contexts": [{"title": word, "text": word}]}
        prompts = [self.builder.plain(row(word)).tokens for word in ("One", "two")]
        length = shared_prefix_length(prompts)
        return prompts[0][: length + 1] if length else []

    def warm_up(self) -> None:
        """Decode a few tokens with every decoder, so that what cannot run fails now and the programs are compiled.

        Raises:
          Exception: whatever ended a decoder.
        """
        for decoder in self.decoders:
            ended: list = []
            done = threading.Event()
            tell = lambda outcome, ended=ended, done=done: (ended.append(outcome), done.set())
            tokens = [self.tokenizer("a", add_special_tokens=False).input_ids[0]] * 2
            decoder.submit([Generation(PrefillRequest(tokens), DecodeRequest([tokens[-1:]], 1), tell)])
            while not done.wait(1.0):  # for a signal to come through
                pass
            if isinstance(ended[0], Exception):
                raise ended[0]

    def find(self, name: str) -> ServedModel:
        """The model that a request names.

        Raises:
          ApiError: there is none of that name.
        """
        if (model := self.by_name.get(name)) is None:
            known = ", ".join(self.by_name)
            raise ApiError(404, f"there is no model {name[:80]!r}, only {known}", code="model_not_found", param="model")
        return model

    def prepare(self, model: ServedModel, request: ChatRequest) -> PreparedPrompt:
        """Make the prompt of a request, with passages if the model retrieves.

        Raises:
          ApiError: it is too long, or the model's chat template does not take the messages.
        """
        requested = request.max_completion_tokens or request.max_tokens
        if requested and requested > self.serve.max_tokens:
            raise ApiError(
                400,
                f"max_tokens: at most {self.serve.max_tokens} new tokens are generated (config.serve.max_tokens)",
                param="max_tokens",
                code="invalid_value",
            )
        if model.retrieves:
            text, tokens, extra = self._retrieving_prompt(request)
        else:
            text, tokens, extra = *self._chat_prompt(request), {}
        most = self.builder.max_tokens
        if len(tokens) > most:
            raise ApiError(
                400,
                f"messages: {len(tokens)} tokens, where a prompt has at most {most} (config.prompt.max_tokens)",
                param="messages",
                code="context_length_exceeded",
            )
        stop = (*request.stop, *(self.builder.stop if model.retrieves else ()))
        return PreparedPrompt(tokens, stop, requested or self.serve.max_tokens, opens_thoughts(text), extra)

    def _chat_prompt(self, request: ChatRequest) -> tuple[str, list[int]]:
        """The conversation in the model's chat template; marks of turns in it are broken up, as in passages."""
        with TASKS_LOCK:
            turns = [
                {"role": {"developer": "system"}.get(m.role, m.role), "content": self._marks.break_up(m.text)}
                for m in request.messages
            ]
            try:
                if self.tokenizer.chat_template is None:
                    text = "\n\n".join(turn["content"] for turn in turns) + "\n"
                else:
                    text = render_chat(self.tokenizer, turns, self.builder.template_arguments)
            except TemplateError as error:
                message = f"messages: the model's chat template does not take them ({first_line(error)})"
                raise ApiError(400, message, param="messages", code="invalid_value") from error
            return text, prompt_tokens(self.tokenizer, text)

    def _retrieving_prompt(self, request: ChatRequest) -> tuple[str, list[int], dict]:
        """The prompt that `answer` makes of the last user message, and what the reply says of it."""
        asked = [i for i, message in enumerate(request.messages) if message.role == "user"]
        question = request.messages[asked[-1]].text if asked else ""
        if not question.strip():
            raise ApiError(400, "messages: the last user message is the question, and there is none", param="messages")
        row = {"id": "question", "question": question, "contexts": []}
        if self.builder.passages:
            with self._searching:
                row["contexts"] = self.retriever.search([question], self.builder.passages)[0]
        with TASKS_LOCK:
            try:
                prompt = self.builder.plain(row)
            except UserError as error:
                raise ApiError(400, str(error), param="messages", code="context_length_exceeded") from error
        passages = [_shown(number, context) for number, context in enumerate(self.builder.shown(row), 1)]
        unread = len(request.messages) - 1
        extra = {"passages": passages, "cut_tokens": prompt.cut} | ({"unread_messages": unread} if unread else {})
        return prompt.text, prompt.tokens, extra

    def generations(
        self,
        model: ServedModel,
        request: ChatRequest,
        prompt: PreparedPrompt,
        seed: int,
        tell: Callable[[int, str | Finish | Exception], None],
    ) -> list[Generation]:
        """What the decoder is to do for a request: a generation for each choice.

        Choice i draws with the random key of (seed, i), so that its text depends on nothing that runs beside it.

        Args:
          tell: called with a choice and its new text, its end or its error; in a decoder thread.
        """
        temperature = request.temperature
        if temperature is None:  # as OpenAI's; those that retrieve answer as `answer` does
            temperature = 0.0 if model.retrieves else 1.0
        sampling = SamplingParams(temperature, request.top_p, request.top_k, request.min_p)
        begins_alike = model.shared and tuple(prompt.tokens[: len(model.shared)]) == model.shared
        prefill = PrefillRequest(prompt.tokens, model.shared_prefix if begins_alike else None)
        return [self._generation(model, prefill, prompt, i, f"seed {seed}", sampling, tell) for i in range(request.n)]

    def _generation(self, model, prefill, prompt: PreparedPrompt, i: int, question_id, sampling, tell) -> Generation:
        text, arrived = TextStream(self.tokenizer, prompt.stop), time.monotonic()

        def follow(tokens: list[int]) -> bool:
            new, stopped = text.add(tokens)
            if new:
                tell(i, new)
            return stopped

        def end(outcome: Completion | Exception) -> None:
            if isinstance(outcome, Exception):
                tell(i, outcome)
                return
            try:
                with TASKS_LOCK:
                    new, stopped, count = text.end(outcome.tokens)
                if new:
                    tell(i, new)
                extra = _timings(arrived, generation.started, count)
                if model.retrieves:
                    rationale, answer, _ = answers.parse(text.text, prompt.thinking, self.builder.answer_line)
                    extra |= {"rationale": rationale, "answer": answer}
                tell(i, Finish("stop" if stopped or outcome.finished else "length", count, extra))
            except Exception as error:  # it must not end the decoder
                tell(i, error)

        request = DecodeRequest(
            [prompt.tokens[-1:]], prompt.max_new_tokens, sampling, question_id, i, stop_function=follow
        )
        generation = Generation(prefill, request, end)
        return generation

    def close(self) -> bool:
        """End everything that is decoded; returns whether all threads ended."""
        return all([decoder.close() for decoder in self.decoders])


def _timings(arrived: float, started: float, tokens: int) -> dict:
    """How long a choice waited for a slot and was decoded, prefill included, and its new tokens per second."""
    seconds = time.monotonic() - started
    rate = round(tokens / seconds, 1) if seconds > 0 else None
    return {"waited_seconds": round(started - arrived, 3), "seconds": round(seconds, 3), "tokens_per_second": rate}


def _shown(number: int, context: dict) -> dict:
    """A passage as a reply shows it."""
    place = {"place": documents.describe(context["source"])} if "source" in context else {}
    fields: Iterable[tuple[str, Any]] = ((name, context[name]) for name in ("score", "source") if name in context)
    return {"number": number, "title": context["title"], "text": context["text"], **dict(fields), **place}
