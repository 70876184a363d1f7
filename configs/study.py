"""The study's setting: SmolLM2-135M-Instruct on HotPotQA with the rows' own passages; run by `benchmarks.study`."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def get_config():
    spec = spec_from_file_location("hotpotqa", Path(__file__).with_name("hotpotqa_smollm2.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()  # the same model, machine and files
    config.retrieve.retriever = "given"  # for hard negatives the corpus stays named
    config.prompt.passages, config.prompt.max_tokens = 5, 1792  # room for ten passages
    config.evaluate.batch = 16
    return config
