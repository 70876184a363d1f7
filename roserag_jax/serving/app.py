"""The HTTP side: routes, limits, and who may ask.

    GET  /                       the page
    GET  /health                 load of the decoders
    GET  /v1/models              the models, as OpenAI lists them
    POST /v1/chat/completions    a completion, whole or as server-sent events

Nothing of a request names a file: the page's files are read once, when this module is imported.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import importlib.resources
import ipaddress
import re
import secrets
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from roserag_jax.errors import UserError
from roserag_jax.inference.service import Closed, Full, Generation
from roserag_jax.serving import protocol
from roserag_jax.serving.models import Models, ServedModel
from roserag_jax.serving.protocol import ApiError, ChatRequest, Finish, Reply

BODY_SECONDS = 10  # in which a request's body must arrive
KEEP_ALIVE_SECONDS = 10  # between two signs of life of a stream
RETRY_SECONDS = 5  # what a client is told that finds everything full
_BODY_BYTES, _BYTES_PER_TOKEN = 64 << 10, 32  # of a request's body, for each token of a prompt

_HOST = re.compile(r"(\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(:[0-9]+)?")
_FILES = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def _page_file(path: str) -> bytes:
    return (importlib.resources.files(__package__) / "page" / (path[1:] or "page.html")).read_bytes()


_PAGE = {path: _page_file(path) for path in _FILES}


def make_app(models: Models, *, names: tuple[str, ...] = (), api_key: str | None = None) -> Starlette:
    """The application.

    Args:
      names: host names by which it may be asked, besides IP addresses and localhost.
      api_key: what a request to /v1 must bring as a bearer token; None asks for none.
    """
    handlers = Handlers(models)
    files = [Route(path, handlers.page) for path in _FILES]
    return Starlette(
        routes=[
            *files,
            Route("/health", handlers.health),
            Route("/v1/models", handlers.list_models),
            Route("/v1/models/{name}", handlers.show_model),
            Route("/v1/chat/completions", handlers.complete, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, names=names, api_key=api_key)],
        exception_handlers={
            ApiError: _refuse,
            HTTPException: _refuse_http,
            ClientDisconnect: _nobody_there,
            Exception: _fail,
        },
    )


def _error_response(error: ApiError) -> JSONResponse:
    headers = {"retry-after": str(error.retry_after)} if error.retry_after else None
    return JSONResponse(error.body, error.status, headers)


async def _refuse(_: Request, error: ApiError) -> Response:
    return _error_response(error)


async def _refuse_http(request: Request, error: HTTPException) -> Response:
    return _error_response(ApiError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}"))


async def _nobody_there(_: Request, error: ClientDisconnect) -> Response:
    return Response(status_code=400)


async def _fail(_: Request, error: Exception) -> Response:
    return _error_response(_as_api_error(error))


def _as_api_error(error: Exception) -> ApiError:
    """The error that a client is told; a defect is printed here and not shown to it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Closed):
        return ApiError(503, "the server is stopping", "server_error", code="stopping", retry_after=RETRY_SECONDS)
    if isinstance(error, Full):
        return ApiError(429, f"the server is full: {error}", "server_error", code="full", retry_after=RETRY_SECONDS)
    if isinstance(error, UserError):  # the retriever's, say, whose server is down: no defect of ours
        print(f"error: {error}", file=sys.stderr)
        why = "the server cannot answer now; its log says why"
        return ApiError(503, why, "server_error", code="unavailable", retry_after=RETRY_SECONDS)
    traceback.print_exception(error, file=sys.stderr)
    return ApiError(500, "the server failed; its log says why", "server_error")


class Guard:
    """Lets a request through that names this host and brings the key; sets the headers of every response.

    A page of another site may have its own name point to this machine (DNS rebinding) and would then be of one origin
    with us. So a request must address an IP address, localhost or a name that was configured.
    """

    def __init__(self, app: ASGIApp, names: tuple[str, ...], api_key: str | None):
        self.app, self.names, self.api_key = app, {"localhost", *(name.lower() for name in names)}, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *ours]}
            await send(message)

        app = self.app
        if not self._is_for_us(headers.get(b"host", [])):
            app = _error_response(
                ApiError(403, "this host name is not served (config.serve.names lists those that are)", code="host")
            )
        elif self.api_key and scope["path"].startswith("/v1") and not self._has_key(headers.get(b"authorization", [])):
            app = _error_response(
                ApiError(401, "send the API key as 'Authorization: Bearer KEY'", code="invalid_api_key")
            )
        await app(scope, receive, send_with_headers)

    def _is_for_us(self, hosts: list[bytes]) -> bool:
        found = _HOST.fullmatch(hosts[0].decode("latin-1")) if len(hosts) == 1 else None
        if found is None:
            return False
        name = (found["address"] or found["name"]).lower()
        if name in self.names:
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return False

    def _has_key(self, values: list[bytes]) -> bool:
        scheme, _, key = b"".join(values).partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.api_key.encode())


