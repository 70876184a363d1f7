"""What one GPU reaches at the shapes of the paper's models, with random weights in bfloat16, beside torch.

    python -m benchmarks.gpu --model gemma2b --side roserag --output runs/gpu.jsonl
    python -m benchmarks.gpu --table runs/gpu.jsonl

`benchmarks/gpu.sh` runs all of it in under ten minutes. Four kinds of work: the ORPO step (beside TRL on a PEFT model),
prefill, decoding of N samples of each of many prompts (beside `generate(num_return_sequences=N)`), and scoring of eight
responses per prompt. A line of JSON for each says what was done, how fast, on which device, and what share that is of
the matmul rate or the memory rate measured on the same device. What does not fit is halved until it does; the line says
what was run. `--small` shrinks everything, to try the script out on a CPU. It has not been run on a GPU yet.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SHAPES = {
    "gemma2b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "llama1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "qwen1_5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
_SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WORK = ("train", "prefill", "decode", "score")


class Sizes:
    """How much work there is: tokens of prompts and responses, and what is done at a time."""

    def __init__(self, small: bool):
        self.prompt, self.response, self.new = (48, 8, 8) if small else (1536, 192, 128)
        self.pairs, self.prompts, self.scored = (2, 2, 2) if small else (8, 8, 8)
        decodes = [(4, 2), (8, 2)] if small else [(64, 4), (256, 4), (64, 8), (256, 8)]
        self.decodes = decodes  # slots and samples of each
        self.steps = 1 if small else 3

    def random_pairs(self, count: int, tokens: Callable) -> list:
        """Pairs of these lengths, of `tokens(rows, length)`."""
        from roserag_jax.training.pair_loader import Pair

        lengths = self.prompt, self.response, self.response
        return [Pair(str(i), *(tokens(1, length)[0] for length in lengths)) for i in range(count)]


def config_folder(model: str, small: bool) -> Path:
    """A folder with the model's config.json alone."""
    folder = Path(tempfile.mkdtemp())
    shape = {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | SHAPES[model]
    (folder / "config.json").write_text(json.dumps(shape | (_SMALL if small else {})))
    return folder


def halving(count: int, run: Callable[[int], dict]) -> dict:
    """Run with `count` at a time, or half as many until it fits."""
    while True:
        try:
            return run(count)
        except Exception as error:  # jax and torch have errors of their own for it
            if count == 1 or not any(word in str(error).lower() for word in ("resource_exhausted", "out of memory")):
                raise
        count //= 2


def roserag(folder: Path, sizes: Sizes, work: list[str]) -> Iterator[dict]:
    """Our rows."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from benchmarks import common, train_step
    from roserag_jax.distributed.mesh import make_mesh
    from roserag_jax.hub import loading, model_files
    from roserag_jax.inference.engine import Engine
    from roserag_jax.inference.requests import DecoderCapacity, DecodeRequest, PrefillRequest
    from roserag_jax.inference.sampling import SamplingParams
    from roserag_jax.inference.scheduler import NumberedTask, length_classes, run_tasks
    from roserag_jax.models.lora import LoRAConfig
    from roserag_jax.models.transformer import Transformer
    from roserag_jax.training.objective import Objective
    from roserag_jax.training.train_step import TrainStep, adamw

    _, config = model_files.read_config(str(folder))
    mesh, rng = make_mesh(devices=jax.devices()[:1]), np.random.default_rng(0)
    matmul_rate = common.matmul_rate(size=1024 if sizes.prompt < 100 else 8192, dtype=jnp.bfloat16)
    memory_rate = common.memory_rate(64 if sizes.prompt < 100 else 2048)
    device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    device |= {"matmul_tflops": round(matmul_rate / 1e12, 2), "memory_gb_per_s": round(memory_rate / 1e9, 1)}
    model = Transformer(config, LoRAConfig(), jnp.bfloat16, nnx.Rngs(0))
    engine = Engine(model, mesh, (), 0)
    tokens = lambda rows, length: common.random_tokens(rng, rows, length, config.vocab_size)

    if "train" in work:
        base = nnx.state(model)
        adapter = loading.init_adapter(config, train_step.LORA, mesh, jax.random.key(0))

        def train(pairs):
            rows = sizes.random_pairs(pairs, tokens)
            whole = loading.assemble(config, base, train_step.LORA, adapter)
            step = TrainStep(whole, mesh, objective=Objective(remat="layer"), optimizer=adamw(1e-4, steps=10))
            batch, state, seconds = train_step.batch_of(rows), step.init(), []
            for number in range(sizes.steps + 1):
                start = time.monotonic()
                state, _ = jax.block_until_ready(step(state, batch, number))
                seconds.append(time.monotonic() - start)
            second = min(seconds[1:])
            done = {"pairs_per_s": pairs / second, "compile_s": seconds[0] - second}
            return done | {"pairs": pairs, "mfu": step.flops(batch) / second / matmul_rate}

        yield {"work": "train"} | halving(sizes.pairs, train) | device
    if "prefill" in work:

        def prefill(prompts):
            rows = tokens(prompts, sizes.prompt)
            seconds = common.fastest(lambda: jax.block_until_ready(engine.prefill(rows)), 3)
            flops = common.operations(engine, prompts, sizes.prompt - 1)
            done = {"tokens_per_s": prompts * sizes.prompt / seconds, "prompts": prompts}
            return done | {"share_of_matmul_rate": flops / seconds / matmul_rate}

        yield {"work": "prefill"} | halving(sizes.prompts, prefill) | device
    for slots, samples in sizes.decodes if "decode" in work else ():

        def decode(slots, samples=samples):
            prompts = tokens(slots, sizes.prompt)

            def task(i, new):
                yield PrefillRequest(prompts[i])
                yield DecodeRequest([prompts[i][-1:]] * samples, new, SamplingParams(1.0), str(i))

            def run(new):
                capacity = DecoderCapacity(slots, samples, ((1, sizes.new),))
                tasks = (NumberedTask(i, sizes.prompt, task(i, new)) for i in range(slots))
                start = time.monotonic()
                list(run_tasks(engine, tasks, length_classes([sizes.prompt] * slots, 1), capacity))
                return time.monotonic() - start

            run(1)
            prefilled, whole = run(1), run(sizes.new)
            seconds, c = whole - prefilled, config
            token = 2 * 2 * c.num_layers * c.num_kv_heads * c.head_dim
            weights = sum(leaf.nbytes for leaf in engine.weights)
            read = sizes.new * (weights + token * slots * (sizes.prompt + samples * sizes.new / 2))
            done = {"tokens_per_s": slots * samples * sizes.new / seconds, "slots": slots, "samples": samples}
            return done | {"prefill_s": prefilled, "share_of_memory_rate": read / seconds / memory_rate}

        yield {"work": "decode"} | halving(slots, decode) | device
    if "score" in work:

        def score(prompts):
            rows = tokens(prompts, sizes.prompt)
            responses = [tokens(sizes.scored, sizes.response) for _ in rows]
            run = lambda: engine.score(engine.prefill(rows), rows, responses, sizes.response)
            seconds = common.fastest(run, 2)
            return {"responses_per_s": prompts * sizes.scored / seconds, "prompts": prompts, "each": sizes.scored}

        yield {"work": "score"} | halving(sizes.prompts, score) | device


def torch_peer(folder: Path, sizes: Sizes, work: list[str]) -> Iterator[dict]:
    """The rows of transformers, and of TRL with PEFT."""
    import torch
    import transformers

    from benchmarks import train_step

    place, rng = "cuda" if torch.cuda.is_available() else "cpu", np.random.default_rng(0)
    name = torch.cuda.get_device_name() if place == "cuda" else "cpu"
    device = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device(place):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    tokens = lambda rows, length: rng.integers(100, config.vocab_size - 100, (rows, length)).tolist()

    def seconds_of(run) -> float:
        seconds = []
        for _ in range(3):
            start = time.monotonic()
            run()
            if place == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - start)
        return min(seconds[1:])

    if "prefill" in work:

        def prefill(prompts):
            rows = torch.tensor(tokens(prompts, sizes.prompt), device=place)
            with torch.no_grad():
                seconds = seconds_of(lambda: model(rows, use_cache=True, logits_to_keep=1))
            return {"tokens_per_s": prompts * sizes.prompt / seconds, "prompts": prompts}

        yield {"work": "prefill"} | halving(sizes.prompts, prefill) | device
    for slots, samples in sizes.decodes if "decode" in work else ():

        def decode(prompts, samples=samples):
            rows = torch.tensor(tokens(prompts, sizes.prompt), device=place)
            options = {"do_sample": True, "num_return_sequences": samples, "top_k": 0, "pad_token_id": 0}
            options |= {"min_new_tokens": sizes.new, "max_new_tokens": sizes.new}
            start = time.monotonic()
            with torch.no_grad():
                model.generate(rows, attention_mask=torch.ones_like(rows), **options)
            if place == "cuda":
                torch.cuda.synchronize()
            seconds = time.monotonic() - start
            done = {"tokens_per_s_with_prefill": prompts * samples * sizes.new / seconds}
            return done | {"slots": prompts, "samples": samples}

        yield {"work": "decode"} | halving(slots, decode) | device
    if "score" in work:

        def score(prompts):
            rows = torch.tensor(tokens(prompts * sizes.scored, sizes.prompt + sizes.response), device=place)

            def run():
                for some in rows.split(sizes.scored):
                    with torch.no_grad():
                        logits = model(some, logits_to_keep=sizes.response + 1).logits[:, :-1]
                    torch.log_softmax(logits.float(), -1).gather(-1, some[:, -sizes.response :, None]).sum()

            return {"responses_per_s": len(rows) / seconds_of(run), "prompts": prompts, "each": sizes.scored}

        yield {"work": "score"} | halving(sizes.prompts, score) | device
    if "train" in work:

        def train(pairs):
            rows = sizes.random_pairs(pairs, tokens)
            model.gradient_checkpointing_enable()
            seconds, _ = train_step.trl_steps(model, rows, sizes.steps, place)
            return {"pairs_per_s": pairs / min(seconds), "pairs": pairs}

        yield {"work": "train"} | halving(sizes.pairs, train) | device


def table(rows: list[dict]) -> str:
    """A row of Markdown for each kind of work of each model: ours, torch's, and the ratio."""
    rate = lambda row: next(v for name, v in row.items() if name.endswith(("_per_s", "_with_prefill")))
    key = lambda row: (row["model"], row["work"], row.get("wanted", ""))
    sides = {side: {key(row): row for row in rows if row["side"] == side} for side in ("roserag", "torch")}
    lines = ["| model | work | roserag_jax | share | torch | ratio |", "|---|---|---|---|---|---|"]
    for (model, work, _), row in sides["roserag"].items():
        counts = [name for name in ("pairs", "prompts", "slots", "samples", "each") if name in row]
        size = ", ".join(f"{row[name]} {name}" for name in counts)
        share = next((v for name, v in row.items() if name == "mfu" or name.startswith("share_")), None)
        ours, peer = rate(row), sides["torch"].get(key(row))
        if work == "decode":  # torch's time has the prefill in it, so ours takes it too
            new = row["slots"] * row["samples"] * row["new"]
            ours = new / (new / ours + row["prefill_s"])
        theirs = f"{rate(peer):.4g}" if peer else "-"
        ratio = f"{ours / rate(peer):.2f}" if peer else "-"
        shown = f"{share:.0%}" if share is not None else "-"
        lines.append(f"| {model} | {work} ({size}) | {ours:.4g}/s | {shown} | {theirs} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, help="shape of a model of the paper")
    parser.add_argument("--side", choices=("roserag", "torch"), default="roserag")
    parser.add_argument("--work", default=",".join(WORK), help="kinds of work, separated by commas")
    parser.add_argument("--output", type=Path, help="file of JSON lines to append to")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to try the script out")
    parser.add_argument("--table", type=Path, help="print the table of a file of JSON lines, and nothing else")
    args = parser.parse_args()
    if args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    sizes, folder = Sizes(args.small), config_folder(args.model, args.small)
    side = {"roserag": roserag, "torch": torch_peer}[args.side]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"model": args.model, "side": args.side, "command": " ".join(sys.argv[1:]), "commit": commit}
    about |= {"prompt": sizes.prompt, "response": sizes.response, "new": sizes.new}
    decodes = iter(sizes.decodes)
    for row in side(folder, sizes, args.work.split(",")):
        wanted = {"wanted": "x".join(map(str, next(decodes)))} if row["work"] == "decode" else {}
        rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in row.items()}
        line = json.dumps(about | rounded | wanted)
        print(line, flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
