"""Runs the application: a socket, uvicorn in a thread, and an orderly end."""

import asyncio
import logging
import os
import socket
import threading

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from roserag_jax import signals
from roserag_jax.errors import UserError, first_line
from roserag_jax.serving.app import make_app
from roserag_jax.serving.models import Models

API_KEY = "ROSERAG_API_KEY"  # in the environment: other users of a machine can read a command line
HEAD_SECONDS = 10  # in which the head of a request must arrive
_END_SECONDS = 5  # for clients to take what is left for them
_HEADER_BYTES = 16 << 10


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
      UserError: the address is not this machine's, or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        why = why.partition(" (while")[0]  # Python repeats the address there
        raise UserError(f"--serve {port}: cannot listen on {host} port {port} ({why}); name another.") from error


def api_key() -> str | None:
    """The key that requests must bring, None where the environment has none.

    Raises:
      UserError: it is empty, as of a variable that was never set: the server would be open to everybody.
    """
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise UserError(f"{API_KEY} is empty: set it to the key, or unset it to ask for none.")
    return key and key.strip()  # a file that it was read from may end in a line feed


def url_of(listening: socket.socket) -> str:
    """Where a browser finds what listens on a socket."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Protocol(H11Protocol):
    """uvicorn's, but it closes a connection on which the head of a request does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take the next bytes."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        """Begin to wait for a head, or end it where the head has come."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_watching(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server:
    """Serves models in a thread of its own, from `with` to its end.

    At the end, requests that are being decoded are told (503, or an error event in a stream) and no other is taken.

    Args:
      listening: the socket, from `listen`.
      names, key: host names by which it may be asked, and the API key of its requests, as `make_app` takes them.
    """

    def __init__(
        self, models: Models, listening: socket.socket, *, names: tuple[str, ...] = (), key: str | None = None
    ):
        app = make_app(models, names=names, api_key=key)
        # It reports every connection that breaks; what we do wrong is printed by the application.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_graceful_shutdown=_END_SECONDS,
        )
        self._models, self._server = models, uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), name="http", daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def wait(self) -> None:
        """Wait until the thread ends, which it only does when it fails."""
        self._thread.join()

    def __exit__(self, *_) -> None:
        ended = self._models.close()
        self._server.should_exit = True
        self._thread.join(2 * _END_SECONDS)
        if not ended and (number := signals.stopped()):  # a program is being compiled, which nothing interrupts
            signals.end(number)
