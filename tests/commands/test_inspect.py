"""`inspect`: what a model is."""

import re

import pytest

from roserag_jax import inspect

torch = pytest.importorskip("torch")


def test_inspect_describes_a_model(config_of, model_folder, capsys):
    import transformers

    inspect.run(config_of())
    out = capsys.readouterr().out
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    assert re.search(rf"^parameters +{reference.num_parameters():,}$", out, re.MULTILINE)
    assert "rank 4 on 7 projections" in out and "without a chat template" in out and "'</s>'" in out
