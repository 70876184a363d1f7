"""The server as its users meet it: OpenAI's own client, a person with a browser, and whoever stops it."""

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import requests
from conftest import run_command, start_command

pytestmark = pytest.mark.browser

MESSAGES = [{"role": "user", "content": "Which colour is moss?"}]


@pytest.fixture(scope="module")
def client(server_url):
    return openai.OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)


def test_openai_client_gets_completions_streams_and_models(client):
    """Whole and as a stream, several choices, usage, and the passages in an extra field."""
    assert [model.id for model in client.models.list()] == ["base", "adapter", "roserag-base", "roserag"]
    values = {"model": "adapter", "messages": MESSAGES, "n": 2, "seed": 3, "max_tokens": 30, "stop": ["q!"]}
    whole = client.chat.completions.create(**values)
    assert whole.usage.completion_tokens == 60 and {c.finish_reason for c in whole.choices} == {"length"}
    texts = ["", ""]
    for chunk in client.chat.completions.create(**values, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and chunk.usage == whole.usage
    found = client.chat.completions.create(model="roserag", messages=MESSAGES, max_completion_tokens=5)
    assert found.model_extra["roserag"]["passages"][0]["place"] == "moss.md, Plants"


def test_openai_client_raises_its_own_errors(client):
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        create(model="gpt-4", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as refused:
        create(model="base", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "a"}}])
    assert refused.value.param == "tools"


def test_openai_async_clients_are_served_together(server_url):
    """32 at once over the official client: each gets the text that it gets alone."""
    import asyncio

    async def ask():
        client = openai.AsyncOpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0)
        create = lambda seed: client.chat.completions.create(
            model="base", messages=MESSAGES, seed=seed, temperature=1, max_tokens=20
        )
        together = await asyncio.gather(*map(create, range(32)))
        alone = [await create(seed) for seed in (0, 17, 31)]
        await client.close()
        text = lambda reply: reply.choices[0].message.content
        assert [text(together[seed]) for seed in (0, 17, 31)] == [text(reply) for reply in alone]

    with ThreadPoolExecutor(1) as pool:  # the browser's driver has a loop in this thread
        pool.submit(asyncio.run, ask()).result()


@pytest.fixture
def page(browser, server_url):
    """The page, and what its console and its policy complained of."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.complaints = []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(server_url)
    yield page
    page.close()


def test_page_asks_both_models_side_by_side(page, violations):
    """A question, by the keyboard alone: two answers with their speed, and the passages with their places as text."""
    page.keyboard.type("Which colour is moss?")
    page.keyboard.press("Enter")
    page.locator("article .answer").nth(1).wait_for(timeout=60_000)
    assert page.locator("article .name").all_inner_texts() == ["roserag-base", "roserag"]
    for state in page.locator("article .state").all_inner_texts():
        assert "tokens/s" in state
    texts = page.locator("article .text").all_inner_texts()
    assert all(texts) and texts[0] != texts[1]
    passages = page.locator("#passages li")
    assert passages.count() == 2 and "moss.md, Plants" in passages.nth(0).inner_text()
    assert "<script>document.title = 'moss'</script>" in passages.nth(0).inner_text()
    assert "<b>early</b>" in passages.nth(1).inner_text()
    assert page.title() == "RoseRAG" and page.locator("#passages script, #passages b").count() == 0
    assert violations(page) == []
    assert page.complaints == []


def test_page_stops_and_says_what_is_wrong(page, server_url):
    """Stop ends what is still answering; a question that is too long and a server that is gone are said in words."""
    page.fill("#tokens", "1500")
    page.fill("#question", "Which colour is moss?")
    page.click("#submit")
    page.locator("article .state", has_text="Answering.").first.wait_for(timeout=60_000)
    page.click("#stop")
    page.locator("article .state", has_text="Stopped.").first.wait_for()
    page.locator("article .state", has_text="Answering.").first.wait_for(state="hidden")
    page.fill("#question", "long " * 100)
    page.click("#submit")
    page.wait_for_selector("article .failed")
    assert "leave no room for passages" in page.locator("article .failed").first.inner_text()
    page.route("**/v1/models", lambda route: route.fulfill(status=401, body=json.dumps({"error": {"message": "no"}})))
    page.click("#submit")
    page.wait_for_selector("#key", state="visible")
    assert page.inner_text("#problem") == "no."


def test_page_of_another_site_cannot_ask(browser, server_url):
    """A browser lets no page of another origin read an answer or send a question."""
    page = browser.new_page()
    page.route("http://evil.example/", lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html"))
    page.goto("http://evil.example/")
    ask = """async ([url, type]) => {
        const question = {model: "base", messages: [{role: "user", content: "a"}]};
        const request = {method: "POST", headers: {"Content-Type": type}, body: JSON.stringify(question)};
        return fetch(url + "/v1/chat/completions", request).then((reply) => reply.text(), () => "refused");
    }"""
    for kind in ("application/json", "text/plain"):
        assert page.evaluate(ask, [server_url, kind]) == "refused"
    page.close()


def test_sigterm_tells_requests_in_flight_and_ends_with_143(config_of, tmp_path):
    """A stream in the middle gets an error event; the process ends in one line."""
    (tmp_path / "moss.txt").write_text("Moss is green.")
    config = config_of(**{"retrieve.corpus": str(tmp_path), "serve.max_tokens": 100_000, "serve.seconds": 1000})
    process = start_command("answer", config, "--serve", "0", stderr=-1)
    threading.Timer(240, process.kill).start()
    line = process.stdout.readline()
    assert line.startswith("Serving base, roserag on http://127.0.0.1:")
    client = openai.OpenAI(base_url=f"{line.split()[-1]}/v1", api_key="none", max_retries=0)
    endless = {"model": "base", "messages": MESSAGES, "n": 8, "temperature": 1, "stream": True}
    stream = client.chat.completions.create(**endless)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="the server is stopping"):
        for _ in stream:
            pass
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and errors.splitlines()[-1].startswith("Stopped by SIGTERM. The server has ended")
    assert "Traceback" not in errors
    with pytest.raises(requests.ConnectionError):
        requests.get(line.split()[-1], timeout=5)


def test_serve_without_the_extra_says_what_to_install(config_of, tmp_path):
    (tmp_path / "starlette.py").write_text("raise ModuleNotFoundError('No module', name='starlette')\n")
    done = run_command("answer", config_of(), "--serve", "0", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        "error: --serve needs the extra 'serve': pip install 'roserag_jax[serve]' (starlette)."
    )
