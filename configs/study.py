"""The study's setting: SmolLM2-135M-Instruct on HotPotQA, passages by BM25; run by `benchmarks.study`."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def get_config():
    spec = spec_from_file_location("hotpotqa", Path(__file__).with_name("hotpotqa_smollm2.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()  # the same model, machine and files
    config.retrieve.k = 10
    config.prompt.passages, config.prompt.max_tokens = 5, 2304  # room for ten passages
    config.generate.guided_samples = 6
    config.generate.max_tokens = config.evaluate.max_tokens = 64
    config.generate.batch, config.evaluate.batch = 10, 16
    return config
