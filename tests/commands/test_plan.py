"""`plan`: the mesh that suits, and programs compiled for TPUs and GPUs that are not there.

They need libtpu and the CUDA plug-in (`make test-plan`, `make test-plan-gpu`).
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from roserag_jax import automatic_mesh, options
from roserag_jax.distributed import hardware
from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.distributed.sharding import sharding
from roserag_jax.models.attention import prompt_attention
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import PROJECTIONS, LoRAConfig
from roserag_jax.plan import Plan

needs_libtpu = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed (the extra 'plan')")
cuda_plugin = any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))

V5E = hardware._CHIPS["TPU v5 lite"].memory
GEMMA_2B = {"num_layers": 26, "embed_dim": 2304, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "mlp_dim": 9216}
LLAMA_8B = {"num_layers": 32, "embed_dim": 4096, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_dim": 14336}


def hf_config(shape, vocab_size, tied):
    transformers = pytest.importorskip("transformers")
    s = shape
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=vocab_size,
        hidden_size=s["embed_dim"],
        intermediate_size=s["mlp_dim"],
        num_hidden_layers=s["num_layers"],
        num_attention_heads=s["num_heads"],
        num_key_value_heads=s["num_kv_heads"],
        head_dim=s["head_dim"],
        tie_word_embeddings=tied,
    )


def model(shape, vocab_size, tied):
    from roserag_jax.models import config

    return config.from_hf(hf_config(shape, vocab_size, tied), "here")


def training(config: ModelConfig, pairs, devices=1):
    lora = LoRAConfig(16, 32.0, 0.0, PROJECTIONS, False)
    sizes = {"devices": devices, "memory": V5E, "pairs": pairs, "tokens": 1536 + 2 * 192, "remat": "layer"}
    return automatic_mesh.for_training(config, lora, 2, **sizes)


def test_weights_are_replicated_where_they_fit_and_split_where_not():
    """Gemma-2-2B trains with 12 pairs on each chip of a v5e, Llama-3.1-8B on none."""
    gemma, llama = model(GEMMA_2B, 256000, True), model(LLAMA_8B, 128256, False)
    assert automatic_mesh.weight_bytes(gemma, 2) == pytest.approx(5.23e9, rel=0.01)
    assert automatic_mesh.weight_bytes(llama, 2) == pytest.approx(16.06e9, rel=0.01)
    for pairs, devices in ((8, 8), (12 * 8, 8), (4, 1)):
        assert training(gemma, pairs, devices).sizes == {"data": devices, "fsdp": 1, "tensor": 1}
    assert training(gemma, 14 * 8, 8).sizes == {"data": 1, "fsdp": 8, "tensor": 1}
    assert training(llama, 8, 8).sizes == {"data": 1, "fsdp": 8, "tensor": 1}
    decode = lambda config, slots, each, devices=8: automatic_mesh.for_decoding(
        config, 2, devices=devices, memory=V5E, slots=slots, slot_bytes=lambda tensor: each // tensor
    )
    assert decode(gemma, 64, 300e6).sizes == {"data": 8, "fsdp": 1, "tensor": 1}
    assert decode(gemma, 1024, 300e6, devices=4).sizes["tensor"] == 4  # does not fit; split as far as it goes
    choice = decode(llama, 8, 300e6)
    assert choice.sizes == {"data": 4, "fsdp": 1, "tensor": 2} and "weights split over 2 devices" in choice.why


@pytest.mark.parametrize(("pairs", "split", "gigabytes"), [(1, 1, 6.28), (8, 1, 11.44), (13, 1, 15.06), (1, 8, 3.72)])
def test_training_needs_are_what_a_compiled_step_allocates(pairs, split, gigabytes):
    """Of Gemma-2-2B for a TPU v5e: 1,536 + 2 x 192 tokens, rank 16, remat=layer. More is estimated rather than less."""
    lora, sizes = LoRAConfig(16, 32.0, 0.0, PROJECTIONS, False), {"tokens": 1536 + 2 * 192, "remat": "layer"}
    needs = automatic_mesh.training_needs(model(GEMMA_2B, 256000, True), lora, 2, pairs=pairs, split=split, **sizes)
    assert gigabytes <= needs / 1e9 <= 1.15 * gigabytes


def test_unknown_memory_replicates():
    gemma = model(GEMMA_2B, 256000, True)
    choice = automatic_mesh.for_decoding(gemma, 2, devices=4, memory=None, slots=8, slot_bytes=lambda tensor: 1)
    assert choice.sizes == {"data": 4, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(("tensor", "copies"), [(1, 1), (2, 1), (4, 2), (8, 8)])
def test_decode_step_reads_each_copy_of_a_key_value_head(tensor, copies, tmp_path, monkeypatch):
    """Of four query heads and two key/value heads: four devices hold each of the two twice, eight hold both."""
    monkeypatch.setattr(automatic_mesh, "make_mesh", make_mesh)  # the fixture `alone` leaves one device for a session
    shape = GEMMA_2B | {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    config = options.defaults()
    config.model, config.dtype, config.prompt.max_tokens = str(tmp_path), "bfloat16", 256
    config.mesh.data, config.mesh.tensor = 8 // tensor, tensor
    (tmp_path / "config.json").write_text(hf_config(shape | {"mlp_dim": 96}, 512, True).to_json_string())
    planned = Plan(config, jax.devices()[:8])
    cached = 10 * 2 * 2 * 2 * 16 * 2  # tokens, K and V, layers, heads, their size, bytes of a number
    assert planned._cache_read(planned.meshes.decoding, 10) == copies * cached


# As libtpu writes a scan of three layers: its trip count stands in the condition alone.
LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = f32[8]{0:T(256)} all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

ENTRY %main (a: f32[2]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%init), condition=%condition, body=%body
}
"""


