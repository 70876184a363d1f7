"""Retrieval over HTTP against real servers: our own, and one in the letters of Search-R1."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from conftest import write_lines

from roserag_jax import options, retrieve
from roserag_jax.errors import UserError
from roserag_jax.rag.corpora import Corpus
from roserag_jax.retrieval import indexing, remote, server
from roserag_jax.retrieval.index import Index
from roserag_jax.workdir import Workdir

ROWS = [{"id": i, "contents": f'"T{i}"\nMoss {i} is green, kelp {i % 7} is brown.'} for i in range(50)]


@pytest.fixture
def running():
    """Starts servers on free ports and ends them."""
    started = []

    def start(made):
        threading.Thread(target=made.serve_forever, daemon=True).start()
        started.append(made)
        return f"http://127.0.0.1:{made.server_address[1]}"

    yield start
    for made in started:
        made.shutdown()
        made.server_close()


@pytest.fixture
def index(tmp_path):
    indexing.update(tmp_path / "index", Corpus(write_lines(tmp_path / "c.jsonl", *ROWS)))
    return Index(tmp_path / "index")


def test_server_finds_what_the_index_finds(index, running, monkeypatch):
    monkeypatch.setattr(remote, "BATCH", 8)
    url = running(server.serve(index.search, 0, "127.0.0.1"))
    queries = [f"moss {i} or kelp?" for i in range(30)] + ["nothing"]
    assert server.Server(url).search(queries, 3) == index.search(queries, 3)
    assert server.Server(f"{url}/retrieve").search(["moss 7"], 1)[0][0]["title"] == "T7"


def test_serve_searches_for_one_request_at_a_time(running):
    """An encoder's tokenizer is not made for several threads."""
    inside, most = [], []

    def search(queries, k):
        inside.append(queries)
        time.sleep(0.02)
        most.append(len(inside))
        inside.pop()
        return [[{"title": "", "text": query}] for query in queries]

    client = server.Server(running(server.serve(search, 0, "127.0.0.1")))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: client.search([f"moss {i}"], 1)[0][0]["text"], range(8)))
    assert found == [f"moss {i}" for i in range(8)] and most == [1] * 8


def test_serve_closes_a_connection_that_sends_nothing(running, monkeypatch):
    monkeypatch.setattr(server, "IDLE_SECONDS", 0.2)
    made = server.serve(lambda queries, k: [], 0, "127.0.0.1")
    running(made)
    with socket.create_connection(made.server_address, timeout=10) as connection:
        connection.sendall(b"POST /retrieve HTTP/1.1\r\nContent-Length: 10\r\n\r\n")
        assert connection.recv(1000) == b""


@pytest.mark.parametrize(("host", "expected"), [("", "--host is empty"), ("a" * 70, "name another")])
def test_serve_needs_an_address(host, expected, monkeypatch, index):
    """An empty one, of a variable that was never set, would be open to every machine."""
    config = options.defaults()
    config.index = str(index.folder)
    monkeypatch.setattr(retrieve, "_HOST", types.SimpleNamespace(value=host))
    with pytest.raises(UserError, match=expected):
        retrieve._serve(config, 0)


def test_serve_speaks_search_r1s_protocol(index, running):
    url = running(server.serve(index.search, 0, "127.0.0.1", topk=2)) + "/retrieve"
    ask = lambda **body: requests.post(url, json=body, timeout=30)
    (entries,) = ask(queries=["moss 7"], topk=3, return_scores=True).json()["result"]
    assert len(entries) == 3 and entries[0]["score"] > entries[1]["score"]
    assert entries[0]["document"]["contents"] == ROWS[7]["contents"]
    (alone,) = ask(queries=["moss 7"]).json()["result"]
    assert len(alone) == 2 and alone[0]["contents"] == ROWS[7]["contents"]
    assert ask(queries=[]).json() == {"result": []}
    for bad in (
        {},
        {"queries": "moss"},
        {"queries": [1]},
        {"queries": ["a"], "topk": 0},
        {"queries": ["a"], "topk": "3"},
    ):
        assert ask(**bad).status_code == 400 and "error" in ask(**bad).json()
    assert requests.post(url, data=b"{", timeout=30).status_code == 400
    assert requests.post(url, data=b"[" * 100_000, timeout=30).status_code == 400
    assert requests.post(url.replace("retrieve", "other"), json={}, timeout=30).status_code == 404


def other_server(answers):
    """A server of somebody else: each request is answered by the next (status, body)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(answer(asked) if callable(answer) else answer)

        def log_message(self, *_):
            pass

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


def test_server_asks_again_and_names_what_is_wrong(running, monkeypatch):
    monkeypatch.setattr(server, "RETRIES", 2)
    good = json.dumps({"result": [[{"document": {"id": "1", "contents": '"T"\nMoss.'}, "score": 2}, {"text": "a"}]]})
    url = running(other_server([(503, b""), (429, b""), (200, good.encode())]))
    expected = [{"title": "T", "text": "Moss.", "score": 2.0}, {"title": "", "text": "a"}]
    assert server.Server(url).search(["moss"], 5) == [expected]
    wrong = [(404, b"<html>no</html>"), *((200, body) for body in (b"<html>", b"{}", b'{"result": []}'))]
    wrong.append((200, b'{"result": [[5]]}'))
    for answer, match in zip(wrong, ("404", "not valid JSON", "'result'", "'result'", "must be"), strict=True):
        with pytest.raises(UserError, match=rf"config\.retrieve\.server=.*{match}"):
            server.Server(running(other_server([answer]))).search(["moss"], 5)
    with pytest.raises(UserError, match="does not answer"):
        server.Server("http://127.0.0.1:9").search(["moss"], 5)


def test_an_error_of_the_retriever_reaches_who_asks(running, monkeypatch):
    def search(queries, k):
        raise UserError("index/00.idx is damaged: delete the folder.")

    monkeypatch.setattr(server, "RETRIES", 1)
    url = running(server.serve(search, 0, "127.0.0.1"))
    reply = requests.post(f"{url}/retrieve", json={"queries": ["moss"]}, timeout=30)
    assert reply.status_code == 500 and reply.json() == {"error": "index/00.idx is damaged: delete the folder."}
    with pytest.raises(UserError, match=r"config\.retrieve\.server=.*500.*00\.idx is damaged"):
        server.Server(url).search(["moss"], 1)


def test_retrieve_serves_and_is_asked(tmp_path):
    """The command in a process of its own, asked by another stage's retriever, and ended by SIGTERM."""
    corpus = write_lines(tmp_path / "c.jsonl", *ROWS)
    command = [sys.executable, "-m", "roserag_jax.retrieve", "--serve", "0", f"--config.retrieve.corpus={corpus}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        address = next(line.split()[-1].strip(".") for line in process.stdout if "Serving" in line)
        assert address.startswith("127.0.0.1:")  # others are let in by --host alone
        config = options.defaults()
        config.workdir = str(tmp_path / "work")
        config.data.eval = write_lines(tmp_path / "q.jsonl", {"question": "Moss 7?", "golden_answers": ["green"]})
        config.retrieve.retriever, config.retrieve.server = "server", f"http://{address}"
        work = Workdir(config.workdir)
        retrieve.make(config, work, ("eval",))
        assert work.rows("retrieved_eval.jsonl")[0]["contexts"][0]["title"] == "T7"
    finally:
        process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(
        "Stopped by SIGTERM. The server has ended; "
    )  # there is nothing to resume
