"""OpenAI's chat completions: what is accepted, and what is refused by name."""

import json

import pytest

from roserag_jax.serving.protocol import ApiError, parse_request

MESSAGES = [{"role": "user", "content": "Why?"}]


def parse(**values):
    return parse_request(json.dumps({"model": "base", "messages": MESSAGES, **values}).encode())


def test_request_with_the_values_that_clients_always_send_is_accepted():
    neutral = {
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "top_logprobs": None,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "user": "me",
        "metadata": {"a": "b"},
    }
    request = parse(**neutral, stop="\n", max_tokens=5, temperature=1, stream_options={"include_usage": True})
    assert (request.stop, request.max_tokens, request.temperature, request.n) == (["\n"], 5, 1.0, 1)
    assert request.stream_options.include_usage and parse(stop=["a", "b"]).stop == ["a", "b"]
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "?"}]
    request = parse(messages=[{"role": "developer", "content": "Short."}, {"role": "user", "content": parts}])
    assert [message.text for message in request.messages] == ["Short.", "Why?"]


@pytest.mark.parametrize(
    "values, param, message",
    [
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
        ({"logprobs": True}, "logprobs", "logprobs is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "not supported"),
        ({"beam_width": 4}, "beam_width", "unknown parameter beam_width"),
        ({"n": 9}, "n", "n: input should be less than or equal to 8, not 9"),
        ({"n": True}, "n", "n: input should be a valid integer, not True"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0, not -0.1"),
        ({"temperature": "hot"}, "temperature", "temperature: input should be a valid number, not 'hot'"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", "either max_tokens or max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"seed": 1 << 63}, "seed", "less than"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": None}, "messages", "messages is missing"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'system', 'developer', 'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "'text'"),
        ({"model": None}, "model", "model is missing"),
    ],
)
def test_request_that_asks_for_something_else_is_refused_by_name(values, param, message):
    with pytest.raises(ApiError, match=message.replace("(", r"\(")) as refused:
        parse(**values)
    assert refused.value.status == 400 and refused.value.body["error"]["param"] == param
    assert refused.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 100_000, "nested more than"),
        (b'{"model": 1e999}', "not a finite number"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_body_that_is_not_a_json_object_is_refused(body, message):
    with pytest.raises(ApiError, match=message) as refused:
        parse_request(body)
    assert refused.value.status == 400
