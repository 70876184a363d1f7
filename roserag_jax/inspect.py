"""Describe a model without loading its weights: family, size, memory, tokenizer.

    python -m roserag_jax.inspect --config.model=PATH

Prints the family, sizes, parameters, memory in each dtype, what the configured LoRA adapter adds, and whether the
tokenizer has a chat template. Of a Hub id only the small files are fetched, not the weights.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from roserag_jax import cli
from roserag_jax.errors import UserError
from roserag_jax.hub import model_files, tokenizer
from roserag_jax.hub.loading import abstract_model
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAParam
from roserag_jax.session import Session


def _count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _size(count: float) -> str:
    """A number of bytes as text."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _features(c: ModelConfig) -> str:
    """The architecture's features beside those of the plain Llama block."""
    scaling = dict(c.rope_scaling).get("rope_type")
    sliding = f"sliding window of {c.sliding_window} tokens in {sum(c.sliding_layers)} of {c.num_layers} layers"
    features = {
        f"RoPE base {c.rope_theta:g}": True,
        f"base {c.rope_local_theta or 0:g} in sliding layers": c.rope_local_theta is not None,
        f"{scaling} scaling": scaling is not None,
        "query and key norms": c.qk_norm,
        "norms after attention and MLP": c.post_norms,
        "biases on queries, keys and values": c.qkv_bias,
        "bias on the attention output": c.out_bias,
        "biases in the MLP": c.mlp_bias,
        f"soft-cap {c.attention_softcap} on attention": c.attention_softcap is not None,
        f"soft-cap {c.final_softcap} on logits": c.final_softcap is not None,
        sliding: c.sliding_window is not None,
        "tied embeddings": c.tie_embeddings,
    }
    return ", ".join(feature for feature, present in features.items() if present)


def run(config) -> None:
    """The command."""
    session = Session(config)
    path, c = model_files.read_config(config.model, config.revision or None)
    lora = session.lora
    base, adapter = nnx.state(abstract_model(c, lora, jnp.bfloat16), nnx.Not(LoRAParam), LoRAParam)
    parameters, trained = _count(base), _count(adapter)
    cached = 2 * c.num_layers * c.num_kv_heads * c.head_dim
    try:
        loaded = session.tokenizer
        template = "with a chat template" if loaded.chat_template else "without a chat template: prompts are plain text"
        stops = tokenizer.stop_ids(loaded, path, c.vocab_size)
        ends = ", ".join(repr(t) for t in loaded.convert_ids_to_tokens(list(stops)))
        beyond = f" ({len(loaded) - c.vocab_size} of them not in the model)" if len(loaded) > c.vocab_size else ""
        tokens = f"{len(loaded)} tokens{beyond}, {template}; a turn ends with {ends}"
    except UserError as error:
        tokens = str(error)
    rows = [
        ["model", f"{config.model} ({c.family})"],
        ["layers", f"{c.num_layers} of width {c.embed_dim}, MLP {c.mlp_dim}"],
        ["heads", f"{c.num_heads} query, {c.num_kv_heads} key/value, size {c.head_dim}"],
        ["vocabulary", str(c.vocab_size)],
        ["context", f"{c.max_positions} positions"],
        ["architecture features", _features(c)],
        ["parameters", f"{parameters:,}"],
        ["weights", f"{_size(2 * parameters)} in bfloat16, {_size(4 * parameters)} in float32"],
        ["KV cache per token", f"{_size(2 * cached)} in bfloat16, {_size(4 * cached)} in float32"],
        ["adapter", f"rank {lora.rank} on {len(lora.targets)} projections: {trained:,} parameters"],
        ["adapter in training", f"{_size(4 * 4 * trained)} (float32, with its gradient and AdamW's two moments)"],
        ["tokenizer", tokens],
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))


if __name__ == "__main__":
    cli.main(run, __doc__, workdir=False, alone=True, resumes=False)
