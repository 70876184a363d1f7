"""The encoder computes what transformers' does, also for masked pieces, whatever the padding."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import copy_folder

from roserag_jax.errors import UserError
from roserag_jax.hub import encoder


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_bert_computes_what_transformers_computes(bert_folder, one_device, family):
    import torch

    changes = {} if family == "bert" else {"pad_token_id": 1, "type_vocab_size": 1}
    folder, model = bert_folder(family, **changes)
    bert = encoder.load_encoder(folder, one_device).bert
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 200, (3, 20))
    mask = np.arange(20) < np.array([[20], [7], [1]])
    tokens[~mask] = 0 if family == "bert" else 1
    with torch.no_grad():
        expected = model(torch.tensor(tokens), attention_mask=torch.tensor(mask).long()).last_hidden_state.numpy()
    found = np.asarray(bert(jnp.asarray(tokens), jnp.asarray(mask)))
    # RoBERTa gives padding one position, here it has its own; nothing reads what padding gives.
    compared = np.ones_like(mask) if family == "bert" else mask
    np.testing.assert_allclose(found[compared], expected[compared], atol=1e-4)
    longer = np.asarray(bert(jnp.pad(tokens, ((0, 0), (0, 9))), jnp.pad(mask, ((0, 0), (0, 9)))))
    np.testing.assert_allclose(longer[:, :20][mask], found[mask], atol=1e-5)


def test_load_encoder_names_what_is_wrong(bert_folder, one_device, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder, _ = bert_folder()
    changes = {"model_type": "modernbert", "hidden_act": "silu", "position_embedding_type": "relative_key"}
    for i, (name, value) in enumerate(changes.items()):
        with pytest.raises(UserError, match=f"{name} '{value}' is not implemented"):
            encoder.load_encoder(copy_folder(folder, tmp_path / f"c{i}", config={name: value}), one_device)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.bias"
    for wrong, message in (
        (tensors[name][:-1], r"is \(31,\), not \(32,\)"),
        (tensors[name] * np.nan, "not finite"),
        (None, "is missing"),
    ):
        other = copy_folder(folder, tmp_path / f"t{message[:6]}")
        kept = {k: v for k, v in tensors.items() if k != name}
        save_file(kept | ({} if wrong is None else {name: wrong.copy()}), other / "model.safetensors")
        with pytest.raises(UserError, match=message):
            encoder.load_encoder(other, one_device)
    save_file({**tensors, "encoder.gate.weight": tensors[name]}, other / "model.safetensors")
    with pytest.raises(UserError, match=r"unknown: encoder\.gate\.weight"):
        encoder.load_encoder(other, one_device)
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"never read; convert it once.*weights_only=True"):
        encoder.resolve_encoder(str(other), "retrieve.dense")
