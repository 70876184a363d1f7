"""SmolLM2-135M-Instruct on HotPotQA, with passages that BM25 finds in a corpus: real questions, real noise.

Reads `data/hotpotqa/` in the current folder: `train.jsonl.gz` and `eval.jsonl.gz`, questions in a layout of
docs/architecture.md, and `corpus.jsonl.gz`, rows of `{id, contents}`. Options name other files.

Command:   python -m roserag_jax.train --config configs/hotpotqa_smollm2.py
Hardware:  a CPU with two cores
Time:      not measured
Result:    a first look; configs/study.py has the figures
"""

from pathlib import Path

from configs import base


def get_config():
    config = base.smollm2_on_cpu("runs/hotpotqa_smollm2")
    folder = Path("data/hotpotqa")
    config.data.train, config.data.eval = str(folder / "train.jsonl.gz"), str(folder / "eval.jsonl.gz")
    config.data.train_rows = config.data.eval_rows = 100
    config.retrieve.retriever, config.retrieve.k = "bm25", 4
    config.retrieve.corpus = str(folder / "corpus.jsonl.gz")
    config.prompt.passages, config.prompt.max_tokens = 4, 640
    config.prompt.order = "best_last"  # this model copies from the passage right before the question
    config.generate.guided_samples = config.generate.plain_samples = 3
    config.generate.max_tokens, config.evaluate.max_tokens = 48, 56
    config.generate.batch, config.evaluate.batch = 20, 24
    return config
