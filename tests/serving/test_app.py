"""The server over HTTP: answers that depend on nothing beside them, limits, and who may ask."""

import concurrent.futures
import json
import socket
import time
import types

import jax
import pytest
import requests
from starlette.testclient import TestClient

from roserag_jax.errors import UserError
from roserag_jax.rag import answers
from roserag_jax.serving import app, server

QUESTION = [{"role": "user", "content": "Which colour is moss?"}]
COMPLETIONS = "/v1/chat/completions"


def body(model="base", **values):
    return {"model": model, "messages": QUESTION, "max_tokens": 24, "temperature": 0, **values}


def post(url, model="base", **values):
    """A completion, which must be there."""
    reply = requests.post(url + COMPLETIONS, json=body(model, **values), timeout=120)
    assert reply.status_code == 200, reply.text
    return reply.json()


def texts(reply):
    return [choice["message"]["content"] for choice in reply["choices"]]


def streamed(url, **values):
    """The events of a stream."""
    values |= {"stream": True, "stream_options": {"include_usage": True}}
    reply = requests.post(url + COMPLETIONS, json=body(**values), timeout=120)
    assert reply.headers["content-type"].startswith("text/event-stream")
    pieces = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    assert pieces.pop() == "[DONE]"
    return [json.loads(piece) for piece in pieces]


def wait_until_idle(url):
    """Wait until nothing is decoded and nothing waits."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        load = requests.get(f"{url}/health", timeout=60).json()["decoders"].values()
        if not any(decoder["running"] + decoder["waiting"] for decoder in load):
            return
        time.sleep(0.05)
    pytest.fail(f"something is still decoded: {load}")


def test_completions_are_those_of_transformers(server_url, served, model_folder):
    """The base model's greedy text is that of transformers; the adapter's differs; tokens are counted."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    prompt = served.tokenizer(QUESTION[0]["content"] + "\n").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        made = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=2)
    reply = post(server_url)
    assert texts(reply) == [served.tokenizer.decode(made[0, len(prompt) :])] != texts(post(server_url, "adapter"))
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 24, "total_tokens": len(prompt) + 24}
    assert reply["choices"][0]["roserag"]["tokens_per_second"] > 0


def test_retrieving_model_answers_as_the_command_does(server_url, served):
    """The prompt has the passages, which the reply names with their places; what came before is not read."""
    messages = [{"role": "system", "content": "Be rude."}, *QUESTION]
    reply = post(server_url, "roserag", messages=messages)
    passages = reply["roserag"]["passages"]
    assert passages[0]["title"] == "moss" and "<script>" in passages[0]["text"] and passages[0]["number"] == 1
    assert passages[0]["place"] == "moss.md, Plants" and reply["roserag"]["unread_messages"] == 1
    question = QUESTION[0]["content"]
    row = {"id": "q", "question": question, "contexts": served.retriever.search([question], 2)[0]}
    assert reply["usage"]["prompt_tokens"] == len(served.builder.plain(row).tokens)
    choice = reply["choices"][0]
    rationale, answer, _ = answers.parse(choice["message"]["content"])
    assert (choice["roserag"]["rationale"], choice["roserag"]["answer"]) == (rationale, answer)
    assert texts(post(server_url, "roserag", temperature=None)) == texts(reply)  # greedy unless something else is asked
    assert texts(post(server_url, "roserag-base")) != texts(reply)


def test_stream_has_the_text_of_the_whole_reply(server_url):
    """Two choices that are drawn, one of them ended by a stop string: the same text, reasons and counts."""
    values = {"n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 40}
    whole = post(server_url, **values)
    text = texts(whole)[0]
    values["stop"] = [text[10:13]]
    whole = post(server_url, **values)
    assert texts(whole)[0] == text[: text.index(text[10:13])] and whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] < 80
    *chunks, usage = streamed(server_url, **values)
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert mine[0]["delta"]["role"] == "assistant" and mine[-1]["finish_reason"] == choice["finish_reason"]
        assert "".join(c["delta"].get("content", "") for c in mine) == choice["message"]["content"]
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    passages = streamed(server_url, model="roserag")[0]["roserag"]["passages"]
    assert [passage["title"] for passage in passages] == ["moss", "tin"]


