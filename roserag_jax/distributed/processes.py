"""Several processes of one run, one per host: joining them, what only one of them does, and how they end together.

However one process ends, all end with its status and its reason in one line: 2 for what the user can put right, 130 and
143 where one was told to stop, 134 where one was lost or hangs (`distributed.channel`).
"""

import contextlib
import faulthandler
import functools
import hashlib
import itertools
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from roserag_jax import signals
from roserag_jax.distributed.channel import LOST, End, Hub, Link, Relay
from roserag_jax.errors import UserError

_NEWS_SECONDS = 3.0
_STOP_SECONDS = 8.0  # how long a process that is told to stop by another has for it
_hub: Hub | None = None
_link: Link | None = None
_ending = threading.Lock()  # held by the thread that says how this process ends
_told: list[int] = []  # the signals that came while `shared_preemption`
_queues: dict[str, itertools.count] = {}  # of a single process
_made = itertools.count()  # numbers of shared queues


class _Watched:
    """What the watchdog is told: steps finished, when, and whether XLA compiles."""

    steps, since, longest, compiling = 0, 0.0, 0.0, 0

    def state(self) -> tuple[int, float, bool]:
        """Steps, the seconds without one if they are suspicious, and whether something compiles."""
        idle = time.monotonic() - self.since if self.since else 0.0
        # On a slow machine a step may take long: it hangs when it takes ten times as long as any before.
        return self.steps, idle if idle > 10 * self.longest else 0.0, self.compiling > 0


_watched = _Watched()


def start(config) -> None:
    """Join the run's other processes, before anything starts the backend; see `config.distributed`.

    Process 0 speaks for all: the others print nothing but errors.

    Raises:
      UserError: the option is malformed, or the processes do not run the same.
      ProcessLost: not all processes came.
    """
    global _hub, _link
    if not config.distributed:
        return
    host, port, count, index, local_devices = _where(config.distributed, config.join_seconds)
    where = (host.strip("[]"), port)
    if index == 0:
        try:
            _hub = Hub(port, count, config.join_seconds, config.watchdog_seconds, {"port": _free_port()})
        except OSError as error:
            raise UserError(
                f"config.distributed={config.distributed!r}: port {port} cannot be used ({error.strerror})."
            ) from error
        where = ("localhost", _hub.port)
    _link = Link(
        where,
        index,
        count,
        name=f"{platform.node()}, pid {os.getpid()}",
        settings=_settings(config),
        join_seconds=config.join_seconds,
        watchdog_seconds=config.watchdog_seconds,
        on_end=_end,
        state=_watched.state,
    )
    signals.before_end(leave)
    signals.on_arrival(_link.announce)  # each may be busy for seconds: all at the same time, not one after another
    _watched.longest = config.watchdog_seconds  # so the first step may take ten times as long
    welcome = _link.welcome()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # signals are the commands' own
    try:
        port = welcome["port"] if index == 0 else Relay((host.strip("[]"), welcome["port"])).port
        jax.distributed.initialize(
            f"localhost:{port}",
            count,
            index,
            local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=config.join_seconds,
            # The channel knows earlier, and says it in a line; JAX would abort with a stack of C++.
            heartbeat_timeout_seconds=24 * 3600,
            shutdown_timeout_seconds=60,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"config.distributed={config.distributed!r}: {error}") from error
    _watch_compilation()
    # Processes meet on their devices now, side by side: a first collective that one of them reaches a minute later,
    # after minutes of compilation, would run into a time-out of its own.
    barrier("devices")
    multihost_utils.sync_global_devices("devices")
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def _where(distributed: str, timeout: float) -> tuple[str, int, int, int, list[int] | None]:
    """Host and port of process 0, the number of processes, this one's, and its devices (None is all of them)."""
    address = count = index = None
    try:
        if distributed != "auto":
            address, count, index = distributed.split(",")
            count, index = int(count), int(index)
        # `initialize` would ask for the same, but the channel comes first.
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(address, count, index, None, None, int(timeout))
        address, count, index, devices = found
        if None in (address, count, index):
            raise ValueError("neither a TPU slice nor Slurm says where the processes are")
        host, _, port = address.rpartition(":")
        if not host or not 0 <= index < count:
            raise ValueError("'HOST:PORT,PROCESSES,INDEX' is expected, with INDEX from 0")
        return host, int(port), count, index, devices
    except (ValueError, RuntimeError) as error:
        raise UserError(f"config.distributed={distributed!r}: {error}.") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _settings(config) -> dict[str, str]:
    """What must be equal in all processes: the options, the code and JAX."""
    from roserag_jax import options

    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.py")):
        code.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes())
    values = {f"config.{name}": repr(options.get(config, name)) for name, _ in options.walk() if name != "distributed"}
    return values | {"the version of jax": jax.__version__, "the code's digest": code.hexdigest()[:12]}


def _watch_compilation() -> None:
    """Have the watchdog know when XLA compiles, which may take minutes: from a program's lowering to its end."""

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            _watched.compiling += 1
        elif event == "/jax/core/compile/backend_compile_duration":
            _watched.compiling = max(_watched.compiling - 1, 0)
            if _watched.since:
                _watched.since = time.monotonic()

    jax.monitoring.register_event_duration_secs_listener(listen)


def is_main() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def gather(name: str, value: Any = None) -> list:
    """The values (JSON) of all processes in their order. All call it, in the same order of names."""
    return _link.gather(name, value) if _link else [value]


def barrier(name: str) -> None:
    """Wait until every process is here."""
    gather(name)


def take(queue: str, count: int) -> int:
    """Take the next `count` of a queue that all processes share; returns the number of the first, from 0."""
    if _link:
        return _link.take(queue, count)
    taken = _queues.setdefault(queue, itertools.count())
    first = next(taken)
    for _ in range(count - 1):
        next(taken)
    return first


