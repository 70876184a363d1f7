"""Ctrl-C and SIGTERM: end a command in one line, with status 130 or 143, whatever it is doing at the moment.

Python runs a signal's handler between any two instructions of the main thread. An exception that is raised there is
lost if it falls into a callback of the garbage collector, a destructor or C++ code that clears it: Python prints
"Exception ignored" and the run continues. So the exception knows whether it arrived: if it is deleted before `main` has
caught it, the signal is sent again a moment later. And a main thread that is busy in C++ (it compiles, or waits for
other processes) runs no handler at all, or hardly does anything but what loses exceptions: then a second thread ends
the process.

Used by commands only. As a library, the package leaves signals alone.
"""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # and the exit status of each

# What a stop means for the user: of a command that keeps what it has finished, of another, and of a server.
RESUMES = "What was finished is kept; the same command resumes there."
STARTS_OVER = "The same command starts over."
SERVER_ENDED = "The server has ended; requests that it was answering were not finished."

_RETRY_SECONDS = 0.05
_BUSY_SECONDS = (
    5.0  # how long the main thread may be busy in C++, or lose exceptions, before the process ends without it
)


class Stopped(KeyboardInterrupt):
    """A signal ends the run. A KeyboardInterrupt, for that is what libraries clean up after and let pass."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __del__(self):
        if not _state.caught:  # swallowed on its way to `main`
            _state.lost = True
            with contextlib.suppress(OSError, AttributeError):  # AttributeError: the interpreter is ending
                _state.wake.send(b"\0")


class _State:
    """What is known of a signal, shared by the handler, the exception and the watching thread."""

    number = 0  # of the first signal that came
    handled = False  # the main thread has run the handler
    lost = False  # its exception was swallowed
    caught = False  # its exception arrived
    finished: int | None = None  # exit status of the command, once only the interpreter's own end is left
    consequence = RESUMES
    wake: socket.socket


_state = _State()
_before_end: list[Callable[[int, str], None]] = []
_on_arrival: list[Callable[[int, str], None]] = []


def before_end(call: Callable[[int, str], None]) -> None:
    """Have `call(exit status, message)` called before a signal ends the process without its main thread."""
    _before_end.append(call)


def on_arrival(call: Callable[[int, str], None]) -> None:
    """Have `call(exit status, message)` called, in a thread, as soon as a signal has come that is not deferred."""
    _on_arrival.append(call)


def set_consequence(text: str) -> None:
    """Set the sentence that tells the user of a stopped command what that means, `RESUMES` if nothing is set."""
    _state.consequence = text


def stop(number: int) -> None:
    """End the command as if the signal had just come."""
    _handle(number, None)


def install() -> None:
    """From here on, end the process in one line when it gets Ctrl-C or SIGTERM."""
    if hasattr(_state, "wake"):
        return
    listen, _state.wake = socket.socketpair()
    _state.wake.setblocking(False)
    signal.set_wakeup_fd(_state.wake.fileno(), warn_on_full_buffer=False)
    for number in STOPS:
        signal.signal(number, _handle)
    atexit.register(_ignore)  # the first that is registered is the last to run
    sys.excepthook = _end_where_nothing_catches
    unraisable = sys.unraisablehook
    # One that was swallowed is raised again; nobody needs to read of it.
    sys.unraisablehook = lambda args: None if isinstance(args.exc_value, Stopped) else unraisable(args)
    threading.Thread(target=_watch, args=(listen,), name="signals", daemon=True).start()


def _ignore() -> None:
    """Let the interpreter end with the command's status: it would put back what ends it with the signal."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def _handle(number: int, frame) -> None:
    if _state.finished is not None:
        os._exit(_state.finished)
    if _state.handled and not _state.lost:
        return  # on its way
    _state.number = _state.number or number
    _state.handled, _state.lost = True, False
    raise Stopped(_state.number)


def _watch(listen: socket.socket) -> None:
    """Send a signal again whose exception was lost; end the process where the main thread cannot run the handler."""
    main, deadline = threading.main_thread().ident, None
    while received := listen.recv(64):
        numbers = [number for number in received if number in STOPS]
        if numbers and (_state.handled or signal.getsignal(numbers[0]) is _handle):
            while _on_arrival:  # once
                _on_arrival.pop()(STOPS[numbers[0]], message(numbers[0]))
        if numbers and signal.getsignal(numbers[0]) is not _handle:  # deferred: it comes once more
            deadline = None
            continue
        deadline = deadline or time.monotonic() + _BUSY_SECONDS
        if numbers:
            while not _state.handled and signal.getsignal(numbers[0]) is _handle:
                if time.monotonic() > deadline:
                    end(numbers[0])
                time.sleep(_RETRY_SECONDS)
        while _state.lost and _state.finished is None:
            time.sleep(_RETRY_SECONDS)
            if time.monotonic() > deadline and signal.getsignal(_state.number) is _handle:
                end(_state.number)
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(main, _state.number)


def stopped() -> int:
    """The number of the signal that ends this run; 0 if none came. Called by who has caught what it raised."""
    _state.caught = bool(_state.number)
    return _state.number


def finish(status: int = 0) -> None:
    """Note that the command has said all it has to say: whatever comes now, the process ends with this status."""
    _state.finished = status


def message(number: int) -> str:
    """The one line that a stopped command prints."""
    name = {signal.SIGINT: "Ctrl-C"}.get(number, signal.Signals(number).name)
    return f"Stopped by {name}. {_state.consequence}"


def end(number: int) -> None:
    """End the process at once, in one line. Files are safe: they are whole or absent at any moment."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{message(number)}\n".encode())
    for call in _before_end:
        call(STOPS[number], message(number))
    os._exit(STOPS[number])


def _end_where_nothing_catches(kind, error, trace) -> None:
    """The excepthook: while a command's modules are imported, nothing above them catches."""
    if number := stopped():
        end(number)
    sys.__excepthook__(kind, error, trace)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done, so that none falls inside it."""
    if threading.current_thread() is not threading.main_thread():  # no handler runs elsewhere
        yield
        return
    held = []
    handlers = {number: signal.signal(number, lambda number, _: held.append(number)) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
