"""Dense vectors equal torch's with the pooling, prefixes and norm that a folder's files ask for."""

import json

import numpy as np
import pytest
from conftest import copy_folder

from roserag_jax.errors import UserError
from roserag_jax.retrieval.dense import SentenceEncoder, Settings, read_settings

TEXTS = ["ban kon", "der fan mut gis lon " * 4, "kit"]


def sentence_folder(folder, to, pooling="mean_tokens", normalize=True, **settings):
    to = copy_folder(folder, to)
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    (to / "modules.json").write_text(json.dumps([{"type": f"sentence_transformers.models.{k}"} for k in kinds]))
    (to / "1_Pooling").mkdir()
    names = ("cls_token", "mean_tokens", "max_tokens")
    (to / "1_Pooling/config.json").write_text(json.dumps({f"pooling_mode_{n}": n == pooling for n in names}))
    (to / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_encoder_equals_torch(bert_folder, one_device, tmp_path, pooling):
    import torch
    import transformers

    plain, model = bert_folder()
    prompts = {"query": "who: ", "passage": "mos "}
    folder = sentence_folder(
        plain, tmp_path / "a", f"{pooling}_{'tokens' if pooling == 'mean' else 'token'}", prompts=prompts
    )
    settings = read_settings(folder)
    assert settings == Settings(pooling, True, "who: ", "mos ", 512)
    encoder = SentenceEncoder(folder, one_device, settings)
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)

    def expected(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1) if pooling == "mean" else hidden[:, 0]
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()

    found = encoder.encode_queries(TEXTS)
    assert found.shape == (3, 1, 32)
    np.testing.assert_allclose(found[:, 0], expected([f"who: {t}" for t in TEXTS]), atol=1e-4)
    passages = encoder.encode_passages([{"title": "", "text": TEXTS[0]}, {"title": "lit", "text": TEXTS[2]}])
    np.testing.assert_allclose(np.concatenate(passages), expected(["mos ban kon", "mos lit\nkit"]), atol=1e-4)


def test_read_settings_follows_files_and_options(bert_folder, tmp_path):
    plain = bert_folder()[0]
    assert read_settings(plain) == Settings()
    assert read_settings(plain, "cls", "query: ", "passage: ") == Settings("cls", True, "query: ", "passage: ")
    dots = sentence_folder(plain, tmp_path / "dots", normalize=False, similarity_fn_name="dot")
    assert not read_settings(dots).normalized
    assert read_settings(sentence_folder(plain, tmp_path / "cosine", normalize=False)).normalized
    peak = sentence_folder(plain, tmp_path / "peak", "max_tokens")
    with pytest.raises(UserError, match="pooling by pooling_mode_max_tokens is not implemented"):
        read_settings(peak)
    assert read_settings(peak, "cls").pooling == "cls"
    (peak / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(UserError, match="module 'Dense' is not implemented"):
        read_settings(peak, "cls")