@dataclasses.dataclass
class _Job:
    """A request that is being decoded: its generations, and what they tell, in the event loop."""

    reply: Reply
    deadline: float
    events: asyncio.Queue
    generations: list[Generation] = dataclasses.field(default_factory=list)

    async def told(self, wait: float) -> tuple[int, str | Finish] | None:
        """The next that a choice tells; None if nothing comes within `wait` seconds.

        Raises:
          ApiError: the time is up, or the choice failed.
        """
        left = self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, min(wait, left))):
                choice, event = await self.events.get()
        except TimeoutError:
            if left <= wait:
                raise ApiError(408, "the request took too long (config.serve.seconds)", code="timeout") from None
            return None
        if isinstance(event, Exception):
            raise _as_api_error(event)
        return choice, event


class Handlers:
    """What the routes do."""

    def __init__(self, models: Models):
        self.models, self.seconds = models, models.serve.seconds
        self.max_body = _BODY_BYTES + _BYTES_PER_TOKEN * models.builder.max_tokens

    async def page(self, request: Request) -> Response:
        """One of the page's files."""
        path = request.url.path
        return Response(_PAGE[path], media_type=_FILES[path])

    async def health(self, _: Request) -> Response:
        """That the server answers, and the load of each decoder."""
        load = {model.name: model.decoder.load() for model in self.models.by_name.values() if not model.retrieves}
        return JSONResponse({"status": "ok", "decoders": load})

    async def list_models(self, _: Request) -> Response:
        """All models."""
        cards = [model.card(self.models.created) for model in self.models.by_name.values()]
        return JSONResponse({"object": "list", "data": cards})

    async def show_model(self, request: Request) -> Response:
        """One model."""
        return JSONResponse(self.models.find(request.path_params["name"]).card(self.models.created))

    async def complete(self, request: Request) -> Response:
        """A chat completion.

        Raises:
          ApiError: it is refused, or takes too long.
        """
        deadline = time.monotonic() + self.seconds
        asked = protocol.parse_request(await self._body(request))
        model = self.models.find(asked.model)
        job = await self._begin(model, asked, deadline)
        if asked.stream:
            return _EventStream(
                self._stream(job), deadline + BODY_SECONDS, lambda: model.decoder.cancel(job.generations)
            )
        try:
            return JSONResponse(await _unless_gone(self._whole(job), request.receive))
        finally:
            model.decoder.cancel(job.generations)

    async def _body(self, request: Request) -> bytes:
        """The body, within limits of size and time."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a browser asks before it sends this to another site, and is refused
            raise ApiError(415, "send the request as application/json", code="content_type")
        body = bytearray()
        try:
            if int(request.headers.get("content-length", "0")) > self.max_body:
                raise ApiError(413, f"a request has at most {self.max_body} bytes", code="too_large")
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.max_body:
                        raise ApiError(413, f"a request has at most {self.max_body} bytes", code="too_large")
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds", code="timeout") from None
        return bytes(body)

    async def _begin(self, model: ServedModel, asked: ChatRequest, deadline: float) -> _Job:
        """Make the prompt of a request and hand it to the decoder."""
        prompt = await run_in_threadpool(self.models.prepare, model, asked)
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def tell(choice: int, event: str | Finish | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(events.put_nowait, (choice, event))

        job = _Job(Reply(asked, len(prompt.tokens), prompt.extra), deadline, events)
        seed = asked.seed if asked.seed is not None else secrets.randbits(63)
        job.generations = self.models.generations(model, asked, prompt, seed, tell)
        try:
            model.decoder.submit(job.generations)
        except (Full, Closed) as error:
            raise _as_api_error(error) from error
        return job

    async def _whole(self, job: _Job) -> dict:
        """The reply as one object."""
        n = job.reply.request.n
        texts, ends = [""] * n, [None] * n
        while None in ends:
            if told := await job.told(self.seconds):
                choice, event = told
                if isinstance(event, Finish):
                    ends[choice] = event
                else:
                    texts[choice] += event
        return job.reply.complete(texts, ends)

    async def _stream(self, job: _Job) -> AsyncIterator[bytes]:
        """The reply as server-sent events, an error among them."""
        reply, ends = job.reply, [None] * job.reply.request.n
        try:
            for choice in range(len(ends)):
                yield protocol.event(reply.first(choice))
            while None in ends:
                told = await job.told(KEEP_ALIVE_SECONDS)
                if told is None:
                    yield b": waiting\n\n"
                    continue
                choice, event = told
                if isinstance(event, Finish):
                    ends[choice] = event
                    yield protocol.event(reply.last(choice, event))
                else:
                    yield protocol.event(reply.delta(choice, event))
            if reply.request.stream_options.include_usage:
                yield protocol.event(reply.usage(ends))
        except ApiError as error:
            yield protocol.event(error.body)
        yield protocol.event("[DONE]")


async def _gone(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_gone(work: Awaitable, receive: Receive, until: float | None = None):
    """The result of `work`, which is cancelled when the client goes or, at `until`, has not taken it.

    Raises:
      ClientDisconnect: it has gone.
    """
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))]
    try:
        wait = None if until is None else max(0.0, until - time.monotonic())
        await asyncio.wait(tasks, timeout=wait, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _EventStream(Response):
    """A response of server-sent events; `close()` is called when they end or the client goes or does not read."""

    def __init__(self, events: AsyncIterator[bytes], until: float, close: Callable[[], None]):
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self.events, self.until, self.close = events, until, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they come."""

        async def send_all() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

        try:
            with contextlib.suppress(ClientDisconnect):
                await _unless_gone(send_all(), receive, self.until)
        finally:
            self.close()
