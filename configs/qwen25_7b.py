"""Qwen2.5-7B, a larger model of the family of Qwen2.5-1.5B. Name your questions in config.data.

Command:   python -m roserag_jax.train --config configs/qwen25_7b.py --config.data.train=FILE --config.data.eval=FILE
Hardware:  TPUs or GPUs; its weights take 15.2 GB in bfloat16, so that of smaller ones several share them
Time:      not run on hardware
Result:    not run on hardware
"""

from configs import base


def get_config():
    config = base.paper_model("Qwen/Qwen2.5-7B-Instruct", "runs/qwen25_7b")
    config.train.batch = 32  # in fsdp, arithmetic then takes longer than gathering the weights
    return config
