"""OpenAI's chat completions: what a request may say, what the replies look like, and errors in their shape.

A request is refused, by name, for every parameter that would change the reply and is not implemented; one that has the
value that changes nothing is accepted, for clients that always send it.
"""

import dataclasses
import json
import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from roserag_jax.errors import UserError, quote
from roserag_jax.rag.files import parse_json

MAX_CHOICES, MAX_STOP_STRINGS, MAX_STOP_LENGTH = 8, 4, 100
_INT64 = 1 << 63

# Parameters of the API that are not implemented, and the values of each that ask for nothing.
_NEUTRAL: dict[str, tuple] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An error for the client, in OpenAI's shape.

    Args:
      kind: OpenAI's `type`.
      code: OpenAI's `code`.
      param: the parameter that is wrong.
      retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Strict):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)]
    name: str | None = None
    refusal: None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return "".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """What a stream holds besides the text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # a plain stream has nothing to hide its lengths from


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_as_list = lambda value: [value] if isinstance(value, str) else value


class ChatRequest(_Strict):
    """The body of `POST /v1/chat/completions`.

    `top_k` and `min_p` are additions, as vLLM has them. The last four label a request and change nothing.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list)] = []
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


def parse_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
      ApiError: it is not valid, or asks for what is not implemented.
    """
    try:
        values = parse_json(body.decode("utf-8"), "the request")
    except UnicodeDecodeError:
        raise ApiError(400, "the request is not UTF-8 text") from None
    except UserError as error:
        raise ApiError(400, str(error)) from None
    if not isinstance(values, dict):
        raise ApiError(400, "the request is not a JSON object")
    for name, neutral in _NEUTRAL.items():
        if name in values and values.pop(name) not in neutral:
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    if "max_tokens" in values and "max_completion_tokens" in values:
        raise ApiError(400, "give either max_tokens or max_completion_tokens", param="max_tokens")
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        raise _invalid(error) from None


def _invalid(error: ValidationError) -> ApiError:
    """The first fault of a request, by its place."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter {where}", param=where, code="unknown_parameter")
    if fault["type"] == "missing":
        return ApiError(400, f"{where} is missing", param=where, code="missing_required_parameter")
    found = "" if isinstance(fault["input"], dict | list) else f", not {quote(fault['input'])}"
    message = fault["msg"][:1].lower() + fault["msg"][1:]
    return ApiError(400, f"{where}: {message}{found}", param=where, code="invalid_value")


@dataclasses.dataclass(frozen=True)
class Finish:
    """How a choice ended.

    Args:
      reason: OpenAI's `finish_reason`.
      tokens: new tokens up to its end.
      extra: what the reply says of the choice beyond the API, under `roserag`.
    """

    reason: Literal["stop", "length"]
    tokens: int
    extra: dict


class Reply:
    """The reply to one request, as one object or as the chunks of a stream.

    Args:
      extra: what the reply says beyond the API, under `roserag`.
    """

    def __init__(self, request: ChatRequest, prompt_tokens: int, extra: dict):
        self.request, self.prompt_tokens, self.extra = request, prompt_tokens, {"roserag": extra} if extra else {}
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }

    def complete(self, texts: list[str], ends: list[Finish]) -> dict:
        """The whole reply."""
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": end.reason,
                "logprobs": None,
                "roserag": end.extra,
            }
            for i, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        head = {**self.head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self._usage(ends), **self.extra}

    def first(self, index: int) -> dict:
        """The chunk that begins a choice."""
        return self._chunk(index, {"role": "assistant", "content": ""}) | self.extra

    def delta(self, index: int, text: str) -> dict:
        """A chunk of a choice's text."""
        return self._chunk(index, {"content": text})

    def last(self, index: int, end: Finish) -> dict:
        """The chunk that ends a choice."""
        return self._chunk(index, {}, end.reason, end.extra)

    def usage(self, ends: list[Finish]) -> dict:
        """The chunk behind all choices, for a request that wants it."""
        return {**self.head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(ends)}

    def _chunk(self, index: int, delta: dict, reason: str | None = None, extra: dict | None = None) -> dict:
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": None}
        choice |= {"roserag": extra} if extra else {}
        usage = {"usage": None} if self.request.stream_options.include_usage else {}
        return {**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage}

    def _usage(self, ends: list[Finish]) -> dict:
        new = sum(end.tokens for end in ends)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


def event(value: dict | str) -> bytes:
    """A server-sent event that holds an object, or a word such as [DONE]."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
