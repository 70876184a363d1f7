"""Checkpoints of training: Orbax, asynchronous, each with a digest of its numbers that is checked on the way back."""

import contextlib
import hashlib
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from roserag_jax.distributed import processes
from roserag_jax.training.train_step import TrainState


def state_digest(state: TrainState) -> str:
    """SHA-256 over the names, types and bytes of all arrays. Orbax itself does not notice a flipped bit."""
    result = hashlib.sha256()
    for path, array in jax.tree_util.tree_leaves_with_path(processes.gather_to_host(state)):
        result.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0".encode())
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


@contextlib.contextmanager
def signals_deferred():
    """Hold Ctrl-C and SIGTERM back until the block is done, so that none falls inside it."""
    held, stops = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(stop, lambda number, _: held.append(number)) for stop in stops]
    try:
        yield
    finally:
        for stop, handler in zip(stops, handlers, strict=True):
            signal.signal(stop, handler)
    if held:
        signal.raise_signal(held[0])


class Checkpoints:
    """Checkpoints of one run, under a folder named after what the run is made from.

    The number of steps is the loader's state and the random keys' as well: the order of the pairs and the dropout of a
    step are pure functions of (seed, step).

    Args:
      keep: how many are kept, the latest ones.
      about: what to write down beside the arrays: the options of the run.
    """

    def __init__(self, folder: epath.Path, keep: int, about: dict | None = None):
        self.folder, self.about = folder, about or {}
        # Processes meet at barriers named after the step: two managers that save the same one must not share them.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=True, multiprocessing_options=barriers
        )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def save(self, step: int, state: TrainState) -> None:
        """Save the state after `step` steps; the write goes on in the background."""
        arrays, check = jax.tree.leaves(state), {"sha256": state_digest(state), "options": self.about}
        args = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), digest=ocp.args.JsonSave(check))
        with signals_deferred():  # an exception inside Orbax leaves its threads waiting for ever
            self._manager.save(step, args=args)

    def restore(self, like: TrainState) -> tuple[int, TrainState]:
        """The latest sound checkpoint as `(steps, state)`, or `(0, like)`; damaged ones are named and put aside."""
        self._manager.wait_until_finished()
        leaves, structure = jax.tree.flatten(like)
        abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves]
        aside, found = [], (0, like)
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore()),
                )
                state = jax.tree.unflatten(structure, restored.arrays)
                if state_digest(state) == restored.digest["sha256"]:
                    found = step, state
                    break
                why = "its digest does not match"
            except Exception as error:  # whatever is wrong with the files, the checkpoint before may be sound
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"Checkpoint {self.folder / str(step)} is damaged ({why}); trying the one before.")
            aside.append(step)
        if aside:  # not deleted: the fault may be another one, and pass
            processes.barrier("checkpoints tried")
            if processes.is_main():
                (self.folder / "damaged").mkdir(exist_ok=True)
                for step in aside:
                    (self.folder / str(step)).rename(self.folder / "damaged" / f"{step}-{time.time_ns()}")
            processes.barrier("checkpoints put aside")
            self._manager.reload()
        return found

    def close(self) -> None:
        """Wait until everything is written."""
        with signals_deferred():
            self._manager.wait_until_finished()
            self._manager.close()
