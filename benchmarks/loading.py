"""Peak memory of loading a model, beside the memory that its weights take.

    python -m benchmarks.loading [--model FOLDER_OR_GGUF] [--dtype bfloat16]

Without --model, a random model of Llama-3.2-1B's shape is written to a temporary folder (2.5 GB) and loaded. Memory is
the process's own (anonymous pages; pages of the memory-mapped file belong to the system, which drops them as it needs).
The last line is one JSON object.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files, tensor_names
from roserag_jax.models.lora import LoRAConfig

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "architectures": ["LlamaForCausalLM"],
}


def write_random_model(folder: Path) -> None:
    """A Hugging Face folder of `SHAPE` in bfloat16, in files of about half a gigabyte."""
    import transformers
    from safetensors.numpy import save_file

    hf = transformers.LlamaConfig(**SHAPE)
    hf.save_pretrained(folder)
    config = model_files.read_config(str(folder))[1]
    names, pending = {}, {}
    rng = np.random.default_rng(0)

    def flush():
        file = f"model-{len(set(names.values())):05d}.safetensors"
        save_file(pending, folder / file)
        names.update(dict.fromkeys(pending, file))
        pending.clear()

    for path, variable in nnx.to_flat_state(nnx.state(loading.abstract_model(config, LoRAConfig(), jnp.bfloat16))):
        name, shape = tensor_names.tensor_name(path, config), variable.get_value().shape
        for i in range(shape[0]) if "{}" in name else [None]:
            inner = shape[1:] if "{}" in name else shape
            pending[name.format(i)] = rng.standard_normal(inner, np.float32).astype(jnp.bfloat16)
            if sum(t.nbytes for t in pending.values()) > 5e8:
                flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


class Peak:
    """The largest anonymous resident memory of this process while the block runs, sampled every 5 ms (Linux)."""

    def __enter__(self):
        self.before = self.bytes = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _now(self):
        line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def _watch(self):
        while not self._stop.wait(0.005):
            self.bytes = max(self.bytes, self._now())

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder or .gguf file")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = args.model or temporary
        if not args.model:
            write_random_model(Path(temporary))
        opened, mesh = model_files.open_model(model), make_mesh()
        jnp.zeros(1).block_until_ready()
        start = time.monotonic()
        with Peak() as peak:
            base = jax.block_until_ready(loading.load_base(opened, jnp.dtype(args.dtype), mesh))
        seconds = time.monotonic() - start
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        largest = max(np.prod(shape) for shape in opened.shapes().values()) * jnp.dtype(args.dtype).itemsize
    used = peak.bytes - peak.before
    result = {"weights_mb": size, "peak_mb": used, "beside_mb": used - size, "largest_tensor_mb": int(largest)}
    result = {name: round(value / 1e6) for name, value in result.items()} | {"seconds": round(seconds, 1)}
    print(json.dumps(result | {"devices": jax.device_count(), "dtype": args.dtype}))


if __name__ == "__main__":
    main()
