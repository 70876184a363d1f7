"""The commands in processes of their own: killed and gone on with, told to stop, several at once, and bad input."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from roserag_jax import options, retrieve, train
from roserag_jax.workdir import Workdir, digest

torch = pytest.importorskip("torch")


def command(stage, config, *arguments, wait=True, file=None, **environment):
    """Run a command in a process of its own, with its configuration in a file and further environment variables."""
    file = file or os.path.join(config.workdir, "config_for_test.py")
    os.makedirs(os.path.dirname(file), exist_ok=True)
    flat = options.subset(config, *(name for name, _ in options.walk()))
    with open(file, "w") as stream:
        stream.write("from roserag_jax import options\ndef get_config():\n    config = options.defaults()\n")
        stream.writelines(f"    config.{name} = {value!r}\n" for name, value in flat.items())
        stream.write("    return config\n")
    line = [sys.executable, "-m", f"roserag_jax.{stage}", "--config", file, *arguments]
    environment = {**os.environ, **environment}
    if wait:
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def stop_when(process, seen, how):
    """Signal a running command as soon as `seen()` is true."""
    deadline = time.monotonic() + 200
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


def test_killed_and_gone_on_with_is_the_same(config_of, questions, finished):
    """SIGKILL while generating and SIGTERM while training, then the same command: the bytes of an uninterrupted run
    with one question at a time, and the texts of one with several."""
    config, uninterrupted = (config_of(questions, **{"generate.batch": 1}) for _ in range(2))
    work = Workdir(config.workdir)
    parts = work / ".parts"
    process = command("train", config, "--config.train.evaluate=False", wait=False)
    code, _ = stop_when(process, lambda: parts.exists() and any(parts.glob("generate*/*.jsonl")), signal.SIGKILL)
    assert code == -signal.SIGKILL and not (work / "pairs.jsonl").exists()

    checkpoints = work / "checkpoints"
    process = command("train", config, "--config.train.evaluate=False", wait=False)
    saved = lambda: checkpoints.exists() and any(checkpoints.glob("*/2"))
    code, output = stop_when(process, saved, signal.SIGTERM)
    assert code == 143 or (code == 0 and (work / "adapter/manifest.json").exists()), output
    assert re.search(r"generate: resuming at \d of 6 questions", output), output

    for each in (config, uninterrupted):
        assert command("train", each, "--config.train.evaluate=False").returncode == 0
    reference = Workdir(uninterrupted.workdir)
    for artifact in ("candidates.jsonl", "pairs.jsonl", "adapter"):
        assert digest(work / artifact) == digest(reference / artifact), artifact
    said_of = lambda work: [[c["response"] for c in row["candidates"]] for row in work.rows("candidates.jsonl")]
    assert said_of(work) == said_of(Workdir(finished.workdir))
    losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert losses(work) == losses(reference)


def test_two_processes_train_as_one(config_of, questions, finished):
    """Two real processes with a device each, stopped while decoding and while training, then gone on with: what one
    makes. The last two find out where they meet from what Slurm sets; the others are told.
    """
    # Twelve steps, each with its checkpoint: time enough for both to agree on the step at which they stop.
    shared = {"train.held_out": 0.34, "train.epochs": 6, "train.checkpoint_every": 1}
    one = config_of(questions, **shared, **{"train.evaluate": False, "data.pairs": f"{finished.workdir}/pairs.jsonl"})
    train.run(one)
    config = config_of(questions, **shared, **{"mesh.data": 2, "mesh.fsdp": 1})
    expected, alone, work = Workdir(one.workdir), Workdir(finished.workdir), Workdir(config.workdir)

    start = lambda distributed, **slurm: command(
        "train", config, f"--config.distributed={distributed}", wait=False, **slurm
    )

    def start_both():
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [start(f"localhost:{port},2,{i}") for i in range(2)]

    with work.lock():  # where one fails, the other does not wait for it
        runs = start_both()
        said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], said
    assert "in use by another run" in said[0] and "error: process 0: config.workdir" in said[1]

    first, second = start_both()
    decoding = lambda: any((work / ".parts").glob("generate*/*.jsonl"))
    code, said = stop_when(second, lambda: decoding() and first.send_signal(signal.SIGTERM) is None, signal.SIGTERM)
    said = [first.communicate(timeout=200)[0], said]
    assert code == first.returncode == 143 and not (work / "candidates.jsonl").exists(), said

    first, second = start_both()
    code, said = stop_when(second, lambda: any((work / "checkpoints").glob("*/1")), signal.SIGTERM)
    said = [first.communicate(timeout=200)[0], said]
    assert code == first.returncode == 143 and "generate: resuming at" in said[0] and "Saved step" in said[0], said
    # jax takes its port from the number of the job.
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    runs = [start("auto", **slurm, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    said = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert "train: resuming at" in said[0] and "train: " not in said[1]
    said_of = lambda work: [[c["response"] for c in row["candidates"]] for row in work.rows("candidates.jsonl")]
    assert said_of(work) == said_of(alone)
    predictions = lambda work: json.loads((work / "eval/base/predictions.json").read_text())
    assert predictions(work) == predictions(alone)
    rows = lambda work: map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    losses = lambda work: [row["loss"] for row in rows(work) if "loss" in row]
    np.testing.assert_allclose(losses(work), losses(expected), atol=1e-5)
    adapter = adapter_of(expected)
    for name, ours in adapter_of(work).items():
        np.testing.assert_allclose(ours, adapter[name], atol=1e-5, err_msg=name)


def adapter_of(work):
    from safetensors.numpy import load_file

    return load_file(work / "adapter" / "adapter_model.safetensors")


def test_bad_input_is_one_message(config_of, tmp_path, questions):
    """A non-zero exit and one line that says what to do; what was made stays."""
    config = config_of(questions)
    retrieve.run(config)
    kept = digest(Workdir(config.workdir) / "retrieved.jsonl")
    unreadable = tmp_path / "bad.jsonl"
    unreadable.write_text(questions.read_text() + "{no json\n")
    for arguments, expected in [
        ([f"--config.data.train={unreadable}", "--config.data.train_rows=0"], "line 7: not valid JSON"),
        (["--config.generate.sampels=3"], "no option config.generate.sampels; did you mean config.generate"),
        (["--config.train.epochs=many"], "many"),
        (["--config.select.strategy=hardest"], "choose one of hard, easy, random, all"),
        (
            ["--config.data.pairs=p", "--config.train.held_out=0.3", "--config.train.answer_questions=2"],
            "config.train.answer_questions=2: pairs made elsewhere",
        ),
        (["--config.model=/nowhere/model"], "no folder /nowhere/model"),
        (["--config.mesh.tensor=7", "--config.mesh.fsdp=3"], "does not make 1 devices"),
        (["train"], "Unexpected argument 'train'"),
        (["--config=none.py"], "There is no configuration file none.py"),
        (["--config.train.gamma=1.0"], "config.train.gamma=1.0: config.train.loss='orpo' has no such term"),
        (
            ["--config.prompt.passages=0", "--config.evaluate.noise=('none', 'random1')"],
            "config.prompt.passages=0 shows no passages",
        ),
        (["--config.train.learning_rate=nan"], "config.train.learning_rate=nan: must be a finite number"),
        (["--config.prompt.stop=('',)"], "config.prompt.stop=('',): a tuple of texts"),
        (["--config.retrieve.cache=c.json"], "is read with config.retrieve.retriever=cache only"),
    ]:
        done = command("generate", config, *arguments)
        assert done.returncode == 2 and expected in done.stderr, (arguments, done.stderr[-2000:])
        assert "Traceback" not in done.stderr
    assert digest(Workdir(config.workdir) / "retrieved.jsonl") == kept
    with Workdir(config.workdir).lock():
        done = command("retrieve", config)
        assert done.returncode == 2 and "in use by another run" in done.stderr


def test_answer(finished, tmp_path):
    """One question from a folder of text, and a file of questions that bring their own contexts."""
    (tmp_path / "moss.txt").write_text("Moss is green.")
    corpus = f"--config.retrieve.corpus={tmp_path}"
    done = command("answer", finished, "--question", "Which colour is moss?", corpus)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("Answer: ")
        and re.search(r"1\. moss .*\(score", done.stdout)
        and "Moss is green." in done.stdout
    )
    (tmp_path / "tin.txt").write_text("Tin has no colour.")
    asked = ("--question", "Which colour is moss?", corpus, "--config.prompt.order=best_last")
    done = command("answer", finished, *asked)
    assert re.search(r"2\. moss .*\(score", done.stdout)  # the numbers are the prompt's
    (tmp_path / "tin.txt").unlink()
    rows = [{"id": "a", "question": "Why?", "contexts": [{"text": "Because."}]}, {"id": "b", "question": "How?"}]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("answer", finished, "--questions", str(file), corpus)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [a["id"] for a in answers] == ["a", "b"] and answers[1]["passages"][0]["title"] == "moss"
    done = command("answer", finished, "--questions", str(file))
    assert done.returncode == 2 and "has no contexts" in done.stderr


def test_help_and_options():
    done = subprocess.run([sys.executable, "-m", "roserag_jax.score", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--input" in done.stdout and "--config FILE" in done.stdout
    done = subprocess.run([sys.executable, "-m", "roserag_jax.train", "--options"], capture_output=True, text=True)
    assert all(f"--config.{name}=" in done.stdout and option.help in done.stdout for name, option in options.walk())


def test_scores_are_those_of_transformers(finished, config_of, model_folder, tmp_path):
    """`score` on rows of unequal prompts and numbers of responses, in order; with the adapter where there is one."""
    import transformers

    rows = [{"prompt": f"{'x' * n} question {n}?", "responses": ["yes", "a longer no"][: 1 + n % 2]} for n in range(3)]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("score", config_of(), "--input", str(file), "--output", str(out))
    assert done.returncode == 0 and "no adapter" in done.stderr, done.stderr
    scores = [json.loads(line) for line in out.read_text().splitlines()]
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    for row, score in zip(rows, scores, strict=True):
        prompt = tokenizer(row["prompt"]).input_ids
        for response, logprob, count in zip(row["responses"], score["logprobs"], score["tokens"], strict=True):
            tokens = tokenizer(response).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits, -1)[range(len(tokens)), tokens].sum().item()
            assert logprob == pytest.approx(expected, abs=1e-3) and count == len(tokens)
    adapted = command("score", finished, "--input", str(file))
    assert "adapter: " in adapted.stderr and json.loads(adapted.stdout.splitlines()[0]) != scores[0]
