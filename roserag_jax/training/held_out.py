"""Evaluation while training, on pairs that are held out: their loss and, if requested, answers to their questions."""

import collections
from collections.abc import Callable

import numpy as np
from flax import nnx

from roserag_jax.errors import UserError
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.respond import respond_to_all
from roserag_jax.rag import answers, metrics
from roserag_jax.rag.chat import opens_thoughts
from roserag_jax.training.checkpoints import Checkpoints, Restored
from roserag_jax.training.log import TrainingLog, round_row
from roserag_jax.training.pair_loader import Stream
from roserag_jax.training.train_step import TrainState, TrainStep


def score(evaluation: dict) -> float:
    """How good an evaluation is, among those of one measure: F1 where questions were answered, else minus the loss."""
    value = evaluation.get("held_out_f1")
    if value is None:
        loss = evaluation["held_out_loss"]
        value = -np.inf if loss is None else -loss
    return value


class QuestionAnswering:
    """Answers the questions of held-out pairs, and scores the answers.

    Args:
      engine_of: the engine of the network with an adapter.
      rows: the questions, with their golden answers and prompts.
      prompts: the prompts as tokens.
      metric: how answers are compared, as `config.evaluate.metric`.
      language: of the answers.
      answer_line: whether the prompts ask for one.
      limits: of the responses, as `inference.respond` takes them.
    """

    def __init__(
        self,
        engine_of: Callable[[nnx.State], Engine],
        tokenizer,
        rows: list[dict],
        prompts: list[list[int]],
        *,
        metric: str,
        language: str,
        answer_line: bool = True,
        **limits,
    ):
        self.engine_of, self.tokenizer, self.answer_line = engine_of, tokenizer, answer_line
        self.rows, self.prompts, self.limits = rows, prompts, limits
        self.compare = answers.Measure(metric, language)
        kind = f"{metric} in {language}" if language else metric
        limit = limits["max_new_tokens"]
        self.measure = f"F1 ({kind}) on {len(rows)} questions with responses of at most {limit} tokens"

    def __call__(self, adapter: nnx.State) -> dict[str, float]:
        """EM and F1 in percent."""
        scores = []
        for response in respond_to_all(self.engine_of(adapter), self.tokenizer, self.prompts, **self.limits):
            row = self.rows[response.number]
            _, *answer = answers.parse(response.text, opens_thoughts(row["prompt"]), self.answer_line)
            scores.append(metrics.score_row(row, *answer, self.compare))
        return {name: 100 * float(np.mean([each[name] for each in scores])) for name in ("em", "f1")}


class HeldOut:
    """Evaluates every so often, and keeps the checkpoint of the best evaluation.

    Evaluations are compared by F1 where questions are answered, else by loss; only with those of the same measure, for
    a run may be resumed with another number of questions.

    Args:
      stream: the held-out pairs.
      every: steps between evaluations; also before the first step and after the last.
      best: where the best checkpoint is kept.
      question_answering: for EM and F1; None leaves them out.
    """

    def __init__(
        self,
        step: TrainStep,
        stream: Stream,
        *,
        log: TrainingLog,
        best: Checkpoints,
        every: int,
        question_answering: QuestionAnswering | None = None,
    ):
        self.step, self.stream, self.log, self.best, self.every = step, stream, log, best, every
        self.question_answering = question_answering
        self.measure = question_answering.measure if question_answering else "loss"

    @property
    def evaluations(self) -> list[dict]:
        """The evaluations of this measure so far."""
        return [row for row in self.log.evaluations if row.get("measure") == self.measure]

    def due(self, step: int, last: int) -> bool:
        """Whether an evaluation belongs at this step and has not been made."""
        return (step % self.every == 0 or step == last) and all(row["step"] != step for row in self.evaluations)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluate, log it, and keep the state if it is the best so far."""
        totals, count = collections.Counter(), 0.0
        for batch in self.stream.start(0):
            means = self.step.evaluate(state.adapter, batch)
            count += (pairs := float(batch.weights.sum()))
            for name, value in means.items():
                totals[name] += pairs * float(value)
        found = {name: total / count for name, total in totals.items()}
        if self.question_answering:
            found |= self.question_answering(state.adapter)
        row = round_row(step, {f"held_out_{name}": value for name, value in found.items()}, measure=self.measure)
        if score(row) > max(map(score, self.evaluations), default=-np.inf):
            self.best.save(step, state)
            self.best.wait()  # before the row says that it is the best
        self.log.add(row)
        shown = [f"{name} {row[f'held_out_{name}']}" for name in ("loss", "em", "f1") if f"held_out_{name}" in row]
        print(f"Step {step}, held out: {', '.join(shown)}.")

    def restore_best(self, state: TrainState, done: int, checkpoints: Checkpoints) -> Restored:
        """The checkpoint of the best evaluation, from where it is kept or from the run's own.

        Args:
          state: that after `done` steps.

        Raises:
          UserError: it is in neither, or damaged.
        """
        if others := len(self.log.evaluations) - len(self.evaluations):
            print(f"{others} evaluations of this run are not by {self.measure}, and not compared.")
        step = max(self.evaluations, key=score)["step"]
        if step == done:
            return Restored(step, state, [])
        for place in (self.best, checkpoints):
            if found := place.restore(state, step):
                return found
        raise UserError(
            f"config.train.keep='best': the checkpoint of step {step}, the best by {self.measure}, is missing or "
            f"damaged ({self.best.folder}). No adapter was published. Set config.train.keep='latest' to publish that "
            f"of step {done}, or move {checkpoints.folder} away to train again."
        )
