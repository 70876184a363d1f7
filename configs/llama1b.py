"""Llama-3.2-1B, the paper's second model. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/llama1b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  a TPU or GPU; its weights take 2.5 GB in bfloat16
Time:      not measured
Result:    not run on hardware
"""

from configs import base


def get_config():
    # Gated: accept its licence and run `hf auth login` first.
    return base.paper_model("meta-llama/Llama-3.2-1B-Instruct", "runs/llama1b")
