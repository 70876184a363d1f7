"""Pairs per second of the ORPO training step, beside a peer that does the same work in the same run.

    python -m benchmarks.train_step --model PATH --prompt 700 --response 80 --pairs 4 --steps 3 --peer trl
    python -m benchmarks.train_step --model PATH --pairs 1 --steps 1 --grow

Peers: `trl` is the ORPO loss of TRL on a PEFT model (rank 16, all linear layers) with torch AdamW, without the trainer
around it; `repeated` is this project's network with the prompt repeated for chosen and rejected. Tokens are random, the
same for both. float32 on the CPU. `--grow` shows instead how a step's time and the compiler's working memory grow with
the prompt, the response and the vocabulary, on random weights of the model's shape. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import common
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files
from roserag_jax.models.lora import LoRAConfig, LoRAParam
from roserag_jax.models.transformer import Transformer
from roserag_jax.training import losses
from roserag_jax.training.objective import Objective, summed_logprobs
from roserag_jax.training.pair_loader import Pair, Stream
from roserag_jax.training.train_step import TrainStep, adamw

LORA = LoRAConfig(16, 32.0)


def random_pairs(args, vocabulary: int) -> list[Pair]:
    """Pairs of exactly the requested lengths."""
    rng = np.random.default_rng(0)
    tokens = lambda n: rng.integers(100, vocabulary - 100, n).tolist()
    return [Pair(str(i), tokens(args.prompt), tokens(args.response), tokens(args.response)) for i in range(args.pairs)]


def batch_of(pairs: list[Pair]):
    """One batch in which every prompt is whole, also where there is but one and it would count as shared."""
    stream = Stream(pairs, batch=len(pairs), pad_id=0)
    stream.shared_prefix = stream.shared_prefix[:0]
    return stream.collate(0)


def with_adapter(opened):
    """The mesh, and the float32 network on it with a fresh adapter."""
    mesh = make_mesh()
    adapter = loading.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    return mesh, loading.assemble(opened.config, loading.load_base(opened, jnp.float32, mesh), LORA, adapter)


def roserag(args, opened, pairs) -> tuple[list[float], dict]:
    """Seconds of each step, compilation aside, and the first step's metrics."""
    mesh, model = with_adapter(opened)
    step = TrainStep(model, mesh, objective=Objective(remat=args.remat), optimizer=adamw(1e-4, steps=args.steps))
    batch, state, seconds, first = batch_of(pairs), step.init(), [], None
    for number in range(args.steps + 1):
        start = time.monotonic()
        state, metrics = step(state, batch, number)
        jax.block_until_ready(state)
        seconds.append(time.monotonic() - start)
        first = first or {name: float(value) for name, value in metrics.items()}
    return seconds[1:], first


def repeated(args, opened, pairs) -> tuple[list[float], dict]:
    """The same loss and gradient with every prompt read twice."""
    graph, adapter, base = nnx.split(with_adapter(opened)[1], LoRAParam, ...)
    batch = batch_of(pairs)
    twice = lambda a: np.repeat(a, 2, axis=0)
    alone = lambda a: a.reshape(-1, 1, *a.shape[2:])
    batch = batch._replace(
        prompt=twice(batch.prompt),
        prompt_lengths=twice(batch.prompt_lengths),
        branches=alone(batch.branches),
        targets=alone(batch.targets),
        response_lengths=alone(batch.response_lengths),
    )

    def loss(adapter, base):
        sums, _ = summed_logprobs(nnx.merge(graph, adapter, base), batch, remat=args.remat)
        chosen, rejected = (sums / batch.response_lengths).reshape(-1, 2).T
        value, terms = losses.orpo(losses.PairLogprobs(chosen, rejected, log_likelihood=chosen), beta=0.1)
        return value.mean(), jax.tree.map(jnp.mean, terms)

    step, seconds, terms = jax.jit(jax.grad(loss, has_aux=True)), [], None
    for _ in range(args.steps + 1):
        start = time.monotonic()
        _, terms = jax.block_until_ready(step(adapter, base))
        seconds.append(time.monotonic() - start)
    return seconds[1:], {name: float(value) for name, value in terms.items()}


def trl(args, opened, pairs) -> tuple[list[float], dict]:
    """TRL's concatenated forward and ORPO loss, backward, and an AdamW step."""
    return trl_steps(common.reference(args.model), pairs, args.steps)


