"""Llama-3.1-8B, a larger model of the family of Llama-3.2-1B. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/llama31_8b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  TPUs or GPUs; its weights take 16.1 GB in bfloat16, so that of smaller ones several share them
Time:      not run on hardware
Result:    not run on hardware
"""

from configs import base


def get_config():
    # Gated: accept its licence and run `hf auth login` first.
    config = base.paper_model("meta-llama/Llama-3.1-8B-Instruct", "runs/llama31_8b")
    config.train.batch = 32  # in fsdp, arithmetic then takes longer than gathering the weights
    return config
