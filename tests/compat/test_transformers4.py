"""What `export` and `train` write, read by transformers 4 and the PEFT of its time in an environment of their own.

`make test-compat` makes that environment and names its Python in COMPAT_PYTHON; elsewhere these tests are skipped.
"""

import json
import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, random_adapter, tokens_logits, write_files, write_gguf

from roserag_jax.hub import gguf, loading, merged_export, model_files, peft_adapter, tokenizer
from roserag_jax.models.lora import LoRAConfig

PYTHON = os.environ.get("COMPAT_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="run by `make test-compat`")
TOKENS = np.random.default_rng(0).integers(3, 131, 40)
TEXT = "Who founded the Tern Museum in 1901, and where? <|im_end|> Ünïcode 日本語\n\n"
LORA = LoRAConfig(rank=4, alpha=8.0)


def read_by_transformers_4(jobs: dict, folder: Path) -> dict:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("read_models.py")
    run = subprocess.run(
        [PYTHON, script, folder / "jobs.json", folder / "results.json"], capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    assert all(result["version"].startswith("4.") for result in results.values())
    return results


@pytest.fixture(scope="module")
def read(tiny_folder, model_folder, smollm_path, one_device, tmp_path_factory):
    """`(requested, found)` by name: logits by this network, and what transformers 4 reads in the exported folders."""
    folder, jobs, logits = tmp_path_factory.mktemp("compat"), {}, {}
    bases = {family: tiny_folder(family)[0] for family in FAMILIES}
    bases |= {f"{arch}.gguf": write_gguf(arch, folder)[0] for arch in gguf.FAMILIES}
    bases["linear.gguf"] = write_gguf("qwen2", folder / "linear", **{"rope.scaling.factor": 4.0})[0]
    for name, base in bases.items():
        opened = model_files.open_model(str(base))
        frozen = loading.load_base(opened, jnp.dtype("float32"), one_device)
        adapter = random_adapter(opened.config, LORA, one_device)
        model = loading.assemble(opened.config, frozen, LORA, adapter)
        exported = folder / f"exported-{name}"
        exported.mkdir()
        merged_export.save_weights(model, exported, shard_bytes=50_000)
        merged_export.save_config(opened, "float32", exported)
        merged_export.save_generation_config(opened, (2,), 0, exported)
        jobs[name] = {"folder": str(exported), "tokens": TOKENS.tolist()}
        logits[name] = tokens_logits(model, TOKENS)
        if name == "llama":
            write_files(folder / "adapter", peft_adapter.adapter_files(adapter, LORA, str(base)))
            # The base itself is what version 5 saved, which version 4 misreads: PEFT gets it in both spellings.
            plain = folder / "base"
            plain.mkdir()
            merged_export.save_weights(loading.assemble(opened.config, frozen), plain)
            merged_export.save_config(opened, "float32", plain)
            jobs["adapter"] = {"folder": str(plain), "adapter": str(folder / "adapter"), "tokens": TOKENS.tolist()}
            logits["adapter"] = logits[name]
    for name, base in {"smollm": smollm_path, "bytes": model_folder}.items():
        exported = folder / f"tokenizer-{name}"
        exported.mkdir()
        opened = model_files.open_model(str(base))
        merged_export.save_config(opened, "bfloat16", exported)
        merged_export.save_generation_config(opened, (2,), 0, exported)
        merged_export.save_tokenizer(base, exported)
        jobs[name] = {"folder": str(exported), "text": TEXT, "save": str(folder / f"saved-{name}")}
    return logits, read_by_transformers_4(jobs, folder), folder


@pytest.mark.parametrize("name", [*FAMILIES, *(f"{arch}.gguf" for arch in gguf.FAMILIES), "linear.gguf", "adapter"])
def test_exported_models_give_the_same_logits_in_transformers_4(name, read):
    logits, found, _ = read
    assert found[name]["dtype"] == "torch.float32"
    np.testing.assert_allclose(np.array(found[name]["logits"]), logits[name], atol=1e-4, rtol=0)


def test_an_exported_gguf_tokenizer_is_the_same_in_transformers_4(read, smollm_tokenizer):
    found = read[1]["smollm"]
    assert found["ids"] == smollm_tokenizer(TEXT).input_ids
    turns = [{"role": "user", "content": TEXT}]
    assert found["chat"] == smollm_tokenizer.apply_chat_template(turns, tokenize=False)
    assert found["special"] == [getattr(smollm_tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    assert found["ends"] == [2]


def test_an_exported_folders_tokenizer_is_the_same_in_transformers_4(read, model_folder):
    loaded, found = tokenizer.read_tokenizer(model_folder), read[1]["bytes"]
    assert found["ids"] == loaded(TEXT).input_ids and found["special"] == [1, 2, 0]
    assert found["ends"] == json.loads((model_folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("name", ["smollm", "bytes"])
def test_a_tokenizer_saved_by_transformers_4_is_copied_as_it_is(name, read, tmp_path):
    _, found, folder = read
    saved = folder / f"saved-{name}"
    merged_export.save_tokenizer(saved, tmp_path)
    names = {file.name for file in saved.iterdir()}
    assert "tokenizer.json" in names and names == {file.name for file in tmp_path.iterdir()}
    for file in saved.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    assert tokenizer.read_tokenizer(tmp_path)(TEXT).input_ids == found[name]["ids"]


def test_the_compared_adapter_changes_the_logits(read, tiny_llama):
    opened, base = tiny_llama
    without = tokens_logits(loading.assemble(opened.config, base), TOKENS)
    assert np.abs(without - read[0]["adapter"]).max() > 0.05
