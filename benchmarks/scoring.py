"""Scored candidates per second, beside a peer that does the same work in the same run.

    python -m benchmarks.scoring --model PATH --candidates 8 --peer hf

Peers: `hf` is a forward pass of transformers over every prompt with every candidate; `repeated` is this engine with
each prompt repeated for its candidates. float32. The largest difference of the sums is printed. The last line is one
JSON object, with the share of the machine's measured matrix-product rate that scoring reaches.
"""

import json

import numpy as np

from benchmarks import common


def roserag(engine, args, prompts, candidates):
    """Seconds, and the sums [B, N]."""
    run = lambda: engine.score(engine.prefill(prompts, length=args.length - 1), prompts, candidates, args.response)
    return common.fastest(run, args.repeats), run().sum(-1)


def transformers_forward(args, prompts, candidates):
    """Seconds, and the sums [B, N]; a prompt's candidates are one batch, and only their logits are made."""
    import torch

    model = common.reference(args.model)

    def run():
        sums = []
        for prompt, of_prompt in zip(prompts, candidates, strict=True):
            tokens = torch.tensor([prompt + candidate for candidate in of_prompt])
            with torch.no_grad():
                logits = model(tokens, logits_to_keep=args.response + 1).logits[:, :-1]
            logprobs = torch.log_softmax(logits, -1)
            sums.append(logprobs.gather(-1, torch.tensor(of_prompt)[..., None])[..., 0].sum(-1).numpy())
        return np.stack(sums)

    return common.fastest(run, args.repeats), run()


def main() -> None:
    """The command."""
    parser = common.parser(__doc__)
    parser.add_argument("--candidates", type=int, default=8, help="candidates of a prompt")
    parser.add_argument("--response", type=int, default=80, help="tokens of a candidate")
    parser.add_argument("--peer", default="hf", choices=("hf", "repeated"))
    args = parser.parse_args()
    engine, rng = common.engine(args), np.random.default_rng(0)
    prompts = common.random_tokens(rng, args.prompts, args.length, engine.config.vocab_size)
    candidates = [common.random_tokens(rng, args.candidates, args.response, engine.config.vocab_size) for _ in prompts]
    seconds, sums = roserag(engine, args, prompts, candidates)
    if args.peer == "hf":
        peer, peer_sums = transformers_forward(args, prompts, candidates)
    else:
        again = [p for p in prompts for _ in range(args.candidates)]
        peer, peer_sums = roserag(engine, args, again, [[c] for row in candidates for c in row])
        peer_sums = peer_sums.reshape(sums.shape)
    print(f"largest difference of a sum: {np.abs(sums - peer_sums).max():.1e} of about {np.abs(sums).mean():.0f}")
    count = args.prompts * args.candidates
    result = {"candidates_per_s": count / seconds, "peer_candidates_per_s": count / peer, "ratio": peer / seconds}
    work = common.operations(engine, args.prompts, args.length - 1)
    work += common.operations(engine, count, args.response, args.length - 1, projected=True)
    result["share_of_matmul_rate"] = work / seconds / common.matmul_rate()
    print(json.dumps({name: round(value, 3) for name, value in result.items()} | vars(args)))


if __name__ == "__main__":
    main()
