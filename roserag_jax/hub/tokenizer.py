"""The model's own tokenizer: from its Hugging Face files, or rebuilt from a GGUF header (byte-level BPE)."""

from pathlib import Path

from roserag_jax.errors import UserError, first_line
from roserag_jax.hub import gguf
from roserag_jax.hub.model_files import resolve_path
from roserag_jax.rag.prompts import render_chat


def load(model: str, tokenizer: str = "", revision: str | None = None):
    """A `transformers` tokenizer for `config.model`, or for `config.tokenizer` where that is given.

    Raises:
      UserError: there is none, or the GGUF file's tokenizer is of a kind that is not rebuilt here.
    """
    import transformers

    path = resolve_path(tokenizer or model, None if tokenizer else revision, weights=False)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        why = first_line(error)
        raise UserError(f"{path} has no tokenizer that can be read ({why}); name one in config.tokenizer.") from error


def _from_gguf(path: Path):
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.read(path).fields
    get = lambda key, default=None: fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else default
    # llama.cpp's names of the pre-tokenizers: how text is split before the merges apply.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {"gpt-2": byte_level, "smollm": pre_tokenizers.Sequence([digits, byte_level])}
    if get("ggml.model") != "gpt2" or get("ggml.pre", "gpt-2") not in known:
        kind = f"{get('ggml.model')}/{get('ggml.pre')}"
        raise UserError(
            f"{path}: its tokenizer ({kind}) is not rebuilt from GGUF; set config.tokenizer to a Hub id or folder."
        )

    tokens = get("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in get("ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer, bpe.decoder = known[get("ggml.pre", "gpt-2")], decoders.ByteLevel()
    control, user_defined = 3, 4
    for token, kind in zip(tokens, get("ggml.token_type"), strict=True):
        if kind in (control, user_defined):
            bpe.add_tokens([AddedToken(token, special=kind == control, normalized=False)])
    name = lambda kind: None if get(f"ggml.{kind}_token_id") is None else tokens[get(f"ggml.{kind}_token_id")]
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=name("bos"),
        eos_token=name("eos"),
        unk_token=name("unknown"),
        pad_token=name("padding"),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = get("chat_template")
    return wrapped


def stop_ids(tokenizer, model_path: Path) -> tuple[int, ...]:
    """Tokens that end a turn: the tokenizer's EOS and those that the model's generation config lists.

    Raises:
      UserError: there is none, so generation could never end.
    """
    import transformers

    ids = {tokenizer.eos_token_id}
    if (model_path / "generation_config.json").is_file():
        listed = transformers.GenerationConfig.from_pretrained(model_path).eos_token_id
        ids.update(listed if isinstance(listed, list) else [listed])
    # A chat template may close a turn with a token that the configuration forgot (Gemma's <end_of_turn>).
    vocabulary = tokenizer.get_vocab()
    ids.update(vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if t in vocabulary)
    ids.discard(None)
    if not ids:
        raise UserError("The tokenizer names no end-of-sequence token; set config.tokenizer to one that does.")
    return tuple(sorted(ids))


def turn_end(tokenizer, stops: tuple[int, ...]) -> int:
    """The token that closes a response in training: what the chat template puts after one, else the tokenizer's EOS."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        tokens = tokenizer(render_chat(tokenizer, turns, generation_prompt=False), add_special_tokens=False).input_ids
        closing = [token for token in tokens if token in stops]
        if closing:
            return closing[-1]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
