"""The channel between the processes of one run: a star of TCP connections, with process 0 (the hub) in its middle.

It carries what is not arithmetic: who has joined with which options, barriers and small values, the shared queue of
questions, and above all how each process ended. It belongs to no device, so it works while a device waits for a process
that is gone, and a process that the kernel ends is known at once, by its closed connection.

Messages are JSON lines. To the hub: `hello`, `beat` (alive, and what it is doing), `gather` and `take` (requests with
an `id`), `stop` (a signal came: this process is about to end) and `end` (status and reason). From the hub: `welcome`,
`beat`, `reply`, `end` (the first end of any process that is not success) and `bye` (an end was noted).
"""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

from roserag_jax.errors import shorten

BEAT_SECONDS = 1.0
_LEAVE_SECONDS = 15.0  # how long process 0 waits for the others to go before it ends, and they for its word
_GONE = "is gone: it was killed (out of memory?), or its machine was lost."
LOST = 134  # exit status where a process was lost or hangs; a restart helps


class ProcessLost(Exception):
    """A process did not join; all end with status 134."""


class End(NamedTuple):
    """How a run of several processes ended before its work was done: exit status, a sentence, and whether it hung."""

    status: int
    why: str
    hung: bool = False


class _Connection:
    """JSON lines over a socket. The kernel itself reports a peer whose machine is gone, after some 25 seconds."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", 10),
            ("TCP_KEEPINTVL", 5),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 25000),
        ):
            if hasattr(socket, name):  # on Linux
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._sock, self._lines, self._lock = sock, sock.makefile("rb"), threading.Lock()

    def send(self, **message: Any) -> None:
        """Send a message; one to a peer that is gone is dropped, for whoever reads from it sees that it is."""
        with self._lock, contextlib.suppress(OSError):
            self._sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict | None:
        """The next message, or None where there will be none."""
        try:
            line = self._lines.readline()
            return json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """End the connection in both directions, also for a thread that reads from it."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Peer:
    """What the hub knows of a process."""

    def __init__(self, connection: _Connection, hello: dict):
        self.connection, self.name, self.settings = connection, hello["name"], hello["settings"]
        self.heard = time.monotonic()
        self.steps, self.idle, self.compiling = 0, 0.0, False  # as of its last beat
        self.gathers = 0
        self.ended = False  # it has said how it ends


