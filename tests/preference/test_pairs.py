"""Ready-made pairs: their tokens are those that TRL's own trainers make of them."""

import types

import pytest
from conftest import write_lines

from roserag_jax.errors import UserError
from roserag_jax.preference import pairs
from roserag_jax.rag.prompts import prompt_tokens
from roserag_jax.training.pair_loader import Pairs

TURNS = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}</u>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
TALK = {
    "prompt": [{"role": "user", "content": "Colour of moss?"}],
    "chosen": [{"role": "assistant", "content": "Green."}],
    "rejected": [{"role": "assistant", "content": "Red."}],
}
TEXT = {"prompt": "Moss is:", "chosen": "Green.", "rejected": "Red."}


def byte_tokenizer(template: str | None, adds_bos: bool):
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<bos>", "<eos>", "<u>", "</u>", "<a>"])
    if adds_bos:
        made.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", len(letters))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


def of_orpo(tokenizer, row: dict) -> list[int]:
    orpo = pytest.importorskip("trl.experimental.orpo")
    from trl.data_utils import maybe_apply_chat_template

    trainer = types.SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=512)
    trainer.build_tokenized_answer = types.MethodType(orpo.ORPOTrainer.build_tokenized_answer, trainer)
    fed = orpo.ORPOTrainer.tokenize_row(trainer, maybe_apply_chat_template(row, tokenizer))
    return fed["chosen_input_ids"][: fed["chosen_labels"].count(-100)]


def of_dpo(tokenizer, row: dict) -> list[int]:
    dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    chat = {"add_generation_prompt": True} if isinstance(row["prompt"], list) else {}
    return list(dpo._tokenize(tokenizer, row["prompt"], **chat)["input_ids"])


@pytest.mark.parametrize(
    "row", [TEXT, TALK, {**TEXT, "prompt": "<bos>Moss is:"}, {**TEXT, "prompt": "<u>Moss:</u><a>"}]
)
@pytest.mark.parametrize(("template", "adds_bos"), [("<bos>" + TURNS, True), (None, True), (TURNS, False)])
def test_prompt_tokens_of_pairs_are_trls(row, template, adds_bos, tmp_path):
    """Gemma's and Llama 3's kind of tokenizer, one without a template, and one that puts no BOS (Qwen's)."""
    if template is None and row is TALK:
        pytest.skip("conversations need a template")
    tokenizer = byte_tokenizer(template, adds_bos)
    found = pairs.read_pairs(write_lines(tmp_path / "p.jsonl", row), tokenizer)
    (pair,) = Pairs(tokenizer, tokenizer.eos_token_id, list(found), 64)
    if adds_bos:  # which ORPO does for every tokenizer that has one, and DPO as the tokenizer does
        assert list(pair.prompt) == of_orpo(tokenizer, row)
        assert pair.prompt.count(tokenizer.bos_token_id) == 1
    if row["prompt"][:5] != "<bos>":  # which DPO doubles
        assert list(pair.prompt) == of_dpo(tokenizer, row)


def test_our_own_pairs_keep_their_tokens(tmp_path):
    """Rows of a `pairs.jsonl` say where their passages stand: a template has written them, with its special tokens."""
    tokenizer = byte_tokenizer(TURNS, True)
    row = {**TEXT, "prompt": "<u>Moss.</u><a>", "passage_spans": [[3, 8]]}
    (pair,) = pairs.read_pairs(write_lines(tmp_path / "p.jsonl", row), tokenizer)
    assert "plain_text" not in pair
    assert prompt_tokens(tokenizer, pair["prompt"]) == tokenizer(pair["prompt"], add_special_tokens=False).input_ids


def test_equal_conversations_are_left_out(tmp_path, capsys):
    tokenizer = byte_tokenizer(TURNS, True)
    both = TALK["prompt"] + TALK["chosen"]
    rows = [{"chosen": both, "rejected": both}, TALK, {"id": None, **TALK}]
    assert [p["id"] for p in pairs.read_pairs(write_lines(tmp_path / "p.jsonl", *rows), tokenizer)] == ["2", "3"]
    assert "2 pairs; left out 1 for two equal responses" in capsys.readouterr().out
    assert [p["id"] for p in pairs.read_pairs(str(tmp_path / "p.jsonl"), tokenizer, most=1)] == ["2"]
    with pytest.raises(UserError, match=r"line 1: .*no 'chosen'"):  # as pandas writes an empty cell
        pairs.read_pairs(write_lines(tmp_path / "p.jsonl", {**TEXT, "chosen": float("nan")}), tokenizer)
