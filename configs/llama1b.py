"""Llama-3.2-1B on a TPU or GPU: the paper's second model, LoRA rank 16, ORPO. Name your questions in config.data."""

from roserag_jax import options


def get_config():
    config = options.defaults()
    config.model = "meta-llama/Llama-3.2-1B-Instruct"  # gated: accept its licence and run `hf auth login` first
    config.workdir = "runs/llama1b"
    config.prompt.max_tokens = 1536
    return config
