"""The commands on a small random model: the whole path, what makes artifacts stale, and what each command says."""

import copy
import json
import re
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import decode

from roserag_jax import evaluate, export, generate, inspect, options, select, session, train
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.inference.requests import DecodeRequest
from roserag_jax.inference.respond import respond
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.report import comparison
from roserag_jax.training.train_step import TrainStep
from roserag_jax.workdir import Workdir, digest

torch = pytest.importorskip("torch")


def test_the_whole_path(finished, capsys):
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
    assert set(candidate) == {"response", "rationale", "answer", "source", "correct", "logprob", "tokens"}
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
    train.run(finished)
    assert capsys.readouterr().out.count("up to date: kept") == 8
    assert before == {f: digest(work / f) for f in before}


def test_eight_devices_make_the_same(finished, config_of, questions, monkeypatch):
    """The whole path on a mesh of eight: the same candidates and pairs, the same answers before and after."""
    monkeypatch.setattr(session, "make_mesh", make_mesh)
    config = config_of(questions, **{"mesh.fsdp": 4, "mesh.tensor": 2})
    train.run(config)
    ours, theirs = Workdir(config.workdir), Workdir(finished.workdir)
    texts = lambda work: [(p["id"], p["chosen"], p["rejected"]) for p in work.rows("pairs.jsonl")]
    assert texts(ours) == texts(theirs)
    losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=1e-4)
    for system in ("base", "adapter"):
        answers = lambda work, system=system: json.loads((work / f"eval/{system}/predictions.json").read_text())
        assert answers(ours) == answers(theirs)


def test_samples_from_elsewhere(finished, config_of, questions, tmp_path, capsys):
    """Responses in a file are verified as our own are, in batches that fit a memory limit, with the same result."""
    made = Workdir(finished.workdir).rows("candidates.jsonl")
    file, ours = tmp_path / "samples.jsonl", [row for row in made if row["candidates"]]
    lines = [{"id": row["id"], "samples": [c["response"] for c in row["candidates"]]} for row in ours]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"id": "other", "samples": ["x"]}]))
    changes = {"generate.plain_samples": 0, "generate.samples": str(file), "generate.memory_gb": 0.0005}
    config = config_of(questions, **changes)
    generate.run(config)
    out = capsys.readouterr().out
    assert f"samples for {len(ours)} of {len(made)} questions; 1 lines for others" in out
    assert re.search(r"generate: [12] questions at a time, \d+ MB each, of 0.0005 GB", out)
    for row, found in zip(made, Workdir(config.workdir).rows("candidates.jsonl"), strict=True):
        assert {c["source"] for c in found["candidates"]} <= {"outside"}
        by_rationale = {c["rationale"]: c for c in row["candidates"]}
        assert len(found["candidates"]) >= len(by_rationale) - 1  # a parsed answer may leave two rationales the same
        for candidate in found["candidates"]:
            same = by_rationale[candidate["rationale"]]
            assert candidate["answer"] == same["answer"] and candidate["correct"] == same["correct"]
            assert candidate["logprob"] == pytest.approx(same["logprob"], abs=1e-3)

    config.generate.memory_gb = 1e-6
    with pytest.raises(UserError, match="one question with"):
        generate.make(session.Session(config), Workdir(config_of(questions, **changes).workdir))
    config.generate.samples = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="There is no file"):
        generate.run(config)


