"""Tokenizers: the model's own and no other, read from what people have in their folders."""

import json
import shutil

import pytest

from roserag_jax import train
from roserag_jax.errors import UserError
from roserag_jax.hub import tokenizer
from roserag_jax.session import Session


def test_a_tokenizer_of_another_model_is_refused(config_of, smollm_path):
    """SmolLM2's 49,152 tokens on a table of 259 rows: the first text that is tokenized says so."""
    config = config_of(tokenizer=str(smollm_path))
    message = r"config.tokenizer=.*gguf gives token id \d+, but the model's embedding table has 259 rows"
    with pytest.raises(UserError, match=message):
        train.run(config)
    loaded = Session(config).tokenizer
    with pytest.raises(UserError, match=message):
        loaded("Who?")
    with pytest.raises(UserError, match=message):
        loaded(["!", "Who?"], add_special_tokens=False)
    assert loaded("!", add_special_tokens=False).input_ids == [17]  # in the table, by chance


def test_an_unused_token_beyond_the_table_is_harmless(config_of, model_folder, tmp_path):
    """A padding token that was added to the tokenizer and not to the model; an end of turn must be in the table."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    changed = json.loads((folder / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    changed["added_tokens"].append({"id": 259, "content": "<extra>", **special})
    (folder / "tokenizer.json").write_text(json.dumps(changed))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write = lambda **changes: (folder / "tokenizer_config.json").write_text(json.dumps(settings | changes))
    write(pad_token="<extra>")
    session = Session(config_of(model=str(folder)))
    assert session.tokenizer.pad_token_id == 259 and session.pad_id == session.stop_ids[0]
    assert session.tokenizer("Who?").input_ids
    with pytest.raises(UserError, match="gives token id 259"):
        session.tokenizer("Who?<extra>")
    write(eos_token="<extra>")
    with pytest.raises(UserError, match=r"The tokenizer \(eos_token\) gives token id 259"):
        Session(config_of(model=str(folder))).stop_ids  # noqa: B018
    write()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 300]}')
    with pytest.raises(UserError, match=r"generation_config.json \(eos_token_id\) gives token id 300"):
        Session(config_of(model=str(folder))).stop_ids  # noqa: B018


def test_a_named_tokenizer_is_compared_with_a_gguf_files_tokens(smollm_path, smollm_tokenizer, tmp_path):
    smollm_tokenizer.save_pretrained(tmp_path)
    same = tokenizer.load_tokenizer(str(smollm_path), str(tmp_path))
    assert same("Who?").input_ids == smollm_tokenizer("Who?").input_ids
    changed = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = changed["model"]["vocab"]
    tokens["ĠParis"], tokens["ĠLondon"] = tokens["ĠLondon"], tokens["ĠParis"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    with pytest.raises(
        UserError, match=r"is not the tokenizer of .*: 2 of 49152 tokens differ, the first is id \d+: 'Ġ"
    ):
        tokenizer.load_tokenizer(str(smollm_path), str(tmp_path))
