"""Qwen2.5-1.5B on a TPU or GPU: the paper's third model, LoRA rank 16, ORPO. Name your questions in config.data."""

from roserag_jax import options


def get_config():
    config = options.defaults()
    config.model = "Qwen/Qwen2.5-1.5B-Instruct"
    config.workdir = "runs/qwen1_5b"
    config.prompt.max_tokens = 1536
    return config
