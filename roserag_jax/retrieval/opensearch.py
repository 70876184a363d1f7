"""BM25 of an OpenSearch or Elasticsearch index, asked through OpenSearch's client (the extra `opensearch`)."""

import os
from urllib.parse import urlsplit

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.retrieval.cache import context_of
from roserag_jax.retrieval.remote import REQUESTS, in_batches

TIMEOUT, RETRIES = 60, 4
FIELDS = ("title", "text", "contents")


class OpenSearch:
    """Asks an index whose documents are `{title, text}` or `{contents}`, in batches, several at a time.

    A server that is busy or restarting is asked again.

    Args:
      url: of the index, 'http://HOST:9200/INDEX'. User and password are in OPENSEARCH_USER and OPENSEARCH_PASSWORD: an
        option is written to manifests.

    Raises:
      UserError: the URL names no index or holds a password, or the client is not installed.
    """

    def __init__(self, url: str):
        try:
            import opensearchpy
        except ImportError as error:
            raise UserError(f"config.retrieve.opensearch: {error} (pip install opensearch-py).") from error
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:  # a port that is no number, or half of an IPv6 address
            parts = port = None
        self.index = parts.path.strip("/") if parts else ""
        if not self.index or "/" in self.index or parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"config.retrieve.opensearch={quote(url)}: write it as http://HOST:9200/INDEX.")
        if parts.username:
            why = "user and password go into the environment variables OPENSEARCH_USER and OPENSEARCH_PASSWORD"
            raise UserError(f"config.retrieve.opensearch: {why}, for options are written to files.")
        user, password = (os.environ.get(f"OPENSEARCH_{name}", "") for name in ("USER", "PASSWORD"))
        self.where = f"config.retrieve.opensearch={parts.scheme}://{parts.hostname}:{port}/{self.index}"
        self.client = opensearchpy.OpenSearch(
            [{"host": parts.hostname, "port": port}],
            use_ssl=parts.scheme == "https",
            http_auth=(user, password) if user else None,
            timeout=TIMEOUT,
            max_retries=RETRIES,
            retry_on_timeout=True,
            retry_on_status=(429, 502, 503, 504),
            pool_maxsize=REQUESTS,
        )

    def search(self, queries: list[str], k: int) -> list[list[dict]]:
        """The index's best passages for each query, at most k, as contexts `{title, text, score, source?}`.

        Raises:
          UserError: the server cannot be reached, refuses, or answers something else.
        """
        return [*in_batches(lambda batch: self._ask(batch, k), queries)]

    def _ask(self, queries: list[str], k: int) -> list[list[dict]]:
        import opensearchpy

        match = lambda query: {"multi_match": {"query": query, "fields": list(FIELDS), "type": "cross_fields"}}
        body = [line for query in queries for line in ({}, {"query": match(query), "size": k})]
        try:
            answer = self.client.msearch(body=body, index=self.index)
        except opensearchpy.TransportError as error:  # of which ConnectionError is one
            raise UserError(f"{self.where} does not answer ({_why(error)}).") from error
        except opensearchpy.OpenSearchException as error:
            raise UserError(f"{self.where}: {first_line(error)}.") from error
        found = answer.get("responses") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != len(queries):
            raise UserError(f"{self.where} does not answer with one result for each of {len(queries)} queries.")
        return [self._contexts(one) for one in found]

    def _contexts(self, response: dict) -> list[dict]:
        """The passages of one query's response."""
        try:
            if "error" in response:
                raise UserError(f"{self.where} refuses: {quote(response['error'])}.")
            hits = [{**hit["_source"], "score": hit["_score"]} for hit in response["hits"]["hits"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.where} answers without hits.hits of {{_source, _score}}.") from error
        return [context_of(hit, self.where) for hit in hits]


def _why(error) -> str:
    """What the client knows of an error: the status and reason, or what the connection said."""
    status = error.args[0] if error.args else ""
    reason = error.args[1] if len(error.args) > 1 else first_line(error)
    return f"{status} {reason}" if isinstance(status, int) else first_line(Exception(reason))
