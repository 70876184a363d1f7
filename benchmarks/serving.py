"""How many tokens a second a server hands out to 1, 8 and 32 clients at once.

    python -m roserag_jax.answer --config configs/quickstart.py --config.serve.slots=32 --config.serve.max_tokens=64 \\
        --config.prompt.max_tokens=256 --serve 8000
    python -m benchmarks.serving --url http://127.0.0.1:8000 --model base

Works with any server of OpenAI's chat completions. Every client sends one request with its own seed and waits for the
whole reply; a first round of each number of clients, which may compile, is not timed. Prints one
JSON object for each number of clients: new tokens per second of all of them, prefill and waiting included, and how many
times that of the first number of clients it is.
"""

import argparse
import concurrent.futures
import json
import time

import requests

_WORDS = "moss river tower garden letter winter engine harbour copper island candle valley".split()


def ask(url: str, model: str, seed: int, tokens: int) -> int:
    """Send one request; returns its new tokens."""
    subject = f"the {_WORDS[seed % 12]} and the {_WORDS[seed // 12 % 12]}"
    values = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell a long story about {subject}, in many sentences."}],
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 1,
    }
    reply = requests.post(f"{url}/v1/chat/completions", json=values, timeout=3600)
    reply.raise_for_status()
    return reply.json()["usage"]["completion_tokens"]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--model", default="base", help="the model to ask")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients at once")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of a request")
    parser.add_argument("--repeats", type=int, default=1, help="rounds that are timed; the fastest counts")
    args = parser.parse_args()
    first = None
    for clients in args.clients:
        rates = []
        for _ in range(1 + args.repeats):
            started = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                made = sum(pool.map(lambda seed: ask(args.url, args.model, seed, args.tokens), range(clients)))
            rates.append(made / (time.perf_counter() - started))
        best = max(rates[1:])
        first = first or best
        row = {"clients": clients, "tokens_per_second": round(best, 2), "times": round(best / first, 2)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