def test_answers_beside_31_others_are_those_of_single_requests(server_url):
    """More than there are slots, of both models, drawn and greedy; each again alone."""
    asked = [
        {"model": ("base", "adapter", "roserag")[i % 3], "seed": i, "temperature": i % 2, "max_tokens": 10 + i % 7}
        for i in range(32)
    ]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        together = [*pool.map(lambda values: post(server_url, **values), asked)]
    for values, reply in [*zip(asked, together, strict=True)][::4]:
        alone = post(server_url, **values)
        assert (texts(alone), alone["usage"]) == (texts(reply), reply["usage"])
    assert len({texts(reply)[0] for reply in together}) > 20


def test_client_that_vanishes_gives_its_slots_back(server_url):
    """In the middle of a stream, and while it waits for a whole reply."""
    long = body(n=4, max_tokens=1500, seed=1, temperature=1.0)
    with requests.post(server_url + COMPLETIONS, json=long | {"stream": True}, stream=True, timeout=60) as reply:
        next(reply.iter_lines())
    with pytest.raises(requests.Timeout):
        requests.post(server_url + COMPLETIONS, json=long, timeout=0.3)
    started = time.monotonic()
    wait_until_idle(server_url)
    assert texts(post(server_url)) and time.monotonic() - started < 30


def test_full_server_refuses_at_once_and_says_when_to_try_again(server_url):
    """4 slots and 36 that wait: of ten requests of 8 completions some are refused; none of these is decoded."""
    long = body(n=8, max_tokens=1500, temperature=1.0, stream=True)
    replies = [requests.post(server_url + COMPLETIONS, json=long, stream=True, timeout=60) for _ in range(10)]
    refused = [reply for reply in replies if reply.status_code != 200]
    for reply in refused:
        assert reply.status_code == 429 and reply.headers["retry-after"] == "5"
        assert reply.json()["error"]["message"].startswith("the server is full: ")
    assert refused and len(refused) < 10
    for reply in replies:
        reply.close()
    wait_until_idle(server_url)


def test_time_of_a_request_is_limited(served, server_url, monkeypatch):
    """A whole reply becomes 408; a stream ends with an error event, as OpenAI's clients expect it."""
    long = body(n=8, max_tokens=1500, temperature=1.0)
    monkeypatch.setattr(served, "serve", types.SimpleNamespace(seconds=0.4, max_tokens=1500))
    client = TestClient(app.make_app(served), base_url="http://localhost")
    reply = client.post(COMPLETIONS, json=long)
    assert reply.status_code == 408 and "config.serve.seconds" in reply.json()["error"]["message"]
    lines = client.post(COMPLETIONS, json=long | {"stream": True}).text.split("\n\n")
    assert json.loads(lines[-3][6:])["error"]["code"] == "timeout" and lines[-2] == "data: [DONE]"
    wait_until_idle(server_url)


@pytest.fixture
def client(served):
    return TestClient(app.make_app(served, names=("gpu1.example",)), base_url="http://localhost")


def test_models_are_listed_one_by_one_and_together(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["base", "adapter", "roserag-base", "roserag"]
    assert client.get("/v1/models/roserag").json() == listed["data"][-1]
    assert client.get("/v1/models/gpt").status_code == 404


def test_base_and_adapter_share_the_frozen_weights(served):
    """The adapter's arrays are the base model's own, but for the adapter."""
    base, adapter = ({id(a) for a in jax.tree.leaves(decoder.engine.weights)} for decoder in served.decoders)
    assert base < adapter and len(base) > 10


@pytest.mark.parametrize(
    "values, status, message",
    [
        ({"model": "gpt"}, 404, "there is no model 'gpt', only base, adapter, roserag-base, roserag"),
        ({"max_tokens": 1501}, 400, "at most 1500 new tokens are generated"),
        ({"messages": [{"role": "user", "content": "a" * 400}]}, 400, "401 tokens, where a prompt has at most 320"),
        ({"model": "roserag", "messages": [{"role": "user", "content": "a" * 400}]}, 400, "no room for passages"),
        ({"model": "roserag", "messages": [{"role": "system", "content": "a"}]}, 400, "the last user message is the"),
        ({"tools": [1]}, 400, "tools is not supported"),
    ],
)
def test_refusal_is_in_openais_shape(client, values, status, message):
    reply = client.post(COMPLETIONS, json=body(**values))
    assert reply.status_code == status and message in reply.json()["error"]["message"]
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_chat_template_decides_which_messages_are_taken(served, client, monkeypatch):
    """A template that takes no system turn refuses it; marks of turns in a message are broken up."""
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    )
    monkeypatch.setattr(served.tokenizer._tokenizer, "chat_template", template)
    reply = client.post(COMPLETIONS, json=body(messages=[{"role": "system", "content": "a"}, *QUESTION]))
    assert reply.status_code == 400 and "no system turns" in reply.json()["error"]["message"]
    asked = app.protocol.parse_request(json.dumps(body(messages=[{"role": "user", "content": "a</s>b"}])).encode())
    tokens = served.prepare(served.find("base"), asked).tokens
    assert served.tokenizer.decode(tokens) == "<s>user: a< /s>b</s>"


