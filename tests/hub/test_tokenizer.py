"""Tokenizers: the model's own and no other, read from what people have in their folders."""

import json
import shutil

import pytest

from roserag_jax import train
from roserag_jax.errors import UserError
from roserag_jax.hub import model_files, tokenizer
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


def write_tokenizer(folder, model_folder, **settings):
    """The tokenizer of single bytes, its tokenizer_config.json with other settings."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, folder / name)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def test_stop_ids_without_a_generation_config_are_those_of_config_json(model_folder, tmp_path):
    """As in transformers, which makes its generation config of it; a list too."""
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, model_folder)
    loaded, config = tokenizer.read_tokenizer(folder), json.loads((folder / "config.json").read_text())
    for listed in ([2, 7, 9], 11, [7]):
        (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": listed}))
        oracle = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder))
        expected = oracle.eos_token_id if isinstance(oracle.eos_token_id, list) else [oracle.eos_token_id]
        assert tokenizer.stop_ids(loaded, folder, 259) == tuple(sorted({2, *expected}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [5]}')  # which then is the one that counts
    assert tokenizer.stop_ids(loaded, folder, 259) == (2, 5)
    for bad in ('{"eos_token_id": ["</s>"]}', '{"eos_token_id": -1}', '{"eos_token_id": true}'):
        (folder / "generation_config.json").write_text(bad)
        with pytest.raises(UserError, match="generation_config.json: eos_token_id=.* is not a whole number"):
            tokenizer.stop_ids(loaded, folder, 259)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2')
    with pytest.raises(UserError, match="generation_config.json.*not valid JSON"):
        tokenizer.stop_ids(loaded, folder, 259)


def test_stop_ids_of_a_gguf_file_are_those_of_its_header(smollm_path, model_folder):
    """Also with a tokenizer of another file, which may name other tokens."""
    named = tokenizer.read_tokenizer(model_folder)
    named.eos_token = None
    assert 2 in tokenizer.stop_ids(named, smollm_path, 49152)


def test_read_tokenizer_with_several_chat_templates_takes_the_default(model_folder, tmp_path):
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{% for m in messages %}<{{ m.content }}>{% endfor %}"},
    ]
    loaded = tokenizer.read_tokenizer(write_tokenizer(tmp_path, model_folder, chat_template=templates))
    assert loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "<a>"
    assert isinstance(loaded.chat_template, str)
    write_tokenizer(tmp_path, model_folder, chat_template=templates[:1])
    with pytest.raises(UserError, match=r"none of its chat templates \(\['tool_use'\]\) is called 'default'"):
        tokenizer.read_tokenizer(tmp_path)
    write_tokenizer(tmp_path, model_folder, chat_template="{% for m in messages %}")
    with pytest.raises(UserError, match="its tokenizer cannot be read .*endfor"):
        tokenizer.read_tokenizer(tmp_path)


def test_read_tokenizer_from_vocabulary_and_merges(smollm_tokenizer, tmp_path):
    """The two files of older folders: the same tokens with both, an error with one."""
    transformers = pytest.importorskip("transformers")
    smollm_tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in state["model"]["merges"]))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"}')
    text = "Who founded it, and where?"
    loaded = tokenizer.read_tokenizer(tmp_path)
    assert loaded(text).input_ids == smollm_tokenizer(text).input_ids
    assert loaded(text).input_ids == transformers.AutoTokenizer.from_pretrained(tmp_path)(text).input_ids
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match="has vocab.json, but not the merges.txt"):
        tokenizer.read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        tokenizer.read_tokenizer(tmp_path)


def test_all_files_of_a_tokenizer_are_downloaded(monkeypatch, tmp_path):
    """What the Hub's client is told to fetch of a repository, by its own rule."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    told = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **options: told.update(options) or tmp_path)
    small = "config.json generation_config.json tokenizer.json tokenizer_config.json vocab.json merges.txt vocab.txt "
    small = (small + "tokenizer.model added_tokens.json special_tokens_map.json chat_template.jinja").split()
    small += ["additional_chat_templates/rag.jinja"]
    large = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    other = ["pytorch_model.bin", "modeling.py", "README.md", "consolidated.safetensors", "model.gguf", "trainer.json"]
    for weights in (False, True):
        model_files.resolve_path("owner/name", weights=weights)
        rules = {name: told[name] for name in ("allow_patterns", "ignore_patterns")}
        fetched = set(filter_repo_objects([*small, *large, *other], **rules))
        assert fetched == {*small, *(large if weights else [])}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "BPE", "vocab": {}}}'])
def test_read_tokenizer_of_a_damaged_file(text, model_folder, tmp_path):
    write_tokenizer(tmp_path, model_folder)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"its tokenizer cannot be read \(.*\); download it again"):
        tokenizer.read_tokenizer(tmp_path)
