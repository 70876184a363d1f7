"""The trainer: the same end however it was stopped, evaluation while training, and what may be published."""

import copy
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import LORA, PAIRS

from roserag_jax.errors import UserError
from roserag_jax.hub import loading
from roserag_jax.training.checkpoints import Checkpoints, Restored
from roserag_jax.training.held_out import HeldOut, score
from roserag_jax.training.log import TrainingLog
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Stream
from roserag_jax.training.train_step import TrainStep, adamw
from roserag_jax.training.trainer import Trainer
from roserag_jax.workdir import Workdir

torch = pytest.importorskip("torch")
# All of one shape, so that one program serves all tests. The held-out pairs are flipped: training makes them worse.
FIVE = [PAIRS[i] for i in (0, 2, 3, 4, 6)]
STREAM = Stream(FIVE, batch=2, pad_id=0, epochs=2)
HELD = Stream([p._replace(chosen=p.rejected, rejected=p.chosen) for p in FIVE[:3]], batch=2, pad_id=0)


@pytest.fixture(scope="module")
def step(tiny_llama, one_device):
    opened, base = tiny_llama
    adapter = loading.init_adapter(opened.config, LORA, one_device, jax.random.key(0))
    model = loading.assemble(opened.config, base, LORA, adapter)
    objective, optimizer = Objective(remat="none"), adamw(3e-2, steps=len(STREAM))
    return TrainStep(model, one_device, objective=objective, optimizer=optimizer, skip_nonfinite=True)


class Run:
    """A run in a folder; each is a start of the same command."""

    def __init__(self, folder, step, every=2, question_answering=None, stream=STREAM, **options):
        self.work = Workdir(str(folder))
        self.folder = self.work / "checkpoints" / "run"
        self.checkpoints = Checkpoints(self.folder, keep=1)
        self.best = Checkpoints(self.folder / "best", keep=2)
        self.log = TrainingLog(self.work, self.folder)
        self.held_out = HeldOut(
            step, HELD, log=self.log, best=self.best, every=every, question_answering=question_answering
        )
        options = {"checkpoint_every": 2} | options
        self.trainer = Trainer(
            step, stream, checkpoints=self.checkpoints, log=self.log, held_out=self.held_out, **options
        )

    def fit(self):
        with self.checkpoints, self.best:
            return jax.tree.map(np.asarray, self.trainer.fit())

    def restore_best(self):
        with self.checkpoints, self.best:
            state = self.trainer.fit()
            return self.held_out.restore_best(state, self.trainer.done, self.checkpoints)

    def numbers(self):
        """What a resumed run must repeat: the rows of the log but for their times."""
        kept = ("step", "loss", "margin", "held_out_loss", "learning_rate", "gradient_norm")
        return [{name: row[name] for name in kept if name in row} for row in self.log.all]


@pytest.fixture(scope="module")
def uninterrupted(step, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("run"), step)
    return run, run.fit()


def stop_at(number, monkeypatch):
    """Let Ctrl-C come as a step begins; returns what lifts it."""
    call = TrainStep.__call__

    def interrupted(self, state, batch, step):
        if step == number:
            raise KeyboardInterrupt
        return call(self, state, batch, step)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    return lambda: monkeypatch.setattr(TrainStep, "__call__", call)


@pytest.mark.parametrize("metrics", ["kept", "deleted", "torn"])
def test_trainer_resumes_to_the_same_end(metrics, uninterrupted, step, tmp_path, monkeypatch, capsys):
    """Stopped in the middle, the same state to the bit, and the same evaluations even if `metrics.jsonl` was lost."""
    lift = stop_at(3, monkeypatch)
    run = Run(tmp_path, step)
    with pytest.raises(KeyboardInterrupt):
        run.fit()
    assert "Saved step 3" in capsys.readouterr().out
    lift()
    file = run.folder / "metrics.jsonl"
    if metrics == "deleted":
        file.unlink()
    elif metrics == "torn":
        file.write_bytes(file.read_bytes()[:-20])
    resumed, (whole, expected) = Run(tmp_path, step), uninterrupted
    jax.tree.map(np.testing.assert_array_equal, resumed.fit(), expected)
    assert resumed.log.evaluations == whole.log.evaluations and len(whole.log.evaluations) == 4
    lost = {"kept": [], "deleted": [1, 2, 3], "torn": [3]}[metrics]
    assert resumed.numbers() == [row for row in whole.numbers() if "loss" not in row or row["step"] not in lost]
    assert ("resumes; its curve has a gap" in capsys.readouterr().out) == bool(lost)
    jax.tree.map(np.testing.assert_array_equal, Run(tmp_path, step).fit(), expected)  # nothing is left to do


