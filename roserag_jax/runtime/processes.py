"""Several processes of one run, one per host: joining them, and what only one of them does."""

import contextlib
import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from roserag_jax.errors import UserError


def start(distributed: str) -> None:
    """Join the run's other processes, before anything starts the backend; see `config.distributed`.

    Process 0 speaks for all: the others print nothing but errors.

    Raises:
      UserError: the option is malformed, or the others did not come.
    """
    if not distributed:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        if distributed == "auto":
            jax.distributed.initialize()
        else:
            address, count, index = distributed.split(",")
            jax.distributed.initialize(address, int(count), int(index))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"config.distributed={distributed!r}: {error}") from error
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
def main_first(name: str):
    """Run the block in process 0 first; in the others when it is done there, and what it makes can be found."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def told_to_stop(step: int) -> bool:
    """Whether any process got SIGTERM; True in all of them at the same step. One process alone handles it itself."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def whole(tree):
    """Host copies of a tree's arrays, gathered where they are spread over processes (so all must call it)."""
    spread = lambda a: isinstance(a, jax.Array) and not a.is_fully_addressable
    gather = lambda a: multihost_utils.process_allgather(a, tiled=True) if spread(a) else np.asarray(a)
    return jax.tree.map(gather, tree)
