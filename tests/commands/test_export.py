"""`export`: the merged folder and the adapter in other tools."""

import copy
import json

import numpy as np
import pytest
from conftest import run_command, tokens_logits

from roserag_jax import export
from roserag_jax.errors import UserError
from roserag_jax.session import Session
from roserag_jax.workdir import Workdir, digest

torch = pytest.importorskip("torch")


def test_export_and_adapter_load_elsewhere(finished, model_folder):
    """What the command writes: transformers on the merged folder, peft on the adapter and this network agree."""
    peft = pytest.importorskip("peft")
    import transformers

    done = run_command("export", finished)
    assert done.returncode == 0 and "adapter merged in." in done.stdout, done.stderr
    export.run(finished)  # its own folder it makes again
    work = Workdir(finished.workdir)
    assert json.loads((work / "merged/merged_from.json").read_text())["adapter"] == str(work / "adapter")
    weights = digest(work / "merged/model.safetensors")
    quantized = copy.deepcopy(finished)
    quantized.base_dtype = "int8"
    export.run(quantized)
    assert digest(work / "merged/model.safetensors") == weights  # merged into the original weights
    elsewhere = copy.deepcopy(finished)
    elsewhere.export.folder = str(model_folder)
    before = digest(model_folder)
    with pytest.raises(UserError, match="was not made by this command"):
        export.run(elsewhere)
    assert digest(model_folder) == before
    (work / "merged/notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds what this command did not write .notes.txt.: move that away"):
        export.run(finished)
    assert digest(work / "merged/model.safetensors") == weights and (work / "merged/notes.txt").read_text() == "mine"
    (work / "merged/notes.txt").unlink()
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    # In float64 the files are compared, not torch's order of summation.
    adapted = peft.PeftModel.from_pretrained(base, work / "adapter").eval().double()
    merged = transformers.AutoModelForCausalLM.from_pretrained(work / "merged").eval().double()
    assert transformers.AutoTokenizer.from_pretrained(work / "merged")("abc").input_ids
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        original = transformers.AutoModelForCausalLM.from_pretrained(model_folder).eval().double()(tokens).logits
        size = original.abs().max()  # this model's weights are large, and so are its logits
        assert (adapted(tokens).logits - merged(tokens).logits).abs().max() < 1e-5 * size
        assert (merged(tokens).logits - original).abs().max() > 1e-4 * size
    here = tokens_logits(Session(finished).model(work / "adapter"), tokens[0].numpy())
    np.testing.assert_allclose(here, merged(tokens).logits[0].detach().numpy(), atol=1e-5 * float(size), rtol=0)