def test_answers_that_were_sampled_are_judged(config_of, questions, tmp_path):
    """`generate.answer=sampled`: a sample's own answer line is right or wrong, and the whole response is scored."""
    texts = ["Passage 1 says so.\nAnswer: red", "Passage 1 says so.\nAnswer: blue", "Nobody knows."]
    file = tmp_path / "samples.jsonl"
    file.write_text(json.dumps({"id": json.loads(questions.read_text().splitlines()[0])["id"], "samples": texts}))
    config = config_of(
        questions, **{"generate.plain_samples": 0, "generate.samples": str(file), "generate.answer": "sampled"}
    )
    generate.run(config)
    row = Workdir(config.workdir).rows("candidates.jsonl")[0]
    assert [(c["response"], c["answer"]) for c in row["candidates"]] == [(texts[0], "red"), (texts[1], "blue")]
    assert row["dropped"] == {"no answer": 1} and row["candidates"][0]["tokens"] == len(texts[0])
    run = session.Session(config)
    prompt, engine = list(run.tokenizer(row["prompt"]).input_ids), run.engine()
    sums = engine.score(engine.prefill([prompt]), [prompt], [[list(run.tokenizer(t).input_ids) for t in texts]], 48)
    for candidate, logprob in zip(row["candidates"], sums[0].sum(-1), strict=False):
        assert candidate["logprob"] == pytest.approx(float(logprob), abs=1e-3)


def test_a_merged_adapter_says_the_same(finished):
    """Sampled and greedy tokens with the adapter beside the weights and folded into them."""
    run, folder = session.Session(finished), Path(finished.workdir) / "adapter"
    prompts = [list(b"What is red?"), list(b"Who?")]
    said = []
    for merge in (False, True):
        run.config.merge = merge
        engine = run.engine(folder)
        params = [SamplingParams(), SamplingParams(1.0, 0.9)]
        requests = [DecodeRequest([p[-1:]] * 2, 12, s, q) for p, s, q in zip(prompts, params, "ab", strict=True)]
        said.append([branch for row in decode(engine, prompts, requests, branches=2) for branch in row])
    run.config.merge = False
    for beside, merged in zip(*said, strict=True):
        assert beside.tokens == merged.tokens
        np.testing.assert_allclose(beside.logprobs, merged.logprobs, atol=1e-4)
    assert any(branch.tokens for branch in said[0])


def test_a_text_ends_a_response(finished):
    """`prompt.stop`: what stands before the text is the response, and it counts as finished."""
    run = session.Session(finished)
    prompts = [list(f"What is {name}?".encode()) for name in "abcdefgh"]

    def answers(*stop):
        options = {"slots": 3, "max_new_tokens": 24, "stop_strings": stop}
        return {response.number: response for response in respond(run.engine(), run.tokenizer, prompts, **options)}

    free = answers()
    longest = max((response.text for response in free.values()), key=len)
    for stop in (longest[len(longest) // 2 :][:2], longest[-2:]):  # in the middle, and where the limit is reached
        assert stop
        for i, response in answers(stop, "never said").items():
            before, found, _ = free[i].text.partition(stop)
            assert response.text == before and response.finished == (bool(found) or free[i].finished)


def test_options_make_stale_only_what_depends_on_them(finished, config_of, questions, capsys):
    again = config_of(questions, finished.workdir, **{"select.confidence": "sum", "generate.batch": 3})
    capsys.readouterr()
    select.run(again)
    out = capsys.readouterr().out
    assert "candidates.jsonl is up to date" in out
    assert "pairs.jsonl is out of date (config.select.confidence was 'mean', now 'sum')" in out
    select.run(finished)
    assert "now 'mean'" in capsys.readouterr().out


def test_made_up_questions_take_nobodys_place(finished, config_of):
    """A later command without the options that name the questions is refused, and nothing is made again."""
    work = Workdir(finished.workdir)
    before = [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]
    with pytest.raises(UserError, match=r"data.eval='synthetic', but .*/retrieved_eval.jsonl is of .*/eval.jsonl"):
        evaluate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match=r"data.train='synthetic', but .*/retrieved.jsonl is of .*/train.jsonl"):
        generate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match="evaluated on synthetic questions"):
        evaluate.run(config_of(finished.data.train, **{"data.eval": "synthetic"}))
    assert before == [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]


