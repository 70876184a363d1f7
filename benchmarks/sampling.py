"""New tokens per second of sampling, beside a peer that does the same work in the same run.

    python -m benchmarks.sampling --model PATH --prompts 8 --length 700 --samples 4 --new 64 --peer hf

Peers: `hf` is `generate(num_return_sequences=N)` of transformers; `repeated` is this engine with each prompt repeated
N times instead of read once. float32, temperature 1, the whole vocabulary. Prefill and decoding are also timed apart,
with the share of the machine's measured limits that they reach: prefill of the matrix-product rate, decoding of the
time that reading the weights and the caches once per step would take. The last line is one JSON object.
"""

import json

import jax
import numpy as np

from benchmarks import common
from roserag_jax.runtime import decoder
from roserag_jax.runtime.decoder import Decode, Read, Room
from roserag_jax.runtime.sampler import Sampling


def ours(args, engine, prompts, samples: int):
    """Seconds of prefill and of the whole."""

    def task(i):
        yield Read(prompts[i])
        yield Decode([prompts[i][-1:]] * samples, args.new, Sampling(1.0), str(i))

    room, numbers = Room(len(prompts), samples, ((1, args.new),)), range(len(prompts))
    read = lambda: jax.block_until_ready([engine.prefill([p], length=args.length - 1) for p in prompts])
    everything = lambda: list(decoder.run(engine, map(task, numbers), [args.length] * len(prompts), room))
    return common.fastest(read, args.repeats), common.fastest(everything, args.repeats)


def transformers_generate(args, prompts) -> float:
    """Seconds of the whole by transformers."""
    import torch

    model, tokens = common.reference(args.model), torch.tensor(prompts)
    options = {"do_sample": True, "num_return_sequences": args.samples, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    options |= {"min_new_tokens": args.new, "max_new_tokens": args.new, "pad_token_id": 0}

    def run():
        with torch.no_grad():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)

    return common.fastest(run, args.repeats)


def main() -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--samples", type=int, default=4, help="samples of a prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a sample")
    parser.add_argument("--peer", default="hf", choices=("hf", "repeated"))
    args = parser.parse_args()
    engine = common.engine(args)
    prompts = common.random_tokens(np.random.default_rng(0), args.prompts, args.length, engine.config.vocab_size)
    new = args.prompts * args.samples * args.new
    prefill, whole = ours(args, engine, prompts, args.samples)
    decode = whole - prefill
    if args.peer == "hf":
        peer = transformers_generate(args, prompts)
    else:
        peer = ours(args, engine, [p for p in prompts for _ in range(args.samples)], 1)[1]

    parameters = common.parameter_count(engine)
    cache = engine.prefill(prompts, length=args.length - 1)
    read = 4 * parameters + cache.k.nbytes + cache.v.nbytes
    flops = 2 * parameters * args.prompts * args.length
    result = {
        "tokens_per_s": new / whole,
        "peer_tokens_per_s": new / peer,
        "ratio": peer / whole,
        "prefill_s": prefill,
        "decode_s": decode,
        "prefill_share_of_matmul_rate": flops / prefill / common.matmul_rate(),
        "decode_share_of_memory_rate": args.new * read / common.memory_rate() / decode,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()} | vars(args)))


if __name__ == "__main__":
    main()
