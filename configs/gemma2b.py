"""Gemma-2-2B, the paper's first model. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/gemma2b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  a TPU or GPU; its weights take 5.2 GB in bfloat16
Time:      not measured
Result:    not run on hardware
"""

from configs import base


def get_config():
    # Gated: accept its licence and run `hf auth login` first.
    config = base.paper_model("google/gemma-2-2b-it", "runs/gemma2b")
    config.train.learning_rate = 1e-4
    return config