def test_adapter_and_merged_model_load_elsewhere(finished, model_folder):
    """peft on the adapter and transformers on the merged folder give the same logits."""
    peft = pytest.importorskip("peft")
    import transformers

    export.run(finished)
    export.run(finished)  # its own folder it makes again
    work = Workdir(finished.workdir)
    assert json.loads((work / "merged/merged_from.json").read_text())["adapter"] == str(work / "adapter")
    elsewhere = copy.deepcopy(finished)
    elsewhere.export.folder = str(model_folder)
    before = digest(model_folder)
    with pytest.raises(UserError, match="was not made by this command"):
        export.run(elsewhere)
    assert digest(model_folder) == before
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    # In float64 the files are compared, not torch's order of summation.
    adapted = peft.PeftModel.from_pretrained(base, work / "adapter").eval().double()
    merged = transformers.AutoModelForCausalLM.from_pretrained(work / "merged").eval().double()
    assert transformers.AutoTokenizer.from_pretrained(work / "merged")("abc").input_ids
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        original = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval().double()(tokens).logits
        size = original.abs().max()  # this model's weights are large, and so are its logits
        assert (adapted(tokens).logits - merged(tokens).logits).abs().max() < 1e-5 * size
        assert (merged(tokens).logits - original).abs().max() > 1e-4 * size


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


