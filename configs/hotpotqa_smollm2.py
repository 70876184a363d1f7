"""SmolLM2-135M-Instruct on HotPotQA, with passages that BM25 finds in a corpus: real questions, real noise.

    python -m roserag_jax.train --config configs/hotpotqa_smollm2.py

Reads `data/hotpotqa/` in the current folder: `train.jsonl.gz` and `eval.jsonl.gz`, questions in a layout of
docs/architecture.md, and `corpus.jsonl.gz`, rows of `{id, contents}`. Options name other files.
"""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def _quickstart():
    spec = spec_from_file_location("quickstart", Path(__file__).with_name("quickstart.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def get_config():
    config = _quickstart()  # the same model and machine
    folder = Path("data/hotpotqa")
    config.workdir = "runs/hotpotqa_smollm2"
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