def damage(folder):
    for file in Path(folder).rglob("d/*"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(bytes(data))


def test_trainer_never_publishes_another_adapter_than_the_best(uninterrupted, step, tmp_path, capsys):
    """A flipped bit in the best checkpoint: an error that says what to do, each time; `keep='latest'` still works."""
    run = Run(tmp_path, step)
    assert run.restore_best().step == 0
    jax.tree.map(np.testing.assert_array_equal, run.trainer.state, uninterrupted[1])
    for _ in range(2):
        damage(run.folder / "best")
        expected = r"keep='best': the checkpoint of step 0.*keep='latest'.*step 6, or move .*away"
        with pytest.raises(UserError, match=expected):
            Run(tmp_path, step).restore_best()
    assert "best/0 is damaged" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, Run(tmp_path, step).fit(), uninterrupted[1])


def test_held_out_restores_the_best_from_the_runs_own_checkpoints(step, tmp_path):
    """Where `best/` is damaged but the run still has the step, it is the same state."""
    run = Run(tmp_path, step)
    state = step.init()
    with run.checkpoints, run.best, run.log.resume(0):
        run.held_out.evaluate(0, state)
        run.checkpoints.save(0, state)
        run.checkpoints.wait()
        damage(run.folder / "best")
        found = run.held_out.restore_best(state, 5, run.checkpoints)
    assert found.step == 0
    jax.tree.map(np.testing.assert_array_equal, found.state, state)


def test_held_out_compares_evaluations_of_one_measure(step, tmp_path, capsys):
    """After `answer_questions` was changed, F1 is not compared with losses, nor F1 on other questions with it."""

    class Answers:  # what QuestionAnswering says of one question, and of two
        def __init__(self, questions, f1):
            self.measure, self.f1 = f"F1 on {questions} questions", f1

        def __call__(self, adapter):
            return {"em": 0.0, "f1": self.f1}

    answering = [Answers(1, 100.0), Answers(2, 50.0)]
    state, steps = step.init(), {}
    for done, each in ((0, None), (2, answering[0]), (4, answering[1])):
        run = Run(tmp_path / str(done), step, question_answering=each)
        with run.checkpoints, run.best, run.log.resume(done, [row for rows in steps.values() for row in rows]):
            assert run.held_out.due(done, 6) and run.held_out.evaluations == []
            run.held_out.evaluate(done, state)
            assert not run.held_out.due(done, 6)
            steps[done] = run.log.evaluations[-1:]
            found = run.held_out.restore_best(state, done, run.checkpoints)
            assert found == Restored(done, state, []) and run.best._manager.all_steps() == [done]
    assert [score(row) for row in run.log.evaluations[1:]] == [100.0, 50.0] and run.log.evaluations[0][
        "held_out_loss"
    ] > 0
    assert "2 evaluations of this run are not by F1 on 2 questions" in capsys.readouterr().out


@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_trainer_names_nonfinite_steps(nonfinite, step, tmp_path, capsys):
    """A frozen weight is NaN: the run ends and saves nothing of it, or each such step is named and counted."""
    broken = copy.copy(step)
    broken.base = jax.tree.map(lambda a: a * np.nan, step.base)
    run = Run(tmp_path, broken, every=99, nonfinite=nonfinite, checkpoint_every=1)
    run.trainer.held_out = None
    if nonfinite == "stop":
        with pytest.raises(UserError, match=r"Step 1 is non-finite .*checkpoint is of step 0.*learning_rate.*Rows: q"):
            run.fit()
        assert run.checkpoints._manager.all_steps() == []
    else:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.fit()))
        assert "Step 6 is non-finite" in capsys.readouterr().out
        assert [row["skipped"] for row in run.log.steps] == [1.0] * 6


def test_trainer_names_updates_that_overflow(step, tmp_path):
    """Loss and gradient are finite, but the learning rate or the weight decay is not to be had."""
    trainer = Run(tmp_path, step).trainer
    with pytest.raises(UserError, match=r"finite themselves but not the update with learning rate 1e\+300"):
        trainer._report_nonfinite(0, {"loss": 1.0, "gradient_norm": 2.0, "learning_rate": 1e300})


def test_trainer_counts_real_rows_in_its_speed(step, tmp_path):
    """Rows that only fill the batch are no work done: neither tokens nor FLOPs."""
    stream = Stream(FIVE[:1], batch=2, pad_id=0)
    trainer = Run(tmp_path, step, stream=stream).trainer
    batch = stream.collate(0)
    speed = trainer._speed(batch, 2.0, 1e9)
    assert speed["pairs_per_s"] == 0.5 and speed["tokens_per_s"] == (19 + 5 + 9) / 2
    longer = batch._replace(
        prompt_lengths=batch.prompt_lengths + [0, 7], response_lengths=batch.response_lengths + [[0, 0], [3, 3]]
    )
    assert trainer._speed(longer, 2.0, 1e9) == speed
    alone = Stream(FIVE[:1], batch=1, pad_id=0)
    assert step.flops(alone.collate(0)) == step.flops(batch) > 0
