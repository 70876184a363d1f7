"""GGUF files of every architecture, written here as llama.cpp writes them and read by transformers for comparison."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import branch_logits, finish_gguf, hf_logits, write_gguf

from roserag_jax.errors import UserError
from roserag_jax.hub import loading, model_files
from roserag_jax.hub.gguf import FAMILIES
from roserag_jax.models import config as model_config

torch = pytest.importorskip("torch")
TOKENS = np.random.default_rng(0).integers(3, 131, (2, 40))


def test_gguf_file_of_early_gemma_2_has_the_familys_window_and_soft_caps(tmp_path):
    config = model_files.open_model(str(write_gguf("gemma2", tmp_path, early=True)[0])).config
    assert (config.sliding_window, config.attention_softcap, config.final_softcap) == (4096, 50.0, 30.0)


@pytest.mark.parametrize("arch", FAMILIES)
def test_gguf_file_equals_transformers(arch, tmp_path, one_device):
    """The header gives transformers' configuration, the tensors transformers' logits, export's configuration both."""
    import transformers

    path, hf = write_gguf(arch, tmp_path)
    opened = model_files.open_model(str(path))
    assert opened.config == model_config.from_hf(hf, "")
    assert opened.transformers_config().architectures[0].endswith("ForCausalLM")
    model = loading.assemble(opened.config, loading.load_base(opened, jnp.dtype("float32"), one_device))
    found = branch_logits(model, TOKENS[:1], np.array([20]), TOKENS[:1, None, 20:])[0, 0]
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=hf, attn_implementation="eager", dtype=torch.float32
    )
    np.testing.assert_allclose(found, hf_logits(reference, TOKENS[0])[20:], atol=1e-4, rtol=0)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0}, LINEAR),
        ({"rope.scale_linear": 4.0}, LINEAR),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0}, LINEAR),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scale_linear": 0.0}, None),
    ],
    ids=str,
)
def test_gguf_rope_scaling_by_llama_cpps_rules(header, expected, tmp_path):
    """A factor without a type is linear; the old name counts where the new one is absent; 0 and 1 are none."""
    opened = model_files.open_model(str(write_gguf("qwen2", tmp_path, **header)[0]))
    default = {"rope_type": "default", "rope_theta": 10000.0}
    assert opened.transformers_config().rope_parameters == (expected or default)


def test_gguf_file_in_parts_is_read_by_the_first(tmp_path):
    whole = model_files.open_model(str(write_gguf("qwen2", tmp_path)[0]))
    write_gguf("qwen2", tmp_path / "parts", split=9)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) > 2
    opened = model_files.open_model(str(parts[0]))
    assert opened.config == whole.config and opened.shapes() == whole.shapes()
    for name, shape in whole.shapes().items():
        np.testing.assert_array_equal(opened.read(name, (slice(shape[0]),)), whole.read(name, (slice(shape[0]),)))
    first = model_files.fingerprint(str(parts[0]))
    with pytest.raises(UserError, match=f"is one of {len(parts)} parts of a model; name the first"):
        model_files.open_model(str(parts[1]))
    parts[2].write_bytes(parts[2].read_bytes()[:-4] + b"\1\2\3\4")
    assert model_files.fingerprint(str(parts[0])) != first
    parts[2].unlink()
    with pytest.raises(UserError, match=f"there is no file .*{parts[2].name}"):
        model_files.open_model(str(parts[0]))


@pytest.mark.parametrize(
    ("match", "header"),
    [
        ("rope.scaling.type='yarn' is not implemented", {"rope.scaling.type": "yarn"}),
        ("holds 'adapter' .general.type., not a model", {"general.type": "adapter"}),
        ("qwen3.expert_count=8 is not implemented", {"expert_count": 8}),
        ("qwen3.attention.value_length=8 is not implemented", {"attention.value_length": 8}),
        ("qwen3.logit_scale=0.5 is not implemented", {"logit_scale": 0.5}),
    ],
)
def test_gguf_header_refuses_what_it_cannot_say(match, header, tmp_path):
    with pytest.raises(UserError, match=match):
        model_files.open_model(str(write_gguf("qwen3", tmp_path, **header)[0]))


def test_gguf_sizes_by_layer_are_read_where_they_are_equal(tmp_path):
    """Files of other programs list the heads of each layer."""
    whole = model_files.open_model(str(write_gguf("qwen3", tmp_path)[0]))
    lists = {"head_count": [4, 4, 4], "head_count_kv": [2, 2, 2], "feed_forward_length": [80, 80, 80]}
    opened = model_files.open_model(str(write_gguf("qwen3", tmp_path / "lists", sizes=lists)[0]))
    assert opened.config == whole.config
    path = write_gguf("qwen3", tmp_path / "differ", sizes=lists | {"head_count_kv": [2, 1, 2]})[0]
    with pytest.raises(UserError, match=r"qwen3.attention.head_count_kv=\[2, 1, 2\] differs by layer"):
        model_files.open_model(str(path))


def test_gguf_files_that_are_not_models_are_named(tmp_path):
    path = write_gguf("qwen3", tmp_path)[0]
    half = tmp_path / "half.gguf"
    half.write_bytes(path.read_bytes()[:-4000])
    with pytest.raises(UserError, match="half.gguf is damaged, incomplete"):
        model_files.open_model(str(half))
    finish_gguf(gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2"))
    with pytest.raises(UserError, match="architecture 'gpt2' is not implemented"):
        model_files.open_model(str(tmp_path / "other.gguf"))
    finish_gguf(gguf.GGUFWriter(tmp_path / "words.gguf", "llama"))
    with pytest.raises(UserError, match="words.gguf holds a vocabulary and no weights"):
        model_files.open_model(str(tmp_path / "words.gguf"))
    with pytest.raises(UserError, match="there is no file"):
        model_files.open_model(str(tmp_path / "none.gguf"))
