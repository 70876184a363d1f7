"""Gemma-2-2B on a TPU or GPU: the paper's first model, LoRA rank 16, ORPO. Name your questions in config.data."""

from roserag_jax import options


def get_config():
    config = options.defaults()
    config.model = "google/gemma-2-2b-it"  # gated: accept its licence and run `hf auth login` first
    config.workdir = "runs/gemma2b"
    config.prompt.max_tokens = 1536
    config.train.learning_rate = 1e-4
    return config
