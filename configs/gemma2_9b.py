"""Gemma-2-9B, a larger model of the family of Gemma-2-2B. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/gemma2_9b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  TPUs or GPUs; its weights take 18.5 GB in bfloat16, so that of smaller ones several share them
Time:      not run on hardware
Result:    not run on hardware
"""

from configs import base


def get_config():
    # Gated: accept its licence and run `hf auth login` first.
    config = base.paper_model("google/gemma-2-9b-it", "runs/gemma2_9b")
    config.train.learning_rate = 1e-4
    config.train.batch = 32  # in fsdp, arithmetic then takes longer than gathering the weights
    return config
