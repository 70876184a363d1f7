"""`score`: log-probabilities as transformers gives them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_command

from roserag_jax import session
from roserag_jax.errors import UserError
from roserag_jax.workdir import Workdir

torch = pytest.importorskip("torch")


def test_score_equals_transformers(finished, config_of, model_folder, tmp_path):
    """`score` on rows of unequal prompts and numbers of responses, in order; with the adapter where there is one."""
    import transformers

    rows = [{"prompt": f"{'x' * n} question {n}?", "responses": ["yes", "a longer no"][: 1 + n % 2]} for n in range(3)]
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command("score", config_of(), "--input", str(file), "--output", str(out))
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
    adapted = run_command("score", finished, "--input", str(file))
    assert "adapter: " in adapted.stderr and json.loads(adapted.stdout.splitlines()[0]) != scores[0]


def test_score_and_answer_refuse_a_damaged_adapter(finished, config_of, tmp_path):
    """One flipped bit in the adapter: no command uses it, the workdir's own or one that is named."""
    config, rows = config_of(), tmp_path / "in.jsonl"
    shutil.copytree(Path(finished.workdir) / "adapter", Path(config.workdir) / "adapter")
    rows.write_text('{"prompt": "x", "responses": ["y"]}\n')
    file = Path(config.workdir) / "adapter/adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    damaged = r"adapter_model.safetensors was changed or damaged"
    for find in (session.find_adapter, session.adapter_folder):
        with pytest.raises(UserError, match=damaged):
            find(config, Workdir(config.workdir))
    done = run_command("score", config, "--input", str(rows))
    assert done.returncode == 2 and re.search(damaged, done.stderr) and not done.stdout, done.stderr
    with pytest.raises(UserError, match=damaged):
        session.checked_adapter(Path(config.workdir) / "adapter")
