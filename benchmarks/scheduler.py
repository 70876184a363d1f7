"""How many tokens a second the scheduler hands out with a network so small that the host is what counts.

    python -m benchmarks.scheduler --slots 64 --branches 4 --tasks 512

Each task prefills a prompt and decodes its branches to limits that differ from task to task, so that slots finish at
all times. Prints one JSON object: new tokens per second of the fastest run, how many steps of all slots it would take
if no slot was ever idle, and new tokens per CPU second of the thread that schedules, in a run where it is one: what it
could hand out if the devices took no time.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.inference.engine import Engine
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks
from roserag_jax.models.config import ModelConfig
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.models.transformer import Transformer

_TINY = ModelConfig(
    family="llama",
    vocab_size=256,
    embed_dim=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    mlp_dim=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
)


def tiny_engine() -> Engine:
    """An engine over random weights that nothing stops."""
    model = Transformer(_TINY, LoRAConfig(), jnp.float32, nnx.Rngs(0))
    return Engine(model, make_mesh(devices=jax.devices()[:1]), (), 0)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=64, help="tasks at a time")
    parser.add_argument("--branches", type=int, default=4, help="branches of a task")
    parser.add_argument("--tasks", type=int, default=512, help="tasks of a run")
    parser.add_argument("--new", type=int, default=64, help="most new tokens of a branch; the fewest are half of it")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=3, help="runs timed, after one that is not; the fastest counts")
    args = parser.parse_args()
    engine, rng = tiny_engine(), np.random.default_rng(0)
    prompts = common.random_tokens(rng, args.tasks, args.prompt, _TINY.vocab_size)
    limits = rng.integers(args.new // 2, args.new + 1, args.tasks).tolist()

    def task(i):
        yield PrefillRequest(prompts[i])
        yield DecodeRequest([prompts[i][-1:]] * args.branches, limits[i], SamplingParams(1.0), str(i))

    def run():
        capacity = DecoderCapacity(args.slots, args.branches, ((1, args.new),))
        tasks = (NumberedTask(i, args.prompt, task(i)) for i in range(args.tasks))
        return list(run_tasks(engine, tasks, length_classes([args.prompt] * args.tasks, 1), capacity))

    tokens, seconds = args.branches * sum(limits), common.fastest(run, args.repeats)
    steps = sum(limits) / args.slots
    engine.decoder_threads = 1  # so that it is this thread that schedules
    run()
    start = time.thread_time()
    run()
    of_host = tokens / (time.thread_time() - start)
    result = {"tokens_per_s": round(tokens / seconds), "seconds": round(seconds, 3), "steps": steps}
    result["tokens_per_host_cpu_s"] = round(of_host)
    print(json.dumps(result | vars(args)))


if __name__ == "__main__":
    main()
