"""Hugging Face folders: `config.json` and safetensors weights, read piece by piece; never pickles, never code."""

from pathlib import Path

from roserag_jax.errors import UserError, first_line, quote
from roserag_jax.hub.json_files import Fields, read_json_object
from roserag_jax.models import config as model_config

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
# What is read of a tokenizer, and so downloaded, copied and identified.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "chat_template.json",
    "chat_template.jinja",
)
CHAT_TEMPLATES = "additional_chat_templates"


def read_transformers_config(folder: Path):
    """Read the `transformers` configuration of a folder.

    Raises:
      UserError: there is none, it is damaged, or its model type is not implemented.
    """
    import transformers

    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"config.model: {folder} has no config.json; name a Hugging Face folder, a .gguf file or a Hub id."
        )
    fields = Fields(read_json_object(file), str(file))
    model_config.check_family(fields.text("model_type", None), str(file))
    fields.integer("num_hidden_layers", None, 1, model_config.MOST_LAYERS)  # transformers makes lists of that length
    if "transformers_weights" in fields.values:
        raise UserError(f"{file}: transformers_weights is not implemented; name the file {WEIGHTS}.")
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers checks the values, and raises many kinds
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error


class HuggingFaceFolder:
    """A folder with `config.json` and one or many safetensors files."""

    def __init__(self, path: Path):
        self.path, self._hf = path, read_transformers_config(path)
        self.config = model_config.from_hf(self._hf, str(path / CONFIG))
        self._files = {name: handle for file in weight_files(path) for name, handle in _open(file)}

    def shapes(self):
        """Shape of every tensor, by name."""
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self._files.items()}

    def read(self, name, index):
        """Read one piece from the memory-mapped file."""
        return self._files[name].get_slice(name)[index]

    def transformers_config(self):
        """The configuration as it was saved."""
        return self._hf


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files of a folder's tokenizer."""
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return files + sorted(folder.glob(f"{CHAT_TEMPLATES}/*.jinja"))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, by transformers' precedence: one file before the shards that an index lists.

    Raises:
      UserError: a file is missing, or leads out of the folder.
    """
    names, index = [WEIGHTS], folder / WEIGHTS_INDEX
    if index.is_file() and not (folder / WEIGHTS).exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: weight_map is not an object of tensor names and files; download it again.")
        names = {str(name) for name in weight_map.values()}
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise UserError(f"{index}: {quote(name)} is not a plain *.safetensors name inside the folder.")
    # The Hub's cache links to files beside its snapshots; nothing else may lead out of the folder.
    root = folder.parent.parent if folder.parent.name == "snapshots" else folder
    for name in sorted(names):
        if not (folder / name).resolve().is_relative_to(root.resolve()):
            raise UserError(f"{folder / name} leads out of its folder; put the file itself there.")
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; only safetensors weights are read, never pickles.")
    return [folder / name for name in sorted(names)]


# The safetensors types that hold weights as numbers; what is quantized or counted comes as the others.
_WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")


def _open(file: Path):
    """Yield `(tensor name, open file)` of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        file.open("rb").close()  # safetensors says of a file without permission that it is not there
        handle = safe_open(file, "numpy")
    except PermissionError as error:
        raise UserError(f"{file} may not be read ({error.strerror}); change its permissions.") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({first_line(error)}); download it again.") from error
    for name in handle.keys():  # noqa: SIM118 (not a dict)
        kind = handle.get_slice(name).get_dtype()
        if kind not in _WEIGHT_TYPES:
            raise UserError(
                f"{file}: {quote(name)} is of type {kind}, not one of {', '.join(_WEIGHT_TYPES)}; "
                "use the original, unquantized weights."
            )
        yield name, handle
