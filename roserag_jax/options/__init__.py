"""Every option: its default, what it means, which values it takes, and which options only make sense together.

`roserag train --options` prints the table. A misspelt option or a value of the wrong type stops the command at once. To
add an option, add one `Option` to its section's file here; what depends on other options is a small function under
`@together` beside its section, which yields `(option, what is wrong)`.
"""

import os
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict, FieldReference

from roserag_jax.errors import UserError
from roserag_jax.options.data import DATA
from roserag_jax.options.evaluation import EVALUATE, EXPORT
from roserag_jax.options.general import GENERAL, MESH
from roserag_jax.options.option import TOGETHER, TOGETHER_IN_RUNS, Option
from roserag_jax.options.preference import GENERATE, PROMPT, SELECT
from roserag_jax.options.questions import QUESTIONS
from roserag_jax.options.retrieval import RETRIEVE
from roserag_jax.options.serving import SERVE
from roserag_jax.options.training import LORA, TRAIN

OPTIONS: dict[str, dict[str, Option] | Option] = GENERAL | {
    "mesh": MESH,
    "data": DATA,
    "retrieve": RETRIEVE,
    "questions": QUESTIONS,
    "prompt": PROMPT,
    "generate": GENERATE,
    "select": SELECT,
    "lora": LORA,
    "train": TRAIN,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "serve": SERVE,
}


def defaults() -> ConfigDict:
    """A locked `ConfigDict` of all options at their defaults; configuration files start from it."""

    def value(option):
        return FieldReference(option.default, field_type=option.value_type) if option.value_type else option.default

    tree = {
        name: {k: value(option) for k, option in entry.items()} if isinstance(entry, dict) else value(entry)
        for name, entry in OPTIONS.items()
    }
    return ConfigDict(tree).lock()


def walk() -> Iterator[tuple[str, Option]]:
    """Every option with its dotted name."""
    for name, entry in OPTIONS.items():
        if isinstance(entry, dict):
            yield from ((f"{name}.{k}", option) for k, option in entry.items())
        else:
            yield name, entry


def get(config: ConfigDict, dotted: str) -> Any:
    """The value of an option by its dotted name."""
    for part in dotted.split("."):
        config = config[part]
    return config


def subset(config: ConfigDict, *names: str, without: tuple[str, ...] = ()) -> dict:
    """The options of the given names and sections, flat and by dotted name: what an artifact depends on."""
    wanted = lambda name: any(name == n or name.startswith(f"{n}.") for n in names)
    plain = lambda value: value.to_dict() if isinstance(value, ConfigDict) else value
    return {name: plain(get(config, name)) for name, _ in walk() if wanted(name) and name not in without}


def describe() -> str:
    """All options as text: name, default, help and choices."""
    lines = []
    for name, option in walk():
        choices = f" ({', '.join(map(str, option.choices))})" if option.choices else ""
        lines.append(f"  --config.{name}={option.default!r}\n      {option.help}{choices}")
    return "\n".join(lines)


def validate(config: ConfigDict, workdir: bool = True, model: bool = True) -> None:
    """Check everything that can be checked before anything expensive.

    Args:
      workdir: whether the command needs `config.workdir`.
      model: whether it needs `config.model`.

    Raises:
      UserError: naming the option, its value and what is allowed.
    """

    def fail(name: str, why: str):
        raise UserError(f"config.{name}={get(config, name)!r}: {why}.")

    for name, option in walk():
        if why := option.fault(get(config, name)):
            fail(name, why)
    for check in TOGETHER + TOGETHER_IN_RUNS * (workdir or model):
        for name, why in check(config):
            fail(name, why)
    if model and not config.model:
        fail("model", "name a Hub id, a Hugging Face folder or a .gguf file, or a --config file that does")
    if workdir and not config.workdir:
        fail("workdir", "name the folder that every result goes to")


def require_files(config: ConfigDict, *names: str) -> None:
    """Check that the local files exist that the options name, and those that passages come from.

    Raises:
      UserError: one does not exist.
    """
    for name in (*names, "retrieve.corpus", "retrieve.cache"):
        value = get(config, name)
        if (
            value
            and value not in ("synthetic", "documents")
            and "://" not in value
            and not os.path.exists(os.path.expanduser(value))
        ):
            raise UserError(f"config.{name}={value!r}: there is no such file or folder.")
