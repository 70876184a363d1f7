"""What the benchmarks share: the model on both sides, random prompts, and the machine's own limits."""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files
from roserag_jax.inference.engine import Engine


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark of the engine has."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", required=True, help="Hugging Face folder or .gguf file")
    result.add_argument("--prompts", type=int, default=8, help="prompts of a batch")
    result.add_argument("--length", type=int, default=700, help="tokens of a prompt")
    result.add_argument("--repeats", type=int, default=2, help="runs timed, after one that is not; the fastest counts")
    return result


def engine(args) -> Engine:
    """Our engine in float32; nothing stops a branch, so that both sides decode the same number of tokens."""
    opened, mesh = model_files.open_model(args.model), make_mesh()
    base = loading.load_base(opened, jnp.float32, mesh)
    return Engine(loading.assemble(opened.config, base), mesh, (), 0)


def reference(path: str):
    """The same model in transformers, float32, on the CPU."""
    import torch
    import transformers

    path = Path(path)
    where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    return transformers.AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1]).eval()


def random_tokens(rng, rows: int, length: int, vocabulary: int) -> list[list[int]]:
    """Rows of random tokens, away from the special ones at the ends of the vocabulary."""
    return rng.integers(100, vocabulary - 100, (rows, length)).tolist()


def fastest(run, repeats: int, warm: bool = True) -> float:
    """Seconds of the fastest of `repeats` runs, after one that compiles if `warm`."""
    if warm:
        run()
    seconds = []
    for _ in range(repeats):
        start = time.monotonic()
        run()
        seconds.append(time.monotonic() - start)
    return min(seconds)


def matmul_rate(size: int = 2048, dtype=jnp.float32) -> float:
    """Operations per second of a matrix product on this device."""
    a = jnp.ones((size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / fastest(lambda: product(a).block_until_ready(), 5)


def memory_rate(megabytes: int = 512) -> float:
    """Bytes per second that this device reads, by a sum over an array."""
    a = jnp.ones(megabytes * 250_000)
    total = jax.jit(jnp.sum)
    return a.nbytes / fastest(lambda: total(a).block_until_ready(), 5)


def operations(engine: Engine, rows: int, tokens: int, before: int = 0, projected: bool = False) -> float:
    """Operations of a forward pass over rows of `tokens` tokens behind `before` others.

    Args:
      projected: the vocabulary projection too.
    """
    c = engine.config
    weights = sum(leaf.size for leaf in jax.tree.leaves(engine.network.state(engine.weights)["layers"]))
    weights += c.embed_dim * c.vocab_size if projected else 0
    keys = tokens * before + tokens * (tokens + 1) / 2
    return rows * (2 * tokens * weights + 4 * keys * c.num_layers * c.num_heads * c.head_dim)
