"""The whole job on a laptop: SmolLM2-135M-Instruct on 40 synthetic questions, evaluated on 48 others.

Command:   python -m roserag_jax.train --config configs/quickstart.py   (or `make quickstart`)
Hardware:  a CPU with two cores
Time:      eight to nine minutes; more where other programs run
Result:    EM 16.7 -> 29.2, F1 21.7 -> 34.5 (docs/results.md)
"""

from configs import base


def get_config():
    config = base.smollm2_on_cpu("runs/quickstart")
    config.data.train_rows, config.data.eval_rows = 40, 48
    config.data.synthetic_passages = 4
    config.data.synthetic_counterfactual = 0.25
    return config
