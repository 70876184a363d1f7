"""Checkpoints of training: Orbax, asynchronous, each with a digest that is verified on the way back."""

import hashlib
import json
import re
import time
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from roserag_jax import signals
from roserag_jax.distributed import processes
from roserag_jax.errors import UserError, first_line
from roserag_jax.training.train_step import TrainState

_ATTEMPTS, _RETRY_SECONDS = 3, 1.0
# What a file system, a network or a bucket says when it does not give a file that may be sound; of the text of
# tensorstore's errors, which have no classes.
_UNREADABLE = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|INTERNAL"
    r"|UNKNOWN)\b|OS error (?!2\b)"
)
_NETWORK = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}  # packages whose errors say the same
_SOUND, _DAMAGED, _CANNOT_READ = range(3)


class Restored(NamedTuple):
    """A checkpoint: the state after `step` steps, and the evaluations until then."""

    step: int
    state: TrainState
    evaluations: list[dict]


def state_digest(state: TrainState, about: dict) -> str:
    """SHA-256 over the names, types and bytes of all arrays, and over what is written down beside them.

    Orbax itself does not notice a flipped bit.
    """
    result = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path, array in jax.tree_util.tree_leaves_with_path(processes.gather_to_host(state)):
        result.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\0".encode())
        result.update(np.ascontiguousarray(array).tobytes())
    return result.hexdigest()


def _may_recover(error: Exception) -> bool:
    """Whether an error is of the way to a file, not of what stands in it."""
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return False
    network = type(error).__module__.partition(".")[0] in _NETWORK
    return isinstance(error, OSError) or network or _UNREADABLE.search(str(error)) is not None


class Checkpoints:
    """Checkpoints of one run, under a folder named after what the run is made from.

    The number of steps is the loader's state and the random keys' as well: the order of the pairs and the dropout of a
    step are pure functions of (seed, step).

    Args:
      keep: how many are kept, the latest ones.
      options: those of the run, written down beside the arrays.
    """

    def __init__(self, folder: epath.Path, *, keep: int, options: dict | None = None):
        self.folder, self.options = folder, json.loads(json.dumps(options or {}, default=list))
        # Processes meet at barriers named after the step: two managers that save the same one must not share them.
        barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name)
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, multiprocessing_options=barriers
            ),
        )

    def save(self, step: int, state: TrainState, evaluations: list[dict] = ()) -> None:
        """Save the state after `step` steps, in the background; what a former run saved from there on is replaced."""
        about = {"options": self.options, "evaluations": list(evaluations)}
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(jax.tree.leaves(state)),
            about=ocp.args.JsonSave(about | {"sha256": state_digest(state, about)}),
        )
        with signals.deferred():  # an exception inside Orbax leaves its threads waiting for ever
            for later in self._manager.all_steps():
                if later >= step:
                    self._manager.delete(later)
            if not self._manager.save(step, args=args):
                raise RuntimeError(f"Orbax refused to save step {step} in {self.folder}")

    def wait(self) -> None:
        """Wait until everything is written."""
        with signals.deferred():
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Wait until everything is written, and stop the threads that write."""
        with signals.deferred():
            self._manager.wait_until_finished()
            self._manager.close()

    def restore(self, like: TrainState, step: int | None = None) -> Restored | None:
        """The latest sound checkpoint, or that of `step` if it is sound; None if there is none.

        Each process reads and verifies the files by itself, and all of them take the same checkpoint: the latest that
        every one finds sound. A damaged one is named and moved to `damaged/`.

        Args:
          like: the state's shapes and shardings; arrays will do.

        Raises:
          UserError: a checkpoint may be sound but cannot be read, in one of the processes.
        """
        self.wait()
        damaged, found = [], None
        for candidate in self._steps():
            if step not in (None, candidate):
                continue
            verdict, restored = self._read(candidate, like)
            verdicts = multihost_utils.process_allgather(np.int32(verdict)).ravel()
            where = "" if len(verdicts) == 1 else f" in processes {np.flatnonzero(verdicts).tolist()}"
            if _CANNOT_READ in verdicts:
                raise UserError(
                    f"Checkpoint {self.folder / str(candidate)} cannot be read{where}"
                    f"{f' ({restored})' if isinstance(restored, str) else ''}. It was left as it is: run the same "
                    "command again, or move it away to resume from the one before."
                )
            if not verdicts.any():
                found = Restored(candidate, self._place(restored[0], like), restored[1])
                break
            why = restored if isinstance(restored, str) else "sound here"
            print(f"Checkpoint {self.folder / str(candidate)} is damaged{where} ({why}); trying the one before.")
            damaged.append(candidate)
        if damaged:
            self._put_aside(damaged)
        return found

    def _steps(self) -> list[int]:
        """The steps of all checkpoints as process 0 sees them, the latest first."""
        steps = np.array(sorted(self._manager.all_steps(), reverse=True), np.int32)
        if jax.process_count() > 1:
            if not (count := int(multihost_utils.broadcast_one_to_all(np.int32(steps.size)))):
                return []
            steps = multihost_utils.broadcast_one_to_all(np.resize(np.append(steps, 0), count).astype(np.int32))
        return steps.tolist()

    def _read(self, step: int, like: TrainState) -> tuple[int, tuple | str]:
        """What a checkpoint holds as this process sees it: a verdict, and (arrays, evaluations) or why not.

        What fails is tried again a moment later: a network file system or a bucket may recover.
        """
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_RETRY_SECONDS * attempt)
            try:
                return _SOUND, self._verified(step, like)
            except Exception as error:  # whatever is wrong with the files, the checkpoint before may be sound
                verdict, why = (_CANNOT_READ if _may_recover(error) else _DAMAGED), first_line(error)
        return verdict, why

    def _verified(self, step: int, like: TrainState) -> tuple[TrainState, list[dict]]:
        """The arrays of a checkpoint on this host, and its evaluations; raises whatever is wrong with it."""
        folder, (leaves, structure) = self.folder / str(step), jax.tree.flatten(like)
        about = json.loads((folder / "about" / "metadata").read_text())
        # No other process takes part: one that fails must not leave the others waiting for it.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{self.folder.name}-{me}"
        )
        reader = ocp.Checkpointer(
            ocp.PyTreeCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone
        )
        on_host = [ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves)
        with reader:
            arrays = reader.restore(folder / "arrays", args=ocp.args.PyTreeRestore(restore_args=on_host))
        state, digest = jax.tree.unflatten(structure, arrays), about.pop("sha256")
        if state_digest(state, about) != digest:
            raise ValueError("its digest does not match")
        if [(a.shape, a.dtype) for a in arrays] != [(leaf.shape, leaf.dtype) for leaf in leaves]:
            raise ValueError("it has other shapes than this run")
        return state, about["evaluations"]

    def _place(self, state: TrainState, like: TrainState) -> TrainState:
        """Host arrays on the devices, each process handing over the pieces of its own."""
        return jax.tree.map(
            lambda array, leaf: jax.make_array_from_callback(leaf.shape, leaf.sharding, array.__getitem__), state, like
        )

    def _put_aside(self, steps: list[int]) -> None:
        """Move checkpoints to `damaged/`; they are not deleted, for the fault may be another one, and pass."""
        processes.barrier("checkpoints tried")
        if processes.is_main():
            (self.folder / "damaged").mkdir(exist_ok=True)
            for step in steps:
                (self.folder / str(step)).rename(self.folder / "damaged" / f"{step}-{time.time_ns()}")
        processes.barrier("checkpoints put aside")
        self._manager.reload()
