"""Qwen2.5-1.5B, the paper's third model. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/qwen1_5b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  a TPU or GPU; its weights take 3.1 GB in bfloat16
Time:      not measured
Result:    not run on hardware
"""

from configs import base


def get_config():
    return base.paper_model("Qwen/Qwen2.5-1.5B-Instruct", "runs/qwen1_5b")
