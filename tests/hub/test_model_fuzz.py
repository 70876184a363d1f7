"""Model files with random damage: each is read as a sound model, or refused in one line.

A mutation is a function of its number. FUZZ_MUTATIONS sets how many there are of each file (20).
"""

import copy
import json
import os
import random
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FAMILIES, SIZES, copy_folder, random_adapter, write_files, write_gguf

from roserag_jax.errors import LONGEST_MESSAGE, UserError
from roserag_jax.hub import loading, merged_export, model_files, peft_adapter, tokenizer
from roserag_jax.models.lora import LoRAConfig

COUNT = int(os.environ.get("FUZZ_MUTATIONS", "20"))
VALUES = [
    *(None, True, False, 0, 1, -1, 2, 3, 1 << 16, 1 << 31, 10**12, 10**400, 0.0, -0.5, 1e-300, 1e308, float("nan")),
    *("", "x", "1", "\ud800", "ü" * 5000, "{{ 1 / 0 }}", "{% for x in y %}", [], [1], [[[]]], ["q_proj"], {}),
    *({"a": 1}, [None], {"": None}, [True, 2.5, "z"]),
]


def mutated_json(rng: random.Random, text: str) -> bytes:
    """JSON with one to three values replaced, removed, doubled or moved."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places = []

        def collect(node, places=places, limit=2000):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            for key in rng.sample(list(keys), min(len(keys), 60)):  # a vocabulary is not the only thing of interest
                if len(places) < limit:
                    places.append((node, key))
                    if isinstance(node[key], dict | list):
                        collect(node[key], places, limit)

        collect(value)
        if not places:
            break
        node, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind == 0:
            del node[key]
        elif kind == 1:
            other, name = rng.choice(places)
            node[key] = copy.deepcopy(other[name]) if name in other or isinstance(other, list) else None
        elif kind == 2 and isinstance(node[key], int | float):
            node[key] = node[key] * rng.choice([-1, 0, 2, 0.5, 1000])
        elif kind == 3 and isinstance(node, dict):
            node[str(key) + rng.choice(["s", " ", "_"])] = node.pop(key)
        else:
            node[key] = rng.choice(VALUES)
    return json.dumps(value).encode()


def mutated_bytes(rng: random.Random, data: bytes, header: int) -> bytes:
    """Bytes with bits flipped, cut off, removed, doubled or overwritten, most of it within the header."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        size = min(header, len(data)) if rng.random() < 0.8 else len(data)
        at, length = rng.randrange(max(size, 1)), rng.choice([1, 2, 4, 8, 32])
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([data[at] ^ (1 << rng.randrange(8))]) if at < len(data) else b""
        elif kind == 1:
            del data[rng.choice([at, at + length]) :]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * rng.choice([1, 2, 50])
        else:
            data[at : at + length] = rng.choice([b"\x00", b"\xff", b"\x7f", rng.randbytes(1)]) * length
    return bytes(data)


@pytest.fixture(scope="module")
def sound(model_folder, tmp_path_factory, one_device):
    """A folder with every kind of file that a model comes in: Hugging Face, sharded, GGUF, and an adapter."""
    folder = copy_folder(model_folder, tmp_path_factory.mktemp("sound") / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    opened = model_files.open_model(str(folder))
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    lora = LoRAConfig(2, 4.0, 0.0, ("q_proj", "up_proj"))
    write_files(
        folder / "adapter", peft_adapter.adapter_files(random_adapter(opened.config, lora, one_device), lora, "base")
    )
    shutil.copytree(folder, folder / "sharded", ignore=shutil.ignore_patterns("*.safetensors", "adapter"))
    merged_export.save_weights(loading.assemble(opened.config, base), folder / "sharded", shard_bytes=30_000)
    return folder


def load(folder, mesh):
    """Read all of a folder that is there to be read."""
    opened = model_files.open_model(str(folder))
    base = loading.load_base(opened, jnp.dtype("float32"), mesh)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(base))
    model_files.fingerprint(str(folder))
    path = opened.path
    loaded = tokenizer.load_tokenizer(str(folder))
    stops = tokenizer.stop_ids(loaded, path, opened.config.vocab_size)
    tokenizer.turn_end(loaded, stops)
    loaded.decode(loaded("Who? Straße 12").input_ids)


def outcome(read) -> str | None:
    """The message with which something is refused, None if it is read; nothing else may happen, and not for long."""

    def stop(*_):
        raise AssertionError("it takes more than 30 seconds of computing")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, 30)
    try:
        read()
    except UserError as error:
        assert "\n" not in str(error) and 0 < len(str(error)) <= LONGEST_MESSAGE
        return str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return None


JSON_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sharded/model.safetensors.index.json",
    "adapter/adapter_config.json",
]
BINARY_FILES = ["model.safetensors", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("name", JSON_FILES + BINARY_FILES)
def test_damaged_files_are_read_or_refused(name, sound, one_device, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "model")
    file, config = folder / name, model_files.read_config(str(sound))[1]
    whole, refused = file.read_bytes(), 0

    def read():
        if name.startswith("adapter/"):
            lora, state = peft_adapter.load_adapter(file.parent, config, one_device)
            assert peft_adapter.read_lora_config(file.parent) == lora and np.isfinite(np.float32(lora.scale))
            assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
        else:
            load(file.parent, one_device)

    read()
    for number in range(COUNT):
        rng = random.Random(f"{name} {number}")
        if name in JSON_FILES and rng.random() < 0.7:
            file.write_bytes(mutated_json(rng, whole.decode()))
        else:
            file.write_bytes(mutated_bytes(rng, whole, 2000 if name in BINARY_FILES else len(whole)))
        try:
            refused += outcome(read) is not None
        except BaseException as error:
            error.add_note(f"mutation {number} of {name}")
            raise
    assert refused > COUNT // 10


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_damaged_gguf_files_are_read_or_refused(arch, one_device, tmp_path):
    file, _ = write_gguf(arch, tmp_path, vocabulary=True)
    whole, refused = file.read_bytes(), 0
    for number in range(COUNT):
        file.write_bytes(mutated_bytes(random.Random(f"{arch} {number}"), whole, 6000))
        try:
            refused += outcome(lambda: load(file, one_device)) is not None
        except BaseException as error:
            error.add_note(f"mutation {number} of {arch}")
            raise
    assert refused > COUNT // 10


@pytest.mark.parametrize("family", FAMILIES)
def test_damaged_configurations_are_read_or_refused(family, tmp_path):
    """Of every family, as transformers 4 and 5 write them."""
    import transformers

    transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family]).save_pretrained(tmp_path)
    file, refused = tmp_path / "config.json", 0
    new = json.loads(file.read_text())
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    old |= {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    for number in range(COUNT):
        rng = random.Random(f"{family} {number}")
        file.write_bytes(mutated_json(rng, json.dumps(rng.choice([old, new]))))
        try:
            refused += outcome(lambda: model_files.read_config(str(tmp_path))) is not None
        except BaseException as error:
            error.add_note(f"mutation {number} of {family}: {file.read_text()[:4000]}")
            raise
    assert refused