def test_collectives_in_a_scan_count_once_for_each_layer():
    assert count_collectives(LOOP) == {"all-gather": (3, 3 * 8 * 4 * 3 / 4)}


FSDP = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")


def plan(model_folder, *arguments):
    sizes = ["--config.prompt.max_tokens=128", "--config.train.max_response=32", "--config.generate.max_tokens=16"]
    line = [sys.executable, "-m", "roserag_jax.plan", f"--config.model={model_folder}", *sizes, *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=600, env={**os.environ})


@needs_libtpu
def test_programs_are_compiled_for_tpus(model_folder, tmp_path):
    done = plan(model_folder, "--topology=v5e:2x2", "--programs=decode,train", f"--rows={tmp_path / 'rows.jsonl'}")
    assert done.returncode == 0, done.stderr
    assert "mesh for decoding data=4 fsdp=1 tensor=1, for training data=4 fsdp=1 tensor=1: " in done.stdout
    decode, train = done.stdout.split("decode step")[1].split("training step")
    # Replicated weights: a decode step sends no arrays, a training step the adapter's gradients.
    assert "all-gather" not in decode and "all-reduce" in train and "(fits)" in decode and "(fits)" in train
    decode, train = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert train["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1} and train["topology"] == "v5e:2x2"
    assert train["sent"] == sum(size for _, size in train["collectives"].values()) > decode["sent"]
    assert "estimated to fit: " in done.stdout
    done = plan(model_folder, "--topology=v5e:2x2", "--programs=decode", *FSDP)
    assert "all-gather" in done.stdout.split("decode step")[1]  # the weights, for each token


@needs_libtpu
def test_largest_batch_is_found_by_compiling(model_folder):
    """What is printed last was compiled: the most that fit, and the fewest that did not, next to them."""
    done = plan(model_folder, "--topology=v5e:1x1", "--largest", "--programs=decode", "--config.mesh.memory_gb=0.02")
    assert done.returncode == 0, done.stderr
    tried = re.findall(r"^(\d+) questions x 4 samples: (fits|does not fit), ", done.stdout, re.MULTILINE)
    fits, not_fits = ([int(n) for n, found in tried if found == wanted] for wanted in ("fits", "does not fit"))
    largest, refused = map(int, re.search(r"fit by compiling: (\d+) .*, and not (\d+)", done.stdout).groups())
    assert largest == max(fits) and refused == min(not_fits) and 0 < refused - largest <= max(1, largest // 20)


@needs_libtpu
@pytest.mark.parametrize(("topology", "head_size", "softcap"), [
    ("v4:2x2x1", 128, None), ("v6e:2x2", 128, None), ("v4:2x2x1", 256, 50.0), ("v6e:2x2", 64, None)
])  # fmt: skip
def test_attention_kernel_compiles_for_every_tpu(topology, head_size, softcap):
    """Forward and backward with grouped heads and a sliding window, over two prompts and two heads' devices."""
    mesh = make_mesh(2, 1, 2, devices=hardware.topology(topology))
    array = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding(shape, axes, mesh))
    q = array((2, 512, 4, head_size), "batch", None, "heads", None)
    k = array((2, 2, head_size, 512), "batch", "heads", None, None)
    v = array((2, 2, 512, head_size), "batch", "heads", None, None)
    window = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding((), (), mesh))

    def total(q, k, v, window):
        out = prompt_attention(q, k, v, window=window, sliding_window=256, softcap=softcap)
        return out.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, v, window).compile().as_text()
    # With a window and without, each forward and backward to the queries and to the keys and values.
    assert compiled.count("tpu_custom_call") >= 6 and not count_collectives(compiled)


@pytest.mark.skipif(not cuda_plugin, reason="the CUDA plug-in is not installed")
def test_programs_are_compiled_for_gpus(model_folder):
    done = plan(model_folder, "--topology=gpu:h100x4", "--programs=prefill,decode,score,train")
    assert done.returncode == 0, done.stderr
    assert "on 4 x H100" in done.stdout and done.stdout.count("(fits)") == 4
    decode, train = done.stdout.split("decode step")[1].split("training step")
    assert "all-gather" not in decode and "all-reduce" in train
    done = plan(model_folder, "--topology=gpu:h100x4", "--slices=2", "--programs=train", *FSDP)
    assert done.returncode == 0 and "fsdp=8" in done.stdout and "all-gather" in done.stdout, done.stderr


@needs_libtpu
def test_unknown_topology_is_one_line(model_folder):
    done = plan(model_folder, "--topology=v5e:3x77")
    assert done.returncode == 2 and "error: --topology=v5e:3x77: " in done.stderr and "Traceback" not in done.stderr


def test_what_is_missing_is_one_line(model_folder):
    done = plan(model_folder)
    assert done.returncode == 2 and "error: --topology is needed" in done.stderr
    for unknown in ("gpu:h100", "gpu:h100x0", "gpu:abacusx8"):
        done = plan(model_folder, f"--topology={unknown}")
        assert done.returncode == 2 and "not gpu:KINDxCOUNT with one of the kinds a100, h100, h200" in done.stderr
    if not cuda_plugin:
        done = plan(model_folder, "--topology=gpu:h100x8")
        assert done.returncode == 2 and "error: --topology=gpu:h100x8: the CUDA plug-in is needed" in done.stderr
    done = plan(model_folder, "--topology=v5e:2x2", "--programs=dance")
    assert done.returncode == 2 and "error: --programs: ['dance'] unknown" in done.stderr