def test_body_is_limited_in_size_time_and_kind(client, server_url, monkeypatch):
    reply = client.post(COMPLETIONS, content=b"{" + b" " * 200_000, headers={"content-type": "application/json"})
    assert reply.status_code == 413 and "75776 bytes" in reply.json()["error"]["message"]
    pieces = (b" " * 10_000 for _ in range(20))
    reply = client.post(COMPLETIONS, content=pieces, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert client.post(COMPLETIONS, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    monkeypatch.setattr(app, "BODY_SECONDS", 0.2)
    host, port = server_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"
        )
        slow.sendall(head.encode() + b"\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_head_that_does_not_come_closes_its_connection(server_url, monkeypatch):
    """Drop by drop, at the beginning and behind a request that was answered; one that is decoded for longer stays."""
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    host, port = server_url.removeprefix("http://").split(":")
    for first in (b"", f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()):
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            if first:
                slow.sendall(first)
                assert slow.recv(4000).startswith(b"HTTP/1.1 200 ")
            for _ in range(3):
                slow.sendall(b"G")
                time.sleep(0.05)
            while slow.recv(4000):
                pass
    assert post(server_url, max_tokens=100)


def test_port_that_is_taken_is_named():
    with (
        server.listen("127.0.0.1", 0) as taken,
        pytest.raises(UserError, match=r"\(Address already in use\); name another"),
    ):
        server.listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot listen on 203.0.113.1 port 80"):
        server.listen("203.0.113.1", 80)


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("gpu1.example:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example:80@localhost", 403),
        ("localhost:x", 403),
        ("", 403),
    ],
)
def test_request_under_another_host_name_is_refused(client, host, status):
    assert client.get("/health", headers={"host": host}).status_code == status


def test_api_key_is_asked_for_below_v1_alone(served):
    client = TestClient(app.make_app(served, api_key="secret"), base_url="http://localhost")
    ask = lambda **headers: client.get("/v1/models", headers=headers)
    assert ask().status_code == 401 and ask(authorization="Bearer wrong").status_code == 401
    assert ask(authorization="Bearer secret").status_code == 200
    for value in ("Basic secret", "Bearer", "Bearer s\u00e9cret".encode()):
        assert ask(authorization=value).status_code == 401
    assert client.get("/health").status_code == client.get("/").status_code == 200
    assert client.post(COMPLETIONS, json=body()).status_code == 401


def test_api_key_that_is_empty_is_refused(monkeypatch):
    """Of a variable that was never set; the server would be open to everybody."""
    for value, expected in (("secret", "secret"), ("secret\n", "secret")):
        monkeypatch.setenv("ROSERAG_API_KEY", value)
        assert server.api_key() == expected
    for value in ("", " \n"):
        monkeypatch.setenv("ROSERAG_API_KEY", value)
        with pytest.raises(UserError, match="ROSERAG_API_KEY is empty"):
            server.api_key()
    monkeypatch.delenv("ROSERAG_API_KEY")
    assert server.api_key() is None


def test_retriever_that_is_down_is_one_line_and_503(capsys):
    """The client is told to come again, and not where the retriever is."""
    found = app._as_api_error(UserError("config.retrieve.server=http://inside:1 does not answer."))
    assert found.status == 503 and found.retry_after and "inside" not in json.dumps(found.body)
    assert capsys.readouterr().err == "error: config.retrieve.server=http://inside:1 does not answer.\n"


def test_nothing_but_the_pages_own_files_can_be_read(client):
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "<script src" in page.text
    assert client.get("/page.js").headers["content-type"].startswith("text/javascript")
    for path in (
        "/page.html",
        "/..%2f..%2fpyproject.toml",
        "/page.css/x",
        "//etc/passwd",
        "/v1/models/..%2f..%2fx",
        "/v1",
    ):
        reply = client.get(path)
        assert reply.status_code == 404 and reply.json()["error"]["type"] == "invalid_request_error"
        assert "default-src" in reply.headers["content-security-policy"]
    assert client.get(COMPLETIONS).status_code == 405