def trl_steps(model, pairs: list[Pair], steps: int, device: str = "cpu") -> tuple[list[float], dict]:
    """Seconds of each of TRL's steps on a transformers model, the first aside, and the first one's metrics."""
    import peft
    import torch
    from trl.experimental.orpo import ORPOTrainer

    projections = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, projections).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    bare = object.__new__(ORPOTrainer)
    bare.__dict__.update(
        is_encoder_decoder=False,
        padding_value=0,
        aux_loss_enabled=False,
        beta=0.1,
        accelerator=types.SimpleNamespace(device=device, gather_for_metrics=lambda value: value),
        args=types.SimpleNamespace(),
    )
    batch = {}
    for side in ("chosen", "rejected"):
        whole = torch.tensor([pair.prompt + getattr(pair, side) for pair in pairs], device=device)
        labels = whole.clone()
        labels[:, : len(pairs[0].prompt)] = -100
        batch |= {
            f"{side}_input_ids": whole,
            f"{side}_attention_mask": torch.ones_like(whole),
            f"{side}_labels": labels,
        }
    seconds, first = [], None
    try:
        for _ in range(steps + 1):
            start = time.monotonic()
            loss, metrics = bare.get_batch_loss_metrics(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - start)
            first = first or {name: float(value) for name, value in metrics.items()}
    finally:
        model.unload()  # the caller's network is then as it was, also where memory does not suffice
    return seconds[1:], {"log_odds_ratio": first["log_odds_chosen"]}


def growth(args, opened) -> list[dict]:
    """Seconds of a step and its working memory without weights, at lengths and vocabularies around the given ones."""
    vocabulary = opened.config.vocab_size
    points = [(args.prompt * n // 2, args.response, vocabulary) for n in (1, 2, 4, 8)]
    points += [(args.prompt, args.response * n // 2, vocabulary) for n in (1, 4, 8)]
    points += [(args.prompt, args.response, 256_000)]
    rows = []
    for prompt, response, size in points:
        args.prompt, args.response = prompt, response
        config = dataclasses.replace(opened.config, vocab_size=size)
        model = Transformer(config, LORA, jnp.float32, nnx.Rngs(0))
        optimizer = adamw(1e-4, steps=args.steps)
        step = TrainStep(model, make_mesh(), objective=Objective(remat=args.remat), optimizer=optimizer)
        batch, state, seconds = batch_of(random_pairs(args, size)), step.init(), []
        memory = step.memory(batch)
        for number in range(args.steps + 1):
            start = time.monotonic()
            state, _ = jax.block_until_ready(step(state, batch, number))
            seconds.append(time.monotonic() - start)
        row = {"prompt": prompt, "response": response, "vocabulary": size}
        rows.append(row | {"seconds": round(min(seconds[1:]), 2), "working_memory_mb": round(memory / 1e6)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder or .gguf file")
    parser.add_argument("--prompt", type=int, default=700, help="tokens of a prompt")
    parser.add_argument("--response", type=int, default=80, help="tokens of each response")
    parser.add_argument("--pairs", type=int, default=4, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=3, help="steps timed, after one that is not")
    parser.add_argument("--remat", default="dots", choices=("none", "layer", "dots"))
    parser.add_argument("--peer", default="trl", choices=("trl", "repeated"))
    parser.add_argument("--grow", action="store_true", help="show how time and memory grow instead")
    args = parser.parse_args()
    opened = model_files.open_model(args.model)
    if args.grow:
        print(json.dumps({"grow": growth(args, opened), "pairs": args.pairs, "remat": args.remat}))
        return
    pairs = random_pairs(args, opened.config.vocab_size)
    rates, firsts = {}, {}
    for name, run in (("roserag", roserag), (args.peer, {"trl": trl, "repeated": repeated}[args.peer])):
        seconds, first = run(args, opened, pairs)
        rates[name], firsts[name] = args.pairs / float(np.median(seconds)), first["log_odds_ratio"]
        print(f"{name}: {', '.join(f'{s:.1f}' for s in seconds)} s a step; log-odds ratio {firsts[name]:.5f}")
    result = {"pairs_per_s": rates["roserag"], "peer_pairs_per_s": rates[args.peer]}
    result = {name: round(value, 4) for name, value in result.items()}
    print(json.dumps(result | {"ratio": round(rates["roserag"] / rates[args.peer], 2), "peer": args.peer} | vars(args)))


if __name__ == "__main__":
    main()
