"""New tokens per second of sampling, beside a peer that does the same work in the same run.

    python -m benchmarks.sampling --model PATH --prompts 8 --length 700 --samples 4 --new 64 --peer hf
    python -m benchmarks.sampling --model PATH --prompts 1 --grow

Peers: `hf` is `generate(num_return_sequences=N)` of transformers; `repeated` is this engine with each prompt repeated
N times instead of read once. float32, temperature 1, the whole vocabulary. Prefill is also timed alone, and decoding is
what it leaves of the whole (in which prompts may be read beside decoding), with the share of the machine's measured
limits that they reach: of the matrix-product rate, and in decoding also of the rate at which memory is read, weights
and caches once a step. `--grow` shows instead how both grow with the number of passages, of 130 tokens each. The last
line is one JSON object.
"""

import json

import jax
import numpy as np

from benchmarks import common
from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks

_PASSAGE = 130  # tokens taken for a passage, and for what stands around all of them


def roserag(args, engine, prompts, samples: int):
    """Seconds of prefill and of the whole."""

    def task(i):
        yield PrefillRequest(prompts[i])
        yield DecodeRequest([prompts[i][-1:]] * samples, args.new, SamplingParams(1.0), str(i))

    capacity, classes = DecoderCapacity(len(prompts), samples, ((1, args.new),)), length_classes(map(len, prompts), 1)
    tasks = lambda: [NumberedTask(i, len(prompt), task(i)) for i, prompt in enumerate(prompts)]
    prefill = lambda: jax.block_until_ready([engine.prefill([p]) for p in prompts])
    everything = lambda: list(run_tasks(engine, tasks(), classes, capacity))
    return common.fastest(prefill, args.repeats), common.fastest(everything, args.repeats)


def transformers_generate(args, prompts) -> float:
    """Seconds of the whole by transformers."""
    import torch

    model, tokens = common.reference(args.model), torch.tensor(prompts)
    options = {"do_sample": True, "num_return_sequences": args.samples, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    options |= {"min_new_tokens": args.new, "max_new_tokens": args.new, "pad_token_id": 0}

    def run(tokens):
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    run(tokens[:1, :64])  # it compiles nothing: a short run first is enough
    return common.fastest(lambda: run(tokens), args.repeats, warm=False)


def limits(args, engine, prefill: float, decode: float) -> dict:
    """The shares of the machine's limits that `prefill` and `decode`, in seconds, reach."""
    c, branches = engine.config, args.prompts * args.samples
    of_token = 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim
    weights = 4 * sum(leaf.size for leaf in engine.weights)
    read = args.new * (weights + of_token * (args.prompts * args.length + branches * args.new / 2))
    products = common.matmul_rate()
    of_prompts = common.operations(engine, args.prompts, args.length - 1)
    of_branches = common.operations(engine, branches, args.new, args.length - 1, projected=True)
    return {
        "prefill_s": prefill,
        "decode_s": decode,
        "prefill_share_of_matmul_rate": of_prompts / prefill / products,
        "decode_share_of_matmul_rate": of_branches / decode / products,
        "decode_share_of_memory_rate": read / decode / common.memory_rate(),
    }


def growth(args, engine) -> list[dict]:
    """Time and shares of the limits by number of passages."""
    rows = []
    for passages in (1, 2, 5, 10, 20, 50):
        args.length = _PASSAGE * (passages + 1)
        prompts = common.random_tokens(np.random.default_rng(0), args.prompts, args.length, engine.config.vocab_size)
        prefill, whole = roserag(args, engine, prompts, args.samples)
        row = {"passages": passages, "length": args.length} | limits(args, engine, prefill, whole - prefill)
        rows.append({name: round(value, 3) for name, value in row.items()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=4, help="samples of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a sample")
    parser.add_argument("--peer", default="hf", choices=("hf", "repeated"))
    parser.add_argument("--grow", action="store_true", help="show how time grows with the passages instead")
    args = parser.parse_args()
    engine = common.engine(args)
    if args.grow:
        print(json.dumps({"grow": growth(args, engine), "prompts": args.prompts, "samples": args.samples}))
        return
    prompts = common.random_tokens(np.random.default_rng(0), args.prompts, args.length, engine.config.vocab_size)
    new = args.prompts * args.samples * args.new
    prefill, whole = roserag(args, engine, prompts, args.samples)
    if args.peer == "hf":
        peer = transformers_generate(args, prompts)
    else:
        peer = roserag(args, engine, [p for p in prompts for _ in range(args.samples)], 1)[1]
    result = {"tokens_per_s": new / whole, "peer_tokens_per_s": new / peer, "ratio": peer / whole}
    result |= limits(args, engine, prefill, whole - prefill)
    print(json.dumps({name: round(value, 3) for name, value in result.items()} | vars(args)))


if __name__ == "__main__":
    main()
