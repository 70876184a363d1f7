"""The model's own tokenizer: from its Hugging Face files, or rebuilt from a GGUF header (byte-level BPE)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.hub import gguf, huggingface
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.hub.model_files import read_config, resolve_path
from roserag_jax.rag.chat import render_chat


class ModelTokenizer:
    """A `transformers` tokenizer whose token ids are rows of one model's embedding table.

    An id beyond the table would be read as the table's last row, without an error. So every text that is tokenized is
    checked here; all else is the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, name: str, vocab_size: int):
        self._tokenizer, self._name, self._vocab_size = tokenizer, name, vocab_size

    def __call__(self, *args, **options) -> Any:
        """Tokenize, and refuse ids that the model's embedding table does not have."""
        encoded = self._tokenizer(*args, **options)
        ids = encoded["input_ids"]
        for row in ids if ids and isinstance(ids[0], list) else [ids]:
            check_ids(row, self._name, self._vocab_size)
        return encoded

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)


def check_ids(ids: Iterable[int], name: str, vocab_size: int) -> None:
    """Refuse token ids that an embedding table of `vocab_size` rows does not have; `name` is what they come from.

    Raises:
      UserError: there is one.
    """
    if (largest := max(ids, default=0)) >= vocab_size:
        raise UserError(
            f"{name} gives token id {largest}, but the model's embedding table has {vocab_size} rows: "
            "it is not this model's tokenizer; set config.tokenizer to the one that is, or leave it empty."
        )


def tokenizer_path(model: str, tokenizer: str = "", revision: str | None = None) -> Path:
    """Find the folder or GGUF file that `config.tokenizer`, or where that is empty `config.model`, names."""
    return resolve_path(tokenizer or model, None if tokenizer else revision, weights=False)


def load_tokenizer(model: str, tokenizer: str = "", revision: str | None = None) -> ModelTokenizer:
    """Load the tokenizer of `config.model`, or `config.tokenizer` where that is given, for use with the model.

    Raises:
      UserError: there is none, it cannot be read, or it is known not to be the model's.
    """
    path, config = read_config(model, revision)
    if not tokenizer:
        return ModelTokenizer(read_tokenizer(path), f"The tokenizer of {model}", config.vocab_size)
    named = read_tokenizer(tokenizer_path(model, tokenizer))
    if path.suffix == ".gguf":
        _compare(named, tokenizer, path)
    return ModelTokenizer(named, f"config.tokenizer={tokenizer}", config.vocab_size)


def read_tokenizer(path: Path) -> Any:
    """Read the `transformers` tokenizer in a Hugging Face folder or a GGUF file.

    Raises:
      UserError: there is none, it is damaged, or the GGUF file's is of a kind that is not rebuilt here.
    """
    read = _from_gguf if path.suffix == ".gguf" else _from_folder
    try:
        tokenizer = read(path)
        _try_out(tokenizer)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # plain exceptions of every kind, and panics of Rust, which are no `Exception`
        raise UserError(
            f"{path}: its tokenizer cannot be read ({first_line(error)}); download it again, or name another in "
            "config.tokenizer."
        ) from error
    return tokenizer


def _from_folder(path: Path) -> Any:
    import transformers

    has = {name for name in huggingface.TOKENIZER_FILES if (path / name).is_file()}
    if not has & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        raise UserError(
            f"{path} has no tokenizer (no tokenizer.json or tokenizer.model); name one in config.tokenizer."
        )
    if "vocab.json" in has and not has & {"tokenizer.json", "tokenizer.model", "merges.txt"}:
        raise UserError(f"{path} has vocab.json, but not the merges.txt that belongs to it; download it too.")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        if name in has:
            read_json_object(path / name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if isinstance(templates := tokenizer.chat_template, dict):
        if "default" not in templates:
            raise UserError(f"{path}: none of its chat templates ({quote(sorted(templates))}) is called 'default'.")
        tokenizer.chat_template = templates["default"]
    return tokenizer


def _try_out(tokenizer: Any) -> None:
    """Use a tokenizer in all ways that the project does: some damage shows only then."""
    text = "Who was it in 1901?\n"
    ids = tokenizer(text).input_ids
    if not tokenizer.decode(ids) or not tokenizer(text, add_special_tokens=False).input_ids:
        raise ValueError(f"it makes nothing of {text!r}")
    tokenizer.get_vocab()
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": text}]
        tokenizer(render_chat(tokenizer, turns))


def _compare(tokenizer: Any, name: str, model: Path) -> None:
    """Compare a named tokenizer with the token list in the model's GGUF file."""
    found, tokens = tokenizer.get_vocab(), gguf.tokens(model)
    # llama.cpp's converter writes the space of added tokens as itself, and fills the table up with tokens of its own.
    plain = lambda token: token.replace("\u2581", " ")
    unused = lambda token: token.startswith(("[PAD", "<unused"))
    differ = sorted(
        (i, token)
        for token, i in found.items()
        if i < len(tokens) and plain(token) != plain(tokens[i]) and not unused(tokens[i])
    )
    if differ:
        i, token = differ[0]
        raise UserError(
            f"config.tokenizer={name} is not the tokenizer of {model}: {len(differ)} of {len(tokens)} tokens differ, "
            f"the first is id {i}: {quote(token)}, in the model {quote(tokens[i])}."
        )


def _from_gguf(path: Path):
    import transformers
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.read(path).fields
    get = lambda key, default=None: fields[f"tokenizer.{key}"].contents() if f"tokenizer.{key}" in fields else default
    if get("ggml.tokens") is None:
        raise UserError(f"{path} has no tokenizer; name one in config.tokenizer.")
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


def stop_ids(tokenizer: Any, model: Path, vocab_size: int) -> tuple[int, ...]:
    """Collect the tokens that end a turn: the tokenizer's EOS and those that the model's files list.

    These are `generation_config.json`'s, or where that is absent `config.json`'s; in a GGUF file the header's.

    Raises:
      UserError: there is none, so generation could never end; or the model's embedding table lacks one.
    """
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    if model.suffix == ".gguf":
        header, file = gguf.header_fields(model), model
        names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    else:
        config, generation = model / huggingface.CONFIG, model / huggingface.GENERATION_CONFIG
        file = generation if generation.is_file() else config
        header, names = Fields(read_json_object(file), str(file)), ("eos_token_id",)
    listed = {token for name in names for token in header.integers(name)}
    check_ids(ids, "The tokenizer (eos_token)", vocab_size)
    check_ids(listed, f"{file} (eos_token_id)", vocab_size)
    # A chat template may close a turn with a token that the configuration forgot (Gemma's <end_of_turn>).
    vocabulary = tokenizer.get_vocab()
    closing = {vocabulary[t] for t in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if t in vocabulary}
    ids = ids | listed | {token for token in closing if token < vocab_size}
    if not ids:
        raise UserError("The tokenizer names no end-of-sequence token; set config.tokenizer to one that does.")
    return tuple(sorted(ids))


def turn_end(tokenizer, stops: tuple[int, ...], template_arguments: Mapping | None = None) -> int:
    """The token that closes a response in training: what the chat template puts after one, else the tokenizer's EOS."""
    if tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        text = render_chat(tokenizer, turns, template_arguments, generation_prompt=False)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        closing = [token for token in tokens if token in stops]
        if closing:
            return closing[-1]
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stops else stops[0]
