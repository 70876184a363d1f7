"""Several processes of one run, one per host: joining them, and what only one of them does."""

import contextlib
import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from roserag_jax.errors import UserError

_told = threading.Event()  # SIGTERM came while `shared_preemption`


def start(distributed: str) -> None:
    """Join the run's other processes, before anything starts the backend; see `config.distributed`.

    Process 0 speaks for all: the others print nothing but errors.

    Raises:
      UserError: the option is malformed, or the others did not come.
    """
    if not distributed:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        where = {}
        if distributed != "auto":
            address, count, index = distributed.split(",")
            where = {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}
        jax.distributed.initialize(**where, shutdown_timeout_seconds=60)  # of those that are left when one fails
    except (ValueError, RuntimeError) as error:
        raise UserError(f"config.distributed={distributed!r}: {error}") from error
    # JAX has put a handler of its own in its place, with which a process ends only where all of them step together.
    signal.signal(signal.SIGTERM, handler)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def is_main() -> bool:
    """Whether this process writes the shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def main_first():
    """Run the block in process 0 first; in the others when it is done there, and what it makes can be found.

    Raises:
      UserError: in the others, if process 0 failed; they would wait for it otherwise.
    """
    if not is_main():
        if not multihost_utils.broadcast_one_to_all(np.array(False)):
            raise UserError("Process 0 stopped; what it printed says why.")
        yield
        return
    done = False
    try:
        yield
        done = True
    finally:
        multihost_utils.broadcast_one_to_all(np.array(done))


@contextlib.contextmanager
def shared_preemption():
    """In the block, SIGTERM to one of several processes is for all: `told_to_stop` says so. One alone just stops."""
    if jax.process_count() == 1:
        yield
        return
    handler = signal.signal(signal.SIGTERM, lambda *_: _told.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def preempted() -> bool:
    """Whether any of several processes got SIGTERM; all must ask, and get the same answer."""
    return jax.process_count() > 1 and bool(multihost_utils.process_allgather(np.array(_told.is_set())).any())


def gather_to_host(tree):
    """Host copies of a tree's arrays, gathered where they are spread over processes (so all must call it)."""
    spread = lambda a: isinstance(a, jax.Array) and not a.is_fully_addressable
    gather = lambda a: multihost_utils.process_allgather(a, tiled=True) if spread(a) else np.asarray(a)
    return jax.tree.map(gather, tree)