class Hub:
    """Process 0's side: takes what all processes report and passes on what concerns them.

    Args:
      port: where it listens; 0 takes a free one (`self.port`).
      join_seconds: how long all processes have to connect.
      watchdog_seconds: how long a process may give no sign of life, or take no step, before all end; 0 is for ever.
    """

    def __init__(self, port: int, count: int, join_seconds: float, watchdog_seconds: float, welcome: dict):
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self._listener = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
        self.port = self._listener.getsockname()[1]
        self._count, self._watchdog, self._welcome = count, watchdog_seconds, welcome
        self._join_seconds, self._deadline = join_seconds, time.monotonic() + join_seconds
        self._peers: dict[int, _Peer] = {}
        self._joined = False
        self._end: End | None = None
        self._gathered: dict[int, dict[int, tuple[int, str, Any]]] = {}  # by the number of the gather, then by process
        self._taken: dict[str, int] = {}
        self._lock = threading.RLock()
        threading.Thread(target=self._accept, name="hub accepts", daemon=True).start()
        threading.Thread(target=self._monitor, name="hub monitors", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(_Connection(sock),), name="hub serves", daemon=True).start()

    def _serve(self, connection: _Connection) -> None:
        """Read what one process sends, to its end."""
        hello = connection.receive()
        if not isinstance(hello, dict) or not {"hello", "count", "name", "settings"} <= hello.keys():
            return connection.close()  # whoever that was
        index = hello["hello"]
        with self._lock:
            if self._end:  # it joins a run that is over
                return connection.send(end=list(self._end))
            if index in self._peers or hello["count"] != self._count or not 0 <= index < self._count:
                other = f"; {self._peers[index].name} is number {index} too" if index in self._peers else ""
                why = f"{hello['name']} joined as number {index} of {hello['count']} a run of {self._count}{other}"
                self._publish_end(End(2, f"config.distributed: {why}."))
                return connection.send(end=list(self._end))
            peer = self._peers[index] = _Peer(connection, hello)
            if len(self._peers) == self._count:
                self._joined = True
                if fault := _difference([self._peers[i].settings for i in range(self._count)]):
                    self._publish_end(End(2, fault))
                else:
                    for each in self._peers.values():
                        each.connection.send(welcome=self._welcome)
        while message := connection.receive():
            peer.heard = time.monotonic()
            with self._lock:
                self._handle(index, peer, message)
        with self._lock:
            if not peer.ended:
                peer.ended = True
                self._publish_end(End(LOST, f"process {index} ({peer.name}) {_GONE}"))

    def _handle(self, index: int, peer: _Peer, message: dict) -> None:
        if "beat" in message:
            peer.steps, peer.idle, peer.compiling = message["beat"]
        elif "take" in message:
            first = self._taken.get(message["take"], 0)
            self._taken[message["take"]] = first + message["count"]
            peer.connection.send(reply=first, id=message["id"])
        elif "gather" in message:
            waiting = self._gathered.setdefault(peer.gathers, {})
            waiting[index] = (message["id"], message["gather"], message["value"])
            peer.gathers += 1
            if len(waiting) == self._count:
                del self._gathered[peer.gathers - 1]
                if len(names := {name for _, name, _ in waiting.values()}) > 1:
                    self._publish_end(End(1, f"processes are at different places: {', '.join(sorted(names))}."))
                values = [waiting[i][2] for i in range(self._count)]
                for i, (request, _, _) in waiting.items():
                    self._peers[i].connection.send(reply=values, id=request)
        elif "stop" in message:
            self._publish_end(End(*message["stop"]))
        elif "end" in message:
            peer.ended = True
            status, why = message["end"]
            if status:
                self._publish_end(End(status, why if status == LOST else f"process {index}: {why}"))
            peer.connection.send(bye=True)

    def _publish_end(self, end: End) -> None:
        """Tell everybody of the first end; what follows from it is not news."""
        if self._end:
            return
        self._end = end
        for peer in self._peers.values():
            peer.connection.send(end=list(end))  # who has said how it ends takes no notice

    def _monitor(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                for peer in self._peers.values():
                    peer.connection.send(beat=True)
                if not self._joined:
                    self._check_joined()
                elif self._watchdog and not self._end:
                    self._check_alive()

    def _check_joined(self) -> None:
        if time.monotonic() > self._deadline:
            missing = [i for i in range(self._count) if i not in self._peers]
            them = f"{'processes' if len(missing) > 1 else 'process'} {', '.join(map(str, missing))}"
            why = f"{them} of {self._count} did not join within {self._join_seconds:g} s (config.join_seconds)."
            self._publish_end(End(LOST, why))

    def _check_alive(self) -> None:
        """End a run in which a process is silent, or no step is finished, for too long."""
        now = time.monotonic()
        alive = [(i, peer) for i, peer in self._peers.items() if not peer.ended]
        silent = [(now - peer.heard, i) for i, peer in alive]
        stalled = [i for i, peer in alive if peer.idle > self._watchdog]
        quiet, i = max(silent, default=(0, 0))
        if quiet > self._watchdog or (stalled and quiet > 5 * BEAT_SECONDS):
            self._peers[i].ended = True  # nobody waits for it
            why = f"has given no sign of life for {quiet:.0f} s: it is stopped, or its machine hangs."
            self._publish_end(End(LOST, f"process {i} ({self._peers[i].name}) {why}", hung=True))
        elif stalled and not any(peer.compiling for _, peer in alive):
            i = min(stalled, key=lambda i: self._peers[i].steps)
            idle, steps = self._peers[i].idle, self._peers[i].steps
            why = f"has finished no step for {idle:.0f} s (config.watchdog_seconds), after {steps}: it hangs."
            self._publish_end(End(LOST, f"process {i} ({self._peers[i].name}) {why}", hung=True))

    def wait_for_all_to_leave(self) -> None:
        """Wait until the other processes have gone, so that none misses why."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        while time.monotonic() < deadline and any(not p.ended for i, p in self._peers.items() if i):
            time.sleep(0.05)
        time.sleep(0.2)  # in which those that have said so end


def _difference(settings: list[dict[str, str]]) -> str | None:
    """A message that names what the first process that differs from process 0 has otherwise; None if all are equal."""
    for i, theirs in enumerate(settings):
        names = [name for name in settings[0] if theirs.get(name) != settings[0][name]]
        if names:
            of = lambda values, name: shorten(str(values.get(name)), 80)
            listed = "; ".join(
                f"{n} is {of(theirs, n)} in process {i} and {of(settings[0], n)} in process 0" for n in names[:3]
            )
            more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
            return f"{listed}{more}. All processes of a run need the same."
    return None


class Link:
    """A process's connection to the hub.

    Args:
      address: host and port of the hub.
      name: what messages call this process.
      settings: what must be equal in all processes, as text by name.
      join_seconds: how long the hub has to answer, and all processes to join.
      on_end: called, in a thread of its own, with the end of the run that another process caused.
      state: returns steps finished, seconds since the last one (0 where none is expected), and whether it compiles.

    Raises:
      ProcessLost: the hub does not answer.
    """

    def __init__(
        self,
        address: tuple[str, int],
        index: int,
        count: int,
        *,
        name: str,
        settings: dict[str, str],
        join_seconds: float,
        watchdog_seconds: float,
        on_end: Callable[[End], None],
        state: Callable[[], tuple[int, float, bool]],
    ):
        self.index, self._on_end, self._state, self._watchdog = index, on_end, state, watchdog_seconds
        self._connection = _connect(address, join_seconds)
        self._heard = time.monotonic()
        self._pending: dict[int, Future] = {}
        self._ids, self._lock = itertools.count(), threading.Lock()
        self._welcome: Future = Future()
        self._leaving = threading.Event()  # this process has said how it ends
        self._bye = threading.Event()
        self._ended = False
        self._connection.send(hello=index, count=count, name=name, settings=settings)
        threading.Thread(target=self._read, name="link reads", daemon=True).start()
        threading.Thread(target=self._beat, name="link beats", daemon=True).start()

    def welcome(self) -> dict:
        """Wait until all processes have joined with the same settings; returns what the hub tells everybody."""
        return self._welcome.result()

    def gather(self, name: str, value: Any = None) -> list:
        """The values of all processes in their order, once all of them are here. Every process calls it."""
        return self._request(gather=name, value=value)

    def take(self, name: str, count: int) -> int:
        """Take the next `count` of a queue that all processes share; returns the number of the first."""
        return self._request(take=name, count=count)

    def announce(self, status: int, why: str) -> None:
        """Tell the hub that this process is about to end, so that the others begin to."""
        self._connection.send(stop=[status, why])

    def leave(self, status: int, why: str = "") -> None:
        """Tell the hub how this process ends, and wait until it has noted it."""
        self._leaving.set()
        self._connection.send(end=[status, why])
        self._bye.wait(_LEAVE_SECONDS)

    def _request(self, **message: Any) -> Any:
        with self._lock:
            request = next(self._ids)
            answer = self._pending[request] = Future()
            self._connection.send(id=request, **message)
        return answer.result()

    def _read(self) -> None:
        while message := self._connection.receive():
            self._heard = time.monotonic()
            if "reply" in message:
                self._pending.pop(message["id"]).set_result(message["reply"])
            elif "welcome" in message:
                self._welcome.set_result(message["welcome"])
            elif "bye" in message:
                self._bye.set()
            elif "end" in message:
                self._end(End(*message["end"]))
        self._bye.set()  # there will be none
        self._end(End(LOST, f"process 0 {_GONE}"))

    def _beat(self) -> None:
        while not self._ended:
            self._connection.send(beat=self._state())
            if self._watchdog and (quiet := time.monotonic() - self._heard) > self._watchdog:
                why = f"process 0 has given no sign of life for {quiet:.0f} s: it is stopped, or its machine hangs."
                self._end(End(LOST, why, hung=True))
            time.sleep(BEAT_SECONDS)

    def _end(self, end: End) -> None:
        if not (self._ended or self._leaving.is_set()):
            self._ended = True
            # Not in the thread that reads: whoever ends this process tells the hub, and waits for its word.
            threading.Thread(target=self._on_end, args=(end,), name="link ends", daemon=True).start()


def _connect(address: tuple[str, int], seconds: float) -> _Connection:
    """Connect to the hub, which may start later than this process."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _Connection(socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.1)))
        except OSError as error:
            if time.monotonic() > deadline:
                host, port = address
                why = f"process 0 did not answer at {host}:{port} within {seconds:g} s (config.join_seconds): {error}"
                raise ProcessLost(why) from error
            time.sleep(0.2)


class Relay:
    """A local port that passes bytes on to `target` and back, and stays open when the target is gone.

    JAX's client aborts a process with a stack of C++ as soon as its connection to process 0 closes. Behind a relay it
    does not notice, and the channel ends the process in one line.
    """

    def __init__(self, target: tuple[str, int]):
        self._target = target
        self._listener = socket.create_server(("localhost", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="relay accepts", daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            try:
                far = socket.create_connection(self._target, timeout=10)
            except OSError:  # not there yet; the client tries again
                near.close()
                continue
            far.settimeout(None)
            threading.Thread(target=_copy, args=(near, far, True), name="relay sends", daemon=True).start()
            threading.Thread(target=_copy, args=(far, near, False), name="relay receives", daemon=True).start()


def _copy(source: socket.socket, target: socket.socket, close: bool) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if close:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)
