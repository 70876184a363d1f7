"""Retrieval over HTTP, in the protocol of Search-R1 and FlashRAG's users, from both sides.

    POST /retrieve {"queries": ["...", ...], "topk": 3, "return_scores": true}
    -> {"result": [[{"document": {"contents": "\\"Title\\"\\nText", ...}, "score": 1.5}, ...], ...]}

Ours has title, text and source (file, page, heading) apart too. Without `return_scores` the documents stand alone.
"""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.rag.files import parse_json
from roserag_jax.retrieval.cache import context_of
from roserag_jax.retrieval.remote import REQUESTS, in_batches

TIMEOUT, RETRIES = 120, 5
IDLE_SECONDS = 60  # in which a client must send something
MAX_REQUEST, MAX_QUERIES, MAX_TOPK = 16 << 20, 10_000, 1000


class Server:
    """Asks a retrieval server, in batches, several at a time; one that is busy or restarting is asked again.

    Args:
      url: of the server; '/retrieve' is added where it names no path.
    """

    def __init__(self, url: str):
        import requests
        from urllib3.util import Retry

        self.url = url if url.rstrip("/").count("/") > 2 else f"{url.rstrip('/')}/retrieve"
        codes, posts = (429, 500, 502, 503, 504), frozenset(["POST"])
        again = Retry(
            total=RETRIES, backoff_factor=0.5, status_forcelist=codes, allowed_methods=posts, raise_on_status=False
        )
        self.session = requests.Session()
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=again, pool_maxsize=REQUESTS))

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The server's best passages for each query, at most k, as contexts `{title, text, score?, source?}`.

        Raises:
          UserError: the server cannot be reached, refuses, or answers something else.
        """
        return [*in_batches(lambda batch: self._ask(batch, k), queries)]

    def _ask(self, queries: list[str], k: int) -> list[list[dict]]:
        import requests

        where = f"config.retrieve.server={self.url}"
        asked = {"queries": queries, "topk": k, "return_scores": True}
        try:
            reply = self.session.post(self.url, json=asked, timeout=TIMEOUT)
        except requests.RequestException as error:
            raise UserError(f"{where} does not answer ({first_line(error)}).") from error
        if reply.status_code != 200:
            raise UserError(f"{where} answers {reply.status_code} {reply.reason}: {quote(reply.text)}.")
        answer = parse_json(reply.content.decode("utf-8", "replace"), where)
        found = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(queries) or not all(isinstance(f, list) for f in found):
            raise UserError(f"{where} does not answer with a 'result' of one list for each of {len(queries)} queries.")
        return [[_context(entry, where) for entry in entries[:k]] for entries in found]


def _context(entry: Any, where: str) -> dict:
    """A document, with its score or alone."""
    if isinstance(entry, dict) and isinstance(entry.get("document"), dict):
        entry = entry["document"] | ({"score": entry["score"]} if "score" in entry else {})
    return context_of(entry, where)


def serve(search: Callable[[list[str], int], list[list[dict]]], port: int, host: str = "127.0.0.1", topk: int = 10):
    """A server that offers a retriever's `search`; `serve_forever()` runs it. Port 0 takes a free one.

    Args:
      topk: passages of a request that names no number.
    """

    searching = threading.Lock()  # a retriever is not made for several threads at once

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = IDLE_SECONDS

        def do_POST(self) -> None:
            if self.path.rstrip("/") != "/retrieve":
                self._reply(404, {"error": "POST /retrieve is all there is"})
                return
            try:
                size = int(self.headers.get("Content-Length", ""))
                if not 0 <= size <= MAX_REQUEST:
                    raise ValueError(f"a request has at most {MAX_REQUEST} bytes")
                queries, k, scores = _request(self.rfile.read(size), topk)
            except (ValueError, UserError) as error:
                self.close_connection = True
                self._reply(400, {"error": first_line(error)})
                return
            try:
                with searching:
                    found = search(queries, k)
            except UserError as error:  # of the retriever: a damaged index, a server that it asks
                self._reply(500, {"error": first_line(error)})
                return
            self._reply(200, {"result": [[_entry(c, scores) for c in contexts] for contexts in found]})

        def _reply(self, status: int, answer: dict) -> None:
            body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    return ThreadingHTTPServer((host, port), Handler)


def _request(body: bytes, topk: int) -> tuple[list[str], int, bool]:
    """The queries of a request, how many passages each wants, and whether with scores."""
    asked = parse_json(body.decode("utf-8"), "the request")
    queries = asked.get("queries") if isinstance(asked, dict) else None
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("'queries' must be a list of texts")
    k, scores = asked.get("topk", topk), asked.get("return_scores", False)
    if len(queries) > MAX_QUERIES or type(k) is not int or not 1 <= k <= MAX_TOPK or not isinstance(scores, bool):
        limits = f"at most {MAX_QUERIES} queries, 'topk' from 1 to {MAX_TOPK}, 'return_scores' true or false"
        raise ValueError(limits)
    return queries, k, scores


def _entry(context: dict, scores: bool) -> dict:
    """A context as the protocol has it."""
    text = f'"{context["title"]}"\n{context["text"]}' if context["title"] else context["text"]
    document = {"contents": text} | {name: context[name] for name in ("title", "text", "source") if name in context}
    return {"document": document, "score": context.get("score", 0.0)} if scores else document
