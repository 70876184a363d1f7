"""The training loop: steps, their log, checkpoints, evaluation on held-out pairs, and what ends a run early."""

import time

import jax
from etils import epath

from roserag_jax import signals
from roserag_jax.distributed import processes
from roserag_jax.distributed.mesh import matmul_rate
from roserag_jax.errors import UserError
from roserag_jax.progress import Progress
from roserag_jax.training.checkpoints import Checkpoints, Restored
from roserag_jax.training.held_out import HeldOut
from roserag_jax.training.log import TrainingLog, round_row
from roserag_jax.training.pair_loader import Batch, Stream
from roserag_jax.training.train_step import TrainState, TrainStep


class Trainer:
    """Runs the steps of a stream that are left, and ends with the same state however often it was stopped before.

    Args:
      stream: the batches of the whole run.
      checkpoints: where the run resumes from, and where its states go.
      log: gets a row for each step.
      held_out: evaluates every so often; None leaves it out.
      checkpoint_every: steps between checkpoints.
      nonfinite: what a non-finite step does: 'stop' the run, or 'skip' it (the step must have been made for that).
      profile_steps: steps traced for TensorBoard's profiler, after two that warm up.
      profile_folder: where the trace goes.
      rate: what the speed of a step depends on, for `rates`.
    """

    def __init__(
        self,
        step: TrainStep,
        stream: Stream,
        *,
        checkpoints: Checkpoints,
        log: TrainingLog,
        held_out: HeldOut | None = None,
        checkpoint_every: int = 50,
        nonfinite: str = "stop",
        profile_steps: int = 0,
        profile_folder: epath.Path | None = None,
        rate: str = "",
    ):
        self.step, self.stream, self.checkpoints, self.log, self.held_out = step, stream, checkpoints, log, held_out
        self.checkpoint_every, self.nonfinite = checkpoint_every, nonfinite
        self.profile_steps, self.profile_folder = profile_steps, profile_folder
        self.rate = rate
        self.done = self.saved = 0  # steps
        self.state: TrainState | None = None

    def fit(self) -> TrainState:
        """Resume from the latest sound checkpoint, run the steps that are left, and return the state after them.

        Raises:
          UserError: a step is non-finite and `nonfinite` is 'stop'.
        """
        found = self.checkpoints.restore(self.step.abstract_state) or Restored(0, self.step.init(), [])
        self.done = self.saved = found.step
        self.state = found.state
        with self.log.resume(found.step, found.evaluations), processes.shared_preemption():
            try:
                with processes.watched():
                    self._run()
            except (KeyboardInterrupt, SystemExit):
                if self.done > self.saved and jax.process_count() == 1:  # several would have to save together
                    self._save()
                    print(f"\nSaved step {self.done}.")
                raise
            finally:
                self.checkpoints.wait()
        return self.state

    def _run(self) -> None:
        """The loop."""
        workdir = self.log.workdir
        progress = Progress("train", len(self.stream), "steps", self.done, workdir=workdir, rate=self.rate)
        rate = matmul_rate(self.step.mesh, jax.tree.leaves(self.step.base)[0].dtype)
        first = self.done + 2
        traced = range(first, min(first + self.profile_steps, len(self.stream)))
        if self.profile_steps and not traced:
            print("config.train.profile_steps: no step is traced; two warm up, and fewer than three are left.")
        self._evaluate_if_due()
        clock = time.monotonic()
        for number, batch in enumerate(self.stream.start(self.done), self.done):
            with signals.deferred():  # one between a step and its row would save the one without the other
                if traced and number == traced[0]:
                    jax.profiler.start_trace(str(self.profile_folder))
                metrics = self._train(number, batch)
                if traced and number == traced[-1]:
                    jax.profiler.stop_trace()
                    print(f"Trace of {len(traced)} steps: {self.profile_folder} (for TensorBoard's profile plug-in).")
                seconds, clock = time.monotonic() - clock, time.monotonic()
                self.log.add(round_row(self.done, metrics | self._speed(batch, seconds, rate)))
                margin = f", chosen over rejected {metrics['margin']:+.2f}" if "margin" in metrics else ""
                progress.update(self.done, f"loss {metrics['loss']:.3f}{margin}")
            if self._evaluate_if_due():
                clock = time.monotonic()
            processes.step()
            if stop := processes.preempted():
                self._save()
                self.checkpoints.wait()
                processes.barrier("saved")
                print(f"\nSaved step {self.done}.")
                signals.stop(stop)
            if self.done % self.checkpoint_every == 0 and self.done < len(self.stream):
                self._save()
        if self.done > self.saved:
            self._save()

    def _train(self, number: int, batch: Batch) -> dict[str, float]:
        """One step; its metrics on the host."""
        self.state, metrics = self.step(self.state, batch, number)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
        finite = bool(metrics.pop("finite"))
        if not finite:
            self._report_nonfinite(number, metrics)
        self.done = number + 1
        return metrics | ({"skipped": float(not finite)} if self.nonfinite == "skip" else {})

    def _report_nonfinite(self, number: int, metrics: dict) -> None:
        """Name a step whose loss, gradient or update is non-finite; end the run if it must not be skipped."""
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        rows = ", ".join(pair.id for pair in self.stream.rows(number))
        what = f"Step {number + 1} is non-finite (NaN or Inf): loss {loss}, gradient norm {norm}"
        if abs(loss) + norm < float("inf"):
            what += f", finite themselves but not the update with learning rate {metrics['learning_rate']:g}"
        if self.nonfinite == "skip":
            print(f"{what}; rows {rows}. Skipped: the adapter stays as it was.")
            return
        raise UserError(
            f"{what}. The last checkpoint is of step {self.saved}. Lower config.train.learning_rate (or "
            "config.lora.alpha, config.train.weight_decay if they are large), look at the rows, or set "
            f"config.train.nonfinite='skip'. Rows: {rows}."
        )

    def _evaluate_if_due(self) -> bool:
        """Evaluate on the held-out pairs where that belongs; whether it did."""
        if self.held_out is None or not self.held_out.due(self.done, len(self.stream)):
            return False
        self.held_out.evaluate(self.done, self.state)
        return True

    def _save(self) -> None:
        """Save a checkpoint of the steps done, with the evaluations until then."""
        self.log.save()
        self.saved = self.done  # before the call, which ends even if a signal comes meanwhile
        self.checkpoints.save(self.done, self.state, self.log.evaluations)

    def _speed(self, batch: Batch, seconds: float, rate: float) -> dict[str, float]:
        """How fast a step was, rows that only fill the batch aside.

        Args:
          rate: FLOP/s of matmuls that all devices together reach.
        """
        real, padded = self.stream.tokens(batch)
        result = {
            "pairs_per_s": float(batch.weights.sum()) / seconds,
            "tokens_per_s": real / seconds,
            "padding_fraction": 1 - real / padded,
            "mfu": self.step.flops(batch) / seconds / rate,
        }
        memory = jax.local_devices()[0].memory_stats()  # none on a CPU
        if memory and "peak_bytes_in_use" in memory:
            result["peak_memory_gb"] = memory["peak_bytes_in_use"] / 1e9
        return result