def test_wandb_must_be_installed(config_of, monkeypatch):
    monkeypatch.setattr(train, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        train.run(config_of(**{"train.wandb": "project"}))


def test_no_pair_survives(config_of):
    with pytest.raises(UserError, match=r"No pair survived selection: of 6 questions .*none correct"):
        select.run(config_of())


@pytest.mark.parametrize("name", ["quickstart", "hotpotqa_smollm2", "study", "gemma2b", "llama1b", "qwen1_5b"])
def test_every_configuration_builds(name):
    from importlib.util import module_from_spec, spec_from_file_location

    file = Path(__file__).parents[2] / "configs" / f"{name}.py"
    module = module_from_spec(spec := spec_from_file_location(name, file))
    spec.loader.exec_module(module)
    options.validate(module.get_config())


def test_training_goes_on_from_an_adapter(finished, config_of, questions):
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


def test_inspect(config_of, model_folder, capsys):
    import transformers

    inspect.run(config_of())
    out = capsys.readouterr().out
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert f"parameters           {reference.num_parameters():,}" in out
    assert "rank 4 on 7 projections" in out and "without a chat template" in out and "'</s>'" in out


def test_a_workdir_in_a_bucket(config_of, questions, tmp_path, capsys, monkeypatch):
    """The whole path through `gs://`, against an emulator: stopped, it goes on; the adapter is that of a local run."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for things that the emulator lacks
    for variable in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):  # gcsfs's and Orbax's
        monkeypatch.setenv(variable, f"http://localhost:{port}")
    server.start()
    try:
        local = config_of(questions)
        train.run(local)
        config = config_of(questions)
        config.workdir = "gs://bucket/runs/one"
        steps = TrainStep.__call__

        def interrupted(self, state, batch, step):
            if step == 3:
                raise KeyboardInterrupt
            return steps(self, state, batch, step)

        monkeypatch.setattr(TrainStep, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config)
        assert "Saved step 3" in capsys.readouterr().out
        monkeypatch.setattr(TrainStep, "__call__", steps)
        train.run(config)
        ours, theirs = Workdir(config.workdir), Workdir(local.workdir)
        losses = lambda work: [json.loads(line)["loss"] for line in (work / "metrics.jsonl").read_text().splitlines()]
        assert losses(ours) == losses(theirs)
        for name in ("pairs.jsonl", "adapter"):
            assert digest(ours / name) == digest(theirs / name)
        for name in ("eval/base", "eval/adapter"):
            assert ours.manifest(name)["rows"] == 5
        with pytest.raises(UserError, match="is not local"):
            export.run(config)
        config.export.folder = str(tmp_path / "merged")
        export.run(config)
        assert (tmp_path / "merged/model.safetensors").exists()
    finally:
        server.stop()


def test_systems_side_by_side(finished, config_of, tmp_path, capsys, monkeypatch):
    """One call: closed book, base and two adapters at two K and two noises; kept the second time; official files."""
    work = Workdir(finished.workdir)
    renamed = tmp_path / "other.1"
    renamed.mkdir()
    for file in (work / "adapter").iterdir():
        (renamed / file.name).write_bytes(file.read_bytes())
    changes = {
        "evaluate.systems": ("closed_book", "base", "adapter"),
        "evaluate.adapters": (str(renamed),),
        "evaluate.passages": (1, 2),
        "evaluate.noise": ("none", "counterfactual1"),
        "data.train": finished.data.train,
        "data.eval": finished.data.eval,
    }
    config = config_of(workdir=finished.workdir, **changes)
    before = digest(work / "eval/base")
    monkeypatch.chdir(tmp_path)
    evaluate.run(config)
    out = capsys.readouterr().out
    results = comparison.load(work / "eval")
    names = [f"{s}-k{k}{n}" for s in ("base", "adapter", "other_1") for k in (1, 2) for n in ("", "-counterfactual1")]
    assert set(results) == {"base", "adapter", "closed_book", *names} and digest(work / "eval/base") == before
    for name in (*names, "closed_book"):
        assert f"\n{name} " in out
    for text in ("distraction", "adapter-k1 - base-k1 ", "other_1-k2-counterfactual1 - base-k2-counterfactual1 "):
        assert text in out
    answers_of = lambda name: json.loads((work / f"eval/{name}/predictions.json").read_text())
    assert answers_of("adapter-k2") == answers_of("other_1-k2") and set(answers_of("base")) == {
        "answer",
        "sp",
        "evidence",
    }
    example = json.loads((work / "eval/base-k1-counterfactual1/examples.jsonl").read_text().splitlines()[0])
    assert "Passage 2:" in example["prompt"] and "Passage 3:" not in example["prompt"]
    assert example["response_tokens"] <= 12 and example["prompt_tokens"] > 50
    assert "Passage" not in (work / "eval/closed_book/examples.jsonl").read_text().split('"prompt":')[1]
    assert results["base-k1"]["seconds_per_question"] > 0 and results["base-k1"]["unparsed"] >= 0
    (tmp_path / "unrelated").touch()  # what else lies in the current folder plays no part
    evaluate.run(config)
    assert capsys.readouterr().out.count("up to date: kept") == 2 * 13  # questions and evaluation, each time
    assert "| base-k1 | " in comparison.summary(work / "eval", results, as_markdown=True)
    monkeypatch.setattr(sys, "argv", ["comparison", str(work / "eval"), "--against", "other_1"])
    comparison.main()
    out = capsys.readouterr().out
    assert "adapter-k2 - other_1-k2 " in out and "closed_book - other_1-k1 " in out and " - base" not in out
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "nobody"])
    with pytest.raises(SystemExit):
        comparison.main()
    assert "--against nobody: no such system; there are adapter, base, closed_book, other_1" in capsys.readouterr().err
    config.evaluate.passages = (3,)
    with pytest.raises(UserError, match="no question has 3 passages, at most 2"):
        evaluate.run(config)
    config.evaluate.adapters = (str(tmp_path / "base"),)
    with pytest.raises(UserError, match="would be called 'base', which is taken"):
        evaluate.run(config)
    for name in ("base-k5", "x-random3", "base-shuffled"):
        config.evaluate.adapters = (str(tmp_path / name),)
        with pytest.raises(UserError, match=f"would be called '{name}', which is how an evaluation with other"):
            evaluate.run(config)


def test_evaluate_needs_its_adapter(config_of):
    with pytest.raises(UserError, match="adapter is missing"):
        evaluate.run(config_of(**{"evaluate.systems": ("adapter",)}))