class SharedQueue(Iterator):
    """Hands out items, each to one of all processes, in small blocks as they ask: a slow one gets fewer of them.

    All processes make it, in the same order of queues; the items are those of process 0. Iterate over it in any thread,
    but in one at a time.

    Args:
      most: the largest block; towards the end of the queue they become smaller.
    """

    def __init__(self, name: str, items: list, most: int):
        self._name = f"{name} #{next(_made)}"
        self._items = gather(self._name, items if is_main() else None)[0]
        self._most, self._taken, self._block = most, 0, iter(())

    def __len__(self) -> int:
        return len(self._items)

    def __next__(self) -> Any:
        found = next(self._block, self)
        if found is not self:
            return found
        size = max(1, min(self._most, (len(self) - self._taken) // (4 * jax.process_count())))
        first = take(self._name, size)
        self._taken = first + size
        self._block = iter(self._items[first : self._taken])
        return next(self._block)  # or this is the end


def check_equal(what: str, value: str) -> None:
    """Check that all processes have the same.

    Raises:
      UserError: they have not, in every process.
    """
    values = gather(what, value)
    for i, theirs in enumerate(values):
        if theirs != values[0]:
            raise UserError(
                f"{what} is not the same in process {i} as in process 0; give all processes the same files."
            )


def connect(mesh: Mesh) -> None:
    """Connect the devices of a mesh over several processes, while all of them are here.

    The first collective of a group of devices connects it, and on CPUs fails in a process that waits for another for 30
    seconds, which one that compiles or reads weights may take longer.
    """
    if not _link:
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    x = jax.jit(lambda: jnp.ones(mesh.size), out_shardings=NamedSharding(mesh, PartitionSpec(mesh.axis_names)))()
    for group in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(1, len(axes) + 1)):
        rest = tuple(axis for axis in mesh.axis_names if axis not in group)
        add = jax.shard_map(
            functools.partial(jax.lax.psum, axis_name=group),
            mesh=mesh,
            in_specs=PartitionSpec(mesh.axis_names),
            out_specs=PartitionSpec(rest),
        )
        program = jax.jit(add).lower(x).compile()
        barrier(f"connect {group}")
        jax.block_until_ready(program(x))


@contextlib.contextmanager
def main_first():
    """Run the block in process 0 first; in the others when it is done there, and what it makes can be found.

    If process 0 fails, the channel ends the others.
    """
    if not is_main():
        barrier("process 0 first")
    yield
    if is_main():
        barrier("process 0 first")


@contextlib.contextmanager
def shared_preemption():
    """In the block, Ctrl-C and SIGTERM to one of several processes are for all (`preempted`); one alone just stops."""
    if not _link:
        yield
        return
    handlers = {number: signal.signal(number, lambda number, _: _told.append(number)) for number in signals.STOPS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def preempted() -> int:
    """The signal that any of several processes got, 0 if none did; all must ask, and get the same answer."""
    return max(gather("preempted", int(_told[0]) if _told else 0)) if _link else 0


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """In the block, `step` is called every so often; a run of several processes in which it is not ends."""
    _watched.since, _watched.steps = time.monotonic(), 0
    try:
        yield
    finally:
        _watched.since = 0.0


def step() -> None:
    """Note that a step is finished."""
    now = time.monotonic()
    if _watched.since:  # but for the first, which tells nothing of the others
        _watched.longest = max(_watched.longest, now - _watched.since) if _watched.steps else 0.0
    _watched.steps += 1
    _watched.since = _watched.since and now


def leave(status: int, why: str = "") -> None:
    """Tell the other processes how this one ends, before it does; they end with the same status, success aside.

    For a single process it does nothing. With success it waits for all.
    """
    if not _link:
        return
    if status == 0:
        _link.gather("done")
    _link.leave(status, why)
    if _hub and status:
        _hub.wait_for_all_to_leave()


def several() -> bool:
    """Whether this process has joined others."""
    return _link is not None


def begin_end(defect: bool) -> None:
    """Note that the main thread ends this process, unless the channel does already: then this never returns.

    Args:
      defect: the reason is an error that may be due to another process's end, as a collective's often is. The channel
        gets a moment to say so.
    """
    if defect:
        time.sleep(_NEWS_SECONDS)
    if not _ending.acquire(blocking=False):
        threading.Event().wait()


def _end(end: End) -> None:
    """End this process because of another one (in a thread: the main one may wait for a device for ever)."""
    for number, status in signals.STOPS.items():
        if end.status == status:
            if not _told:
                os.kill(os.getpid(), number)
            time.sleep(_STOP_SECONDS)
            signals.end(number)
    if not _ending.acquire(blocking=False):
        return
    line = f"error: {end.why}"
    if end.status == LOST:
        line += " Start the same command again: it resumes."
    if end.hung:
        line += f" Where this process was: {_write_stacks()}"
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        os.write(2, f"{line}\n".encode())
    leave(end.status, end.why)
    os._exit(end.status)


def _write_stacks() -> str:
    """Write the stacks of all threads to a file; returns its path."""
    # Under a name that nobody knows before: in a folder of all users, a link may stand where one is expected.
    with tempfile.NamedTemporaryFile("w", prefix="roserag_jax-stacks-", suffix=".txt", delete=False) as file:
        faulthandler.dump_traceback(file, all_threads=True)
    return file.name


def gather_to_host(tree):
    """Host copies of a tree's arrays, gathered where they are spread over processes (so all must call it)."""
    spread = lambda a: isinstance(a, jax.Array) and not a.is_fully_addressable
    gather = lambda a: multihost_utils.process_allgather(a, tiled=True) if spread(a) else np.asarray(a)
    return jax.tree.map(gather, tree)
