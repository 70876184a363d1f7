"""The network is the one that was downloaded: transformers and peft are the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, branch_logits, cached_logits, hf_logits, write_files
from flax import nnx

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.errors import UserError
from roserag_jax.hub import loading, merged_export, model_files, peft_adapter
from roserag_jax.models.lora import LoRAConfig, LoRAParam

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(3, 131, (2, 40))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tiny_folder, one_device):
    """Two prompts of unequal length, two branches each, at once and token by token."""
    folder, reference = tiny_folder(family)
    opened = model_files.open_model(str(folder))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    lengths = np.array([30, 21])
    branches = RNG.integers(3, 131, (2, 2, 9))
    ours = branch_logits(model, TOKENS, lengths, branches)
    for b in range(2):
        for n in range(2):
            theirs = hf_logits(reference, [*TOKENS[b, : lengths[b]], *branches[b, n]])[lengths[b] :]
            np.testing.assert_allclose(ours[b, n], theirs, atol=1e-4, rtol=0)
    stepped = cached_logits(model, TOKENS, lengths, branches, opening=5)
    np.testing.assert_allclose(stepped, ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_equal_transformers(family, tiny_folder, one_device):
    """After every layer, and far beyond the window and the original length of RoPE's scaling."""
    import dataclasses

    folder, reference = tiny_folder(family)
    opened = model_files.open_model(str(folder))
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    tokens = RNG.integers(3, 131, 400)
    with torch.no_grad():
        theirs = reference.model(torch.tensor(tokens)[None], output_hidden_states=True).hidden_states
        theirs = [reference.model.norm(hidden)[0, 380:].numpy() for hidden in theirs[1:-1]] + [theirs[-1][0, 380:]]
    for count in range(1, 4):
        config = dataclasses.replace(
            opened.config, num_layers=count, sliding_layers=opened.config.sliding_layers[:count]
        )
        cut = lambda path, v, count=count: (path, v.replace(v.get_value()[:count] if path[0] == "layers" else v[...]))
        first = nnx.from_flat_state([cut(path, v) for path, v in nnx.to_flat_state(base)])
        model = loading.assemble(config, first)
        ours = model.extend(tokens[None, None, 380:], model.prefill(tokens[None, :380], np.array([380])))[0, 0]
        np.testing.assert_allclose(ours, theirs[count - 1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_shared_beginning_changes_nothing(family, tiny_folder, one_device):
    """Prompts read behind their common beginning leave the keys and values that they leave when read whole."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    prompts = TOKENS.copy()
    prompts[1, :17] = prompts[0, :17]
    whole = model.prefill(prompts, np.array([40, 29]))
    shared = model.prefill(prompts[:1, :17], np.array([17]))
    behind = model.prefill(prompts[:, 17:], np.array([23, 12]), shared)
    assert behind.lengths.tolist() == [40, 29]
    np.testing.assert_allclose(behind.k, whole.k, atol=1e-5)
    np.testing.assert_allclose(behind.v, whole.v, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2), (1, 1, 8)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_sharded_equals_one_device(family, shape, tiny_folder, one_device):
    """Eight devices, also with more tensor devices than key/value heads."""
    opened = model_files.open_model(str(tiny_folder(family)[0]))
    prompts, lengths, branches = np.tile(TOKENS, (4, 1)), np.arange(20, 28), RNG.integers(3, 131, (8, 2, 7))
    results = []
    for mesh in (one_device, make_mesh(*shape)):
        model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), mesh))
        with jax.set_mesh(mesh):
            results.append(branch_logits(model, prompts, lengths, branches))
    np.testing.assert_allclose(results[0], results[1], atol=1e-4, rtol=0)


def test_parameters_are_spread(tiny_llama):
    opened, _ = tiny_llama
    base = loading.load_base(opened, jnp.dtype("float32"), make_mesh(1, 4, 2))
    weight = dict(nnx.to_flat_state(base))[("layers", "gate_proj", "weight")].get_value()
    assert weight.shape == (3, 80, 48) and weight.addressable_shards[0].data.shape == (3, 40, 12)


def random_adapter(opened, lora, mesh):
    """An adapter whose B is not zero, so that it changes the logits."""
    state = loading.init_adapter(opened.config, lora, mesh, jax.random.key(1))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), state)


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_in_peft_and_back(rslora, tiny_folder, tiny_llama, one_device, tmp_path):
    """An adapter written here gives the same logits in peft; read back it is the same; merged too."""
    peft = pytest.importorskip("peft")
    import transformers

    opened, base = tiny_llama
    folder = tiny_folder("llama")[0]
    lora = LoRAConfig(4, 12.0, 0.0, ("q_proj", "v_proj", "down_proj"), rslora)
    state = random_adapter(opened, lora, one_device)
    model = loading.assemble(opened.config, base, lora, state)
    ours = branch_logits(model, TOKENS[:1], np.array([0]), TOKENS[None, :1])[0, 0]

    write_files(tmp_path / "adapter", peft_adapter.adapter_files(state, lora, str(folder)))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    np.testing.assert_allclose(ours, hf_logits(theirs, TOKENS[0]), atol=1e-5, rtol=0)

    loaded_lora, loaded = peft_adapter.load_adapter(tmp_path / "adapter", opened.config, one_device)
    assert loaded_lora == lora
    jax.tree.map(np.testing.assert_array_equal, loaded, state)

    (tmp_path / "merged").mkdir()
    merged_export.save_weights(model, tmp_path / "merged", shard_bytes=20_000)
    merged_export.save_config(opened, "float32", tmp_path / "merged")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    np.testing.assert_allclose(ours, hf_logits(merged, TOKENS[0]), atol=1e-5, rtol=0)


def test_an_adapter_made_by_peft_loads_here(tiny_folder, tiny_llama, one_device, tmp_path):
    """Saved by peft in its own way: the same logits here; what the network lacks is refused by name."""
    peft = pytest.importorskip("peft")
    import json

    import transformers

    opened, base = tiny_llama
    reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    options = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["up_proj", "k_proj"]}
    options |= {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    theirs = peft.get_peft_model(reference, peft.LoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path)
    lora, state = peft_adapter.load_adapter(tmp_path, opened.config, one_device)
    assert lora == LoRAConfig(3, 5, 0.0, ("k_proj", "up_proj"), True)
    ours = branch_logits(
        loading.assemble(opened.config, base, lora, state), TOKENS[:1], np.array([0]), TOKENS[None, :1]
    )
    np.testing.assert_allclose(ours[0, 0], hf_logits(theirs, TOKENS[0]), atol=1e-5, rtol=0)

    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    changes = ({"use_dora": True}, {"rank_pattern": {"k_proj": 2}}, {"target_modules": "k.*"}, {"bias": "all"})
    for change in (*changes, {"init_lora_weights": "pissa_niter_4"}):
        file.write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=next(iter(change))):
            peft_adapter.load_adapter(tmp_path, opened.config, one_device)


def test_a_fresh_adapter_changes_nothing(tiny_llama, one_device):
    opened, base = tiny_llama
    lora = LoRAConfig(4, 8.0)
    fresh = loading.init_adapter(opened.config, lora, one_device, jax.random.key(0))
    args = (TOKENS, np.array([30, 30]), TOKENS[:, None, 30:])
    with_adapter = branch_logits(loading.assemble(opened.config, base, lora, fresh), *args)
    np.testing.assert_array_equal(with_adapter, branch_logits(loading.assemble(opened.config, base), *args))
    values = {path[-1]: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(fresh)}
    assert not values["lora_b"].any() and values["lora_a"].std() > 0.05
    assert nnx.state(loading.assemble(opened.config, base), LoRAParam) == nnx.State({})


def test_a_tied_table_may_be_there_twice_if_it_is_the_same(tiny_folder, tmp_path, one_device):
    import json
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama")[0], folder)
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    load = lambda: loading.load_base(model_files.open_model(str(folder)), jnp.dtype("float32"), one_device)
    table = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": table.copy()}, folder / "model.safetensors")
    load()
    save_file(tensors | {"lm_head.weight": table + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight is not the table"):
        load()


def test_what_is_not_implemented_is_refused(tiny_folder, tmp_path):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama")[0], folder)
    config = json.loads((folder / "config.json").read_text())

    def refuse(match, **changes):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match):
            model_files.open_model(str(folder))

    refuse("model type 'gpt2'", model_type="gpt2", n_head=2, n_embd=8)
    refuse("model type 'nonsense'", model_type="nonsense")
    refuse("activation 'relu'", hidden_act="relu")
    refuse("auto_map=.* is not implemented", auto_map={"AutoModel": "modeling.Own"})
    refuse("rope_type 'yarn'", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    (folder / "config.json").write_text(json.dumps(config))
    weight_file = folder / "model.safetensors"
    weight_file.write_bytes(weight_file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="damaged or incomplete"):
        model_files.open_model(str(folder))
    weight_file.unlink()
    with pytest.raises(UserError, match="never pickles"):
        model_files.open_model(str(folder))
    outside = tmp_path / "weights"
    outside.write_bytes(b"")
    weight_file.symlink_to(outside)
    with pytest.raises(UserError, match="leads out of its folder"):
        model_files.open_model(str(folder))
    weight_file.unlink()  # one file comes before an index
    for name in ("../weights.safetensors", "/etc/weights.safetensors", "weights.bin"):
        index = {"weight_map": {"x": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"is not a plain \*.safetensors name"):
            model_files.open_model(str(folder))
    with pytest.raises(UserError, match="could not be downloaded"):
        model_files.open_model("nobody/nothing")


def test_tensors_must_fit(tiny_folder, tmp_path, one_device):
    """Missing and unknown tensors are listed before anything is placed."""
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama")[0], folder)
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors")
    load = lambda: loading.load_base(model_files.open_model(str(folder)), jnp.dtype("float32"), one_device)
    with pytest.raises(UserError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        load()
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone, "extra.weight": gone}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown: extra.weight"):
        load()
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": gone[:, :8].copy()}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"shapes differ: model.layers.1.mlp.up_proj.weight is \(80, 8\)"):
        load()
