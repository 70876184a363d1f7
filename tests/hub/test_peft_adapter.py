"""Adapters to and from PEFT, which is the oracle."""

import json

import jax
import numpy as np
import pytest
from conftest import hf_logits, random_adapter, tokens_logits, write_files
from safetensors.numpy import load_file, save_file

from roserag_jax.errors import UserError
from roserag_jax.hub import loading, peft_adapter
from roserag_jax.models.lora import LoRAConfig

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
TOKENS = np.random.default_rng(0).integers(3, 131, 24)


def with_adapter(tiny_llama, folder, mesh):
    """The network with an adapter in its weights: one program for all adapters."""
    opened, base = tiny_llama
    adapter = peft_adapter.load_adapter(folder, opened.config, mesh)
    return loading.merge_adapter(loading.assemble(opened.config, base, *adapter))


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_files_in_peft_and_back(rslora, tiny_folder, tiny_llama, one_device, tmp_path):
    """An adapter written here gives the same logits in peft; read back it is the same."""
    import transformers

    opened, base = tiny_llama
    lora = LoRAConfig(4, 12.0, 0.0, ("q_proj", "v_proj", "down_proj"), rslora)
    state = random_adapter(opened.config, lora, one_device)
    write_files(tmp_path, peft_adapter.adapter_files(state, lora, str(tiny_folder("llama")[0])))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    reference = peft.PeftModel.from_pretrained(reference, tmp_path).eval()
    found = tokens_logits(loading.assemble(opened.config, base, lora, state), TOKENS)
    np.testing.assert_allclose(found, hf_logits(reference, TOKENS), atol=1e-5, rtol=0)
    loaded_lora, loaded = peft_adapter.load_adapter(tmp_path, opened.config, one_device)
    assert loaded_lora == lora == peft_adapter.read_lora_config(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, loaded, state)


TARGETS = {
    "names": ({"target_modules": ["up_proj", "k_proj"], "use_rslora": True}, "float32"),
    "suffixes": ({"target_modules": ["self_attn.q_proj", "mlp.down_proj"]}, "bfloat16"),
    "one module": ({"target_modules": ["model.layers.1.self_attn.o_proj", "v_proj"]}, "float16"),
    "pattern": ({"target_modules": r"model\.layers\.[02]\..*\.(q|gate)_proj"}, "bfloat16"),
    "all": ({"target_modules": "all-linear"}, "float32"),
    "layers": ({"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}, "float32"),
    "excluded": ({"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\..*"}, "float32"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_load_adapter_with_the_targets_and_types_of_peft(case, tiny_folder, tiny_llama, one_device, tmp_path):
    """Saved by peft in its own way, its weights in half precision: the same logits here."""
    import transformers

    options, dtype = TARGETS[case]
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options
    made = peft.get_peft_model(reference, peft.LoraConfig(**options)).eval()
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    made.save_pretrained(tmp_path)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    reference = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    found = tokens_logits(with_adapter(tiny_llama, tmp_path, one_device), TOKENS)
    np.testing.assert_allclose(found, hf_logits(reference, TOKENS), atol=1e-5, rtol=0)

    if isinstance(options["target_modules"], str):  # peft leaves the field out where its default was taken
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": None}))
        again = tokens_logits(with_adapter(tiny_llama, tmp_path, one_device), TOKENS)
        np.testing.assert_array_equal(again, found)


@pytest.fixture
def saved(tiny_llama, one_device, tmp_path):
    """A function: the folder of a sound adapter, with changes to its configuration and its tensors."""
    opened, _ = tiny_llama
    lora = LoRAConfig(8, 8.0, 0.0, ("q_proj", "up_proj"))
    files = peft_adapter.adapter_files(random_adapter(opened.config, lora, one_device), lora, "")
    write_files(tmp_path, files)
    config, tensors = json.loads(files["adapter_config.json"]), load_file(tmp_path / "adapter_model.safetensors")

    def save(without=(), drop=None, change=None, **changes):
        kept = {key: value for key, value in (config | changes).items() if key not in without}
        (tmp_path / "adapter_config.json").write_text(json.dumps(kept))
        altered = {name: value for name, value in tensors.items() if name != drop}
        save_file(altered | (change or {}), tmp_path / "adapter_model.safetensors")
        return tmp_path

    return save


def test_load_adapter_without_fields_takes_pefts_defaults(saved, tiny_llama, one_device):
    whole = peft_adapter.load_adapter(saved(), tiny_llama[0].config, one_device)
    without = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora", "inference_mode")
    assert peft.LoraConfig().r == peft.LoraConfig().lora_alpha == 8
    found = peft_adapter.load_adapter(saved(without=without), tiny_llama[0].config, one_device)
    assert found[0] == whole[0]
    jax.tree.map(np.testing.assert_array_equal, found[1], whole[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"rank_pattern": {"k_proj": 2}},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "IA3"},
        {"init_lora_weights": "pissa_niter_4"},
        {"something_new": {"a": 1}},
        {"r": "8"},
        {"r": 0},
        {"lora_alpha": 1e308},
        {"lora_alpha": True},
        {"lora_dropout": -1},
        {"use_rslora": "yes"},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": []},
        {"layers_to_transform": "all"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_load_adapter_refuses_settings_by_name(changes, saved, tiny_llama, one_device):
    with pytest.raises(UserError, match=next(iter(changes))):
        peft_adapter.load_adapter(saved(**changes), tiny_llama[0].config, one_device)


def test_load_adapter_refuses_damaged_tensors_by_name(saved, tiny_llama, one_device):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    value = np.ones((80, 8), np.float32)

    def refuse(match, **changes):
        with pytest.raises(UserError, match=match):
            peft_adapter.load_adapter(saved(**changes), tiny_llama[0].config, one_device)

    refuse(f"tensors are missing, first {name}", drop=name)
    refuse(
        r"lora_B.weight has shape \(8, 80\), this model and adapter_config.json need \(80, 8\)", change={name: value.T}
    )
    refuse("lora_B.weight' is of type I32", change={name: value.view(np.int32)})
    for bad in (np.nan, np.inf):
        refuse("lora_B.weight' holds values that are not finite", change={name: value * bad})
    refuse("1 tensors are unknown, first 'base_model.model.score", change={"base_model.model.score.weight": value})
    folder = saved()
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"safetensors cannot be read .*copy it again"):
        peft_adapter.load_adapter(folder, tiny_llama[0].config, one_device)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="has no adapter_model.safetensors; .*never pickles"):
        peft_adapter.load_adapter(folder, tiny_llama[0].config, one_device)
    (folder / "adapter_config.json").write_text('{"r": 8, "targ')
    with pytest.raises(UserError, match=r"adapter_config.json.*not valid JSON"):
        peft_adapter.read_lora_config(folder)
