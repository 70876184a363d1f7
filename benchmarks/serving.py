"""How many tokens a second a server hands out to 1, 8 and 32 clients at once.

    python -m roserag_jax.answer --config configs/quickstart.py --config.serve.slots=32 --config.serve.max_tokens=64 \\
        --config.prompt.max_tokens=256 --serve 8000
    python -m benchmarks.serving --url http://127.0.0.1:8000 --model base

Works with any server of OpenAI's chat completions. Every client sends one request with its own seed and waits for the
whole reply; a first round of each number of clients, which may compile, is not timed. Prints one JSON object for each
number of clients: new tokens per second of all of them, prefill and waiting included, how many times that of the first
number of clients it is, and the seconds until the first and the last client has its reply. At the end some of the
requests are sent once more, one at a time: how many texts equal those of the largest round.
"""

import argparse
import concurrent.futures
import json
import time
from typing import NamedTuple

import requests

_WORDS = "moss river tower garden letter winter engine harbour copper island candle valley".split()


class Reply(NamedTuple):
    """A reply's text, its new tokens, and the seconds that it took."""

    text: str
    tokens: int
    seconds: float


def ask(url: str, model: str, seed: int, tokens: int) -> Reply:
    """Send one request and wait for its reply."""
    subject = f"the {_WORDS[seed % 12]} and the {_WORDS[seed // 12 % 12]}"
    values = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell a long story about {subject}, in many sentences."}],
        "max_tokens": tokens,
        "seed": seed,
        "temperature": 1,
    }
    started = time.perf_counter()
    reply = requests.post(f"{url}/v1/chat/completions", json=values, timeout=3600)
    reply.raise_for_status()
    found = reply.json()
    text = found["choices"][0]["message"]["content"]
    return Reply(text, found["usage"]["completion_tokens"], time.perf_counter() - started)


def ask_together(clients: int, *request) -> list[Reply]:
    """Send the requests of so many clients at once; their replies, by seed."""
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        return [*pool.map(lambda seed: ask(*request[:2], seed, *request[2:]), range(clients))]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--model", default="base", help="the model to ask")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="numbers of clients at once")
    parser.add_argument("--tokens", type=int, default=64, help="most new tokens of a request")
    parser.add_argument("--repeats", type=int, default=1, help="rounds that are timed; the fastest counts")
    parser.add_argument("--alone", type=int, default=8, help="requests that are sent once more, one at a time")
    args = parser.parse_args()
    request = (args.url, args.model, args.tokens)
    first, largest = None, []
    for clients in args.clients:
        rounds = []
        for _ in range(1 + args.repeats):
            started = time.perf_counter()
            replies = ask_together(clients, *request)
            rounds.append((time.perf_counter() - started, replies))
        seconds, replies = min(rounds[1:], key=lambda found: found[0])
        largest = max(largest, replies, key=len)
        rate = sum(reply.tokens for reply in replies) / seconds
        first = first or rate
        row = {"clients": clients, "tokens_per_second": round(rate, 2), "times": round(rate / first, 2)}
        taken = [reply.seconds for reply in replies]
        print(
            json.dumps(row | {"first_reply_s": round(min(taken), 2), "last_reply_s": round(max(taken), 2)}), flush=True
        )
    seeds = range(0, len(largest), max(1, len(largest) // args.alone)) if args.alone else ()
    equal = [ask(args.url, args.model, seed, args.tokens).text == largest[seed].text for seed in seeds]
    print(json.dumps({"asked_alone": len(equal), "equal": sum(equal)}))


if __name__ == "__main__":
    main()
