"""OpenSearch is asked in batches, again when it is busy, and what it says wrong is one line."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from roserag_jax.errors import UserError
from roserag_jax.retrieval import opensearch, remote
from roserag_jax.retrieval.opensearch import OpenSearch

PASSAGES = [
    {"title": "Moss", "text": "Moss is green."},
    {"contents": '"Fern"\nFern is brown.'},
    {"title": "Kelp", "text": "Kelp is brown.", "source": {"file": "kelp.pdf", "page": 2}},
]


@pytest.fixture
def server():
    """A server of the part of the protocol that is used: _msearch over an index 'wiki', by words that are shared."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
            requests.append((self.path, [json.loads(line) for line in lines]))
            if failures:
                self.reply(failures.pop(), {"error": "busy"})
            elif self.path.split("?")[0] != "/wiki/_msearch":
                self.reply(404, {"error": {"type": "index_not_found_exception"}, "status": 404})
            else:
                self.reply(
                    200, answers.pop() if answers else {"responses": [self.one(q) for q in requests[-1][1][1::2]]}
                )

        def one(self, body):
            words = set(body["query"]["multi_match"]["query"].lower().split())
            shared = lambda p: len(words & set(" ".join(map(str, p.values())).lower().replace(".", "").split()))
            found = sorted((p for p in PASSAGES if shared(p)), key=lambda p: -shared(p))[: body["size"]]
            return {"hits": {"hits": [{"_source": p, "_score": float(shared(p))} for p in found]}}

        def reply(self, status, answer):
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    requests, failures, answers = [], [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}/wiki", requests, failures, answers
        http.shutdown()
        thread.join()


def test_opensearch_is_asked_in_batches(server, monkeypatch):
    monkeypatch.setattr(remote, "BATCH", 2)
    url, requests, _, _ = server
    found = OpenSearch(url).search(["kelp brown", "green", "nothing here", "fern", "is"], 2)
    kelp = {"title": "Kelp", "text": "Kelp is brown.", "source": {"file": "kelp.pdf", "page": 2}, "score": 2.0}
    assert found[0][0] == kelp and len(found[0]) == 2
    assert [[c["title"] for c in contexts] for contexts in found[1:]] == [["Moss"], [], ["Fern"], ["Moss", "Fern"]]
    assert sorted(len(lines) // 2 for _, lines in requests) == [1, 2, 2]
    assert OpenSearch(url).search([], 2) == []


def test_opensearch_that_is_busy_is_asked_again(server):
    url, requests, failures, _ = server
    failures += [503, 429]
    assert OpenSearch(url).search(["moss"], 1)[0][0]["text"] == "Moss is green." and len(requests) == 3


def test_opensearch_errors_are_one_line(server, monkeypatch):
    url, _, failures, answers = server
    with pytest.raises(UserError, match="/other does not answer.*404.*index_not_found"):
        OpenSearch(url.replace("wiki", "other")).search(["moss"], 1)
    failures += [503] * 9
    with pytest.raises(UserError, match="does not answer.*503"):
        OpenSearch(url).search(["moss"], 1)
    failures.clear()
    for answer, message in (
        ({"responses": []}, "one result for each of 1 queries"),
        ({"responses": [{"error": {"type": "parsing_exception"}}]}, "refuses: .*parsing_exception"),
        ({"responses": [{"hits": {}}]}, "answers without hits.hits"),
        ({"responses": [{"hits": {"hits": [{"_source": {"body": "x"}, "_score": 1}]}}]}, "a context must be"),
    ):
        answers.append(answer)
        with pytest.raises(UserError, match=message):
            OpenSearch(url).search(["moss"], 1)
    monkeypatch.setattr(opensearch, "RETRIES", 0)
    with pytest.raises(UserError, match="does not answer"):
        OpenSearch("http://127.0.0.1:9/wiki").search(["moss"], 1)
    for bad in ("http://host:9200", "host/wiki", "http://host:9200/a/b", "http://host:port/wiki", "http://[::1/wiki"):
        with pytest.raises(UserError, match="write it as http://HOST:9200/INDEX"):
            OpenSearch(bad)
