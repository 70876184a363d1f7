"""Names of tensors: one table from the network's parameters to Hugging Face's, for every family."""

from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import PROJECTIONS

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTSIDE_THE_LAYERS = {("embed",): EMBEDDING, ("head",): HEAD, ("final_norm", "scale"): "model.norm.weight"}
_NORMS = {
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
# Gemma 2 and 3, which have two norms more, give the second of Llama's norms another name.
_FOUR_NORMS = _NORMS | {
    "mlp_norm": "pre_feedforward_layernorm",
    "post_attn_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


def module_name(projection: str) -> str:
    """Name a projection's module inside a layer: 'q_proj' is 'self_attn.q_proj'."""
    return f"{'mlp' if projection in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{projection}"


def tensor_name(path: tuple[str, ...], config: ModelConfig) -> str:
    """Name a base parameter's tensor in Hugging Face's files; '{}' stands for the layer number."""
    if path in _OUTSIDE_THE_LAYERS:
        return _OUTSIDE_THE_LAYERS[path]
    _, part, kind = path
    if part in PROJECTIONS:
        return f"model.layers.{{}}.{module_name(part)}.{'bias' if kind == 'bias' else 'weight'}"
    return f"model.layers.{{}}.{(_FOUR_NORMS if config.post_norms else _NORMS)[part]}.weight"
