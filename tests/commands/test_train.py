"""`train` on a small random model: the whole path, what it writes, what it resumes from and what it refuses."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from roserag_jax import automatic_mesh, train
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.report import page
from roserag_jax.workdir import Workdir, digest


def test_train_writes_every_artifact_and_keeps_it_the_second_time(finished, capsys):
    """Every artifact of the contract, and a second run that makes nothing again."""
    work = Workdir(finished.workdir)
    pairs = work.rows("pairs.jsonl")
    assert pairs and set(pairs[0]) >= {
        "id",
        "prompt",
        "chosen",
        "rejected",
        "chosen_logprob",
        "rejected_logprob",
        "margin",
    }
    candidate = work.rows("candidates.jsonl")[0]["candidates"][0]
    assert set(candidate) == {"response", "rationale", "answer", "source", "count", "correct", "logprob", "tokens"}
    for system in ("base", "adapter"):
        metrics = json.loads((work / f"eval/{system}/metrics.json").read_text())
        assert metrics["questions"] == 5 and set(metrics) >= {"em", "f1", "em_interval", "by_type"}
        predictions = json.loads((work / f"eval/{system}/predictions.json").read_text())
        assert len(predictions["answer"]) == 5 and "sp" in predictions
    steps = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, len(steps) + 1)) and all(np.isfinite(s["loss"]) for s in steps)
    assert list((work / "tensorboard").iterdir())
    assert not (work / ".parts").exists() or not list((work / ".parts").iterdir())
    before = {f: digest(work / f) for f in ("candidates.jsonl", "pairs.jsonl", "adapter", "eval")}
    stages = [json.loads(line)["stage"] for line in (work / "stages.jsonl").read_text().splitlines()]
    assert stages == ["evaluate base", "generate", "train", "evaluate adapter"]
    assert 'id="pairs-list"' in (work / "report.html").read_text()
    train.run(finished)
    out = capsys.readouterr().out
    assert out.count("up to date: kept") == 10 and "To do: nothing, unless something is out of date." in out
    for name in ("eval/adapter", "candidates.jsonl", "adapter"):  # as if they were yet to come
        (work / f"{name}.manifest.json" if "." in name else work / name / "manifest.json").rename(work / "aside")
        todo = train.outlook(finished, work)
        of = {"eval/adapter": "evaluate adapter (5 questions)", "candidates.jsonl": "generate (6 questions)"}
        of = of.get(name, "select and train")
        assert f"To do: {of}. By the rates of earlier runs on this machine: " in todo and "about " in todo
        (work / "aside").rename(work / f"{name}.manifest.json" if "." in name else work / name / "manifest.json")
    assert before == {f: digest(work / f) for f in before}


def test_train_keeps_everything_where_files_are_named_by_another_path(finished, config_of, capsys, monkeypatch):
    """The model and the questions by a relative path, and the folder with a slash at its end."""
    model, data = Path(finished.model), Path(finished.data.train)
    monkeypatch.chdir(model.parent)
    otherwise = config_of(
        os.path.relpath(data), finished.workdir, **{"model": f"{model.name}/", "data.eval": str(finished.data.eval)}
    )
    train.run(otherwise)
    out = capsys.readouterr().out
    assert out.count("up to date: kept") == 10 and "rebuilding" not in out


def test_train_whose_report_cannot_be_written_warns_and_ends_well(finished, capsys, monkeypatch):
    """The adapter is published by then: a disk that is full, or a defect, is one line with what to do."""
    work, again = Workdir(finished.workdir), f"To try again: roserag report {finished.workdir}"
    page_before = (work / "report.html").read_text()

    def full_disk(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(page, "write_atomic", full_disk)
        train.run(finished)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "report" in line]
    why = f"OSError: [Errno 28] No space left on device: '{work / 'report.html'}'"
    assert line == f"Warning: no report was written ({why}). {again}"
    monkeypatch.setattr(page, "summary", lambda run: run.absent)
    train.run(finished)
    out = capsys.readouterr().out
    assert f"Warning: no report was written (AttributeError: 'Run' object has no attribute 'absent'). {again}" in out
    assert (work / "report.html").read_text() == page_before and "Next: " in out


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"mesh.fsdp": 4, "mesh.tensor": 2}, {"mesh.memory_gb": 1e-4}], ids=["told", "auto"])
def test_train_on_eight_devices_makes_the_same(mesh, finished, config_of, questions, monkeypatch):
    """The whole path on a mesh of eight: the same candidates and pairs, the same answers before and after.

    With the automatic mesh of devices with too little memory, decoding is in tensor and training in fsdp.
    """
    monkeypatch.setattr(automatic_mesh, "make_mesh", make_mesh)
    config = config_of(questions, **mesh)
    train.run(config)
    ours, theirs = Workdir(config.workdir), Workdir(finished.workdir)
    texts = lambda work: [(p["id"], p["chosen"], p["rejected"]) for p in work.rows("pairs.jsonl")]
    assert texts(ours) == texts(theirs)
    losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    for system in ("base", "adapter"):
        answers = lambda work, system=system: json.loads((work / f"eval/{system}/predictions.json").read_text())
        assert answers(ours) == answers(theirs)


def test_train_refuses_wandb_that_is_not_installed(config_of, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train.run(config_of(**{"train.wandb": "project"}))


def test_train_starts_from_an_adapter(finished, config_of, questions):
    """`config.lora.start`: the first loss is not that of a fresh adapter; another shape is refused before any work."""
    first = lambda config: json.loads((Workdir(config.workdir) / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    adapter = str(Workdir(finished.workdir) / "adapter")
    config = config_of(questions, **{"lora.start": adapter, "train.evaluate": False})
    train.run(config)
    assert first(config) < first(finished)
    with pytest.raises(UserError, match=r"has rank 4, not 8: set config.lora.rank"):
        train.run(config_of(questions, **{"lora.start": adapter, "lora.rank": 8}))
    with pytest.raises(UserError, match="holds no adapter"):
        train.run(config_of(questions, **{"lora.start": finished.workdir}))


@pytest.mark.slow
def test_train_evaluates_and_keeps_the_best(config_of, questions, capsys):
    """Held-out pairs and questions before, while and after training; the best checkpoint is kept and can be chosen."""
    changes = {"train.held_out": 0.34, "train.evaluate_every": 2, "train.answer_questions": 1, "train.evaluate": False}
    changes |= {"train.learning_rate": 0.05, "train.profile_steps": 1}  # too fast, so that the best is an early one
    config = config_of(questions, **changes)
    train.run(config)
    out, work = capsys.readouterr().out, Workdir(config.workdir)
    assert "pairs held out" in out and "margin in training" in out and (work / "profile").exists()
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    evaluations, steps = [[r for r in rows if name in r] for name in ("held_out_loss", "loss")]
    last = steps[-1]["step"]
    assert [e["step"] for e in evaluations] == sorted({*range(0, last + 1, 2), last})
    assert all(0 <= e["held_out_f1"] <= 100 and np.isfinite(e["held_out_loss"]) for e in evaluations)
    assert 0 < steps[-1]["mfu"] < 1

    best = max(evaluations, key=lambda e: e["held_out_f1"])["step"]  # the first of equals
    expected = [{k: v for k, v in r.items() if "held_out" in k or k in ("step", "loss")} for r in rows]
    latest = digest(work / "adapter")
    config.train.keep = "best"
    train.run(config)  # from the checkpoints, without a step
    out = capsys.readouterr().out
    assert f"The adapter is that of step {best}, the best." in out and "resuming at" not in out
    assert (digest(work / "adapter") == latest) == (best == last)
    config.train.keep = "latest"
    train.run(config)
    assert digest(work / "adapter") == latest
    config.train.keep = "best"
    train.run(config)
    again = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in r.items() if "held_out" in k or k in ("step", "loss")} for r in again] == expected
