"""Retrieval: an index of many passages, retrievers side by side on real questions, and torch on the same work.

    python -m benchmarks.retrieval corpus [--passages 100000]
    python -m benchmarks.retrieval compare --data FOLDER --encoder FOLDER [--questions 250] [--own] [--whole]
        [--folder KEPT]
    python -m benchmarks.retrieval speed --encoder FOLDER [--passages 256]

`corpus` makes passages of 100 words whose frequencies fall as those of words do, indexes them and asks questions, in a
process of its own.
`compare` takes the questions, gold passages and corpus of a data set (eval.jsonl.gz, corpus.jsonl.gz) and a sentence
encoder; ColBERT's place is taken by the same encoder with a drawn projection to 128 dimensions, which nobody has
trained, and without `--whole` it encodes only what BM25 finds. The cheapest come first. With `--folder` the vectors are
kept, and a run that was stopped resumes. `speed` encodes and compares passages with that checkpoint here and in torch,
in turns, the shortest of three times counting: run it on a quiet machine. CPU seconds are those of the process, which
other work on the machine changes less than the clock. The last line is one JSON object.
"""

import argparse
import contextlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from roserag_jax.hub.encoder import read_bert_config
from roserag_jax.models.bert import BertConfig
from roserag_jax.rag.corpora import Corpus
from roserag_jax.rag.files import read_rows
from roserag_jax.retrieval import indexing, vector_indexing
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.colbert import ColBERT, passage_text
from roserag_jax.retrieval.combined import Fusion, Reranker, maxsim, pad
from roserag_jax.retrieval.dense import SentenceEncoder, read_settings
from roserag_jax.retrieval.index import Index, disk_size
from roserag_jax.retrieval.vectors import VectorRetriever, VectorStore, open_shards


def write_corpus(file: Path, count: int) -> list[str]:
    """Write passages of 100 words; returns questions of 8 words of one of them each."""
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i:x}" for i in range(200_000)])
    draw = lambda n: vocabulary[np.minimum(rng.zipf(1.2, n), len(vocabulary)) - 1]
    questions = []
    with file.open("w") as stream:
        for i in range(count):
            words = draw(100)
            stream.write(json.dumps({"id": str(i), "contents": f"T{i}\n{' '.join(words)}"}) + "\n")
            if i % max(1, count // 50) == 0:
                questions.append(" ".join(rng.choice(words, 8)))
    return questions


_OPENING = """
import json, re, sys, time
from pathlib import Path
from roserag_jax.retrieval.index import Index
# Not getrusage's, which begins with the parent's.
memory = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
start = time.monotonic()
index = Index(Path(sys.argv[1]))
made, questions = {"opening_seconds": time.monotonic() - start, "memory_opened": memory()}, json.loads(sys.argv[2])
start, cpu = time.monotonic(), time.process_time()
for question in questions:
    assert index.search([question], 10)[0]
each = lambda seconds: 1000 * seconds / len(questions)
made |= {"question_ms": each(time.monotonic() - start), "question_cpu_ms": each(time.process_time() - cpu)}
print(json.dumps(made | {"memory_asked": memory()}))
"""


def corpus(args) -> dict:
    """Index a made corpus, open it and ask."""
    with tempfile.TemporaryDirectory(dir=args.folder or None) as home:
        home = Path(home)
        questions = write_corpus(home / "corpus.jsonl", args.passages)
        start, cpu = time.monotonic(), time.process_time()
        indexing.update(home / "index", Corpus(str(home / "corpus.jsonl")))
        built = {"build_seconds": time.monotonic() - start, "build_cpu_seconds": time.process_time() - cpu}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        line = [sys.executable, "-c", _OPENING, str(home / "index"), json.dumps(questions)]
        opened = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)
        disk = disk_size(home / "index")
    return {
        "passages": args.passages,
        **built,
        "peak_memory_bytes": memory,
        **opened,
        "bytes_per_passage": disk / args.passages,
    }


def write_colbert(encoder: Path, folder: Path) -> Path:
    """Write a checkpoint of ColBERT's shape: a sentence encoder with a drawn projection to 128 dimensions."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(encoder, folder, ignore=shutil.ignore_patterns("*.json.md", "modules.json", "1_*"))
    (folder / "config_sentence_transformers.json").unlink(missing_ok=True)
    tensors = {f"bert.{name}": array for name, array in load_file(encoder / "model.safetensors").items()}
    width = tensors["bert.embeddings.word_embeddings.weight"].shape[1]
    tensors["linear.weight"] = np.random.default_rng(0).normal(size=(128, width)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


class Known:
    """An encoder whose passages were encoded before, so that a compression or an order costs its own time alone.

    Args:
      folder: of the index's vectors in float16, which are made there first; a run that was stopped resumes.
    """

    def __init__(self, encoder, index: Index, folder: Path, name: str, normalized: bool):
        self.encoder, self.size, self.folder, self.normalized = encoder, encoder.size, folder, normalized
        there, start, cpu = len(self._numbers()), time.monotonic(), time.process_time()
        how = {"fingerprint": name, "bits": 0, "normalized": normalized}
        vector_indexing.update(folder, index, lambda: encoder, **how)
        made = len(self._numbers()) - there
        self.rates = {}
        if made:
            seconds, cpu = time.monotonic() - start, time.process_time() - cpu
            self.rates = {"passages": made, "per_second": made / seconds, "per_cpu_second": made / cpu}
            print(name, self.rates, flush=True)
        self.known = {}
        for shard in open_shards(folder):
            for number, low, high in zip(shard.numbers, shard.offsets, shard.offsets[1:], strict=False):
                passage = index.passages[int(np.searchsorted(index.passages.numbers, number))]
                self.known[passage["title"], passage["text"]] = shard.stored[0][low:high]

    def _numbers(self) -> list[int]:
        return [number for shard in open_shards(self.folder) for number in shard.numbers]

    def encode_queries(self, queries):
        """The encoder's."""
        return self.encoder.encode_queries(queries)

    def encode_passages(self, passages):
        """Those that are known."""
        return [self.known[p["title"], p["text"]].astype(np.float32) for p in passages]


def _write_rows(file: Path, passages: list[dict]) -> str:
    """Write the different ones of some passages as a corpus."""
    rows = sorted({(passage["title"], passage["text"]) for passage in passages})
    file.write_text("".join(json.dumps({"title": title, "text": text}) + "\n" for title, text in rows))
    return str(file)


def compare(args) -> dict:
    """Recall, time and bytes of each retriever over the same passages and questions."""
    questions = [row for _, row in read_rows(epath.Path(args.data) / "eval.jsonl.gz")][: args.questions]
    asked = [row["question"] for row in questions]
    gold = [{c["title"] for c in row["contexts"] if c["is_supporting"]} for row in questions]
    table = {"questions": len(questions), "rows": {}}

    def recall(found, k):
        pairs = zip(gold, found, strict=True)
        return round(100 * float(np.mean([len(g & {c["title"] for c in f[:k]}) / len(g) for g, f in pairs])), 1)

    def add(label, retriever, size=None):
        retriever.search(asked, 10)  # compiles
        start, cpu = time.monotonic(), time.process_time()
        found = retriever.search(asked, 10)
        each = lambda seconds: round(1000 * seconds / len(asked), 1)
        row = {f"recall@{k}": recall(found, k) for k in (2, 5, 10)}
        row |= {"question_ms": each(time.monotonic() - start), "question_cpu_ms": each(time.process_time() - cpu)}
        table["rows"][label] = row | ({"bytes_per_passage": round(size / len(index))} if size else {})
        print(label, table["rows"][label], flush=True)
        return retriever

    with contextlib.ExitStack() as stack:
        home = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        start = time.monotonic()
        searched = str(Path(args.data) / "corpus.jsonl.gz")
        if args.own:
            searched = _write_rows(home / "corpus.jsonl", [c for row in questions for c in row["contexts"]])
        index = indexing.update(home / "index", Corpus(searched))
        table |= {"passages": len(index), "index_seconds": round(time.monotonic() - start, 1)}
        bm25 = add("bm25", index, disk_size(home / "index"))
        table["bm25_recall"] = {k: recall(index.search(asked, k), k) for k in (20, 30, 50, 100, 200)}
        if not (home / "colbert").exists():
            write_colbert(Path(args.encoder), home / "colbert")
        colbert = ColBERT(home / "colbert", local_mesh())

        encoded, name = index, "colbert-0"
        if not args.whole:
            found = {
                (c["title"], c["text"]) for contexts in index.search(asked, max(args.candidates)) for c in contexts
            }
            (home / "candidates.jsonl").write_text(
                "".join(json.dumps({"title": a, "text": b}) + "\n" for a, b in sorted(found))
            )
            encoded, name = indexing.update(home / "few", Corpus(str(home / "candidates.jsonl"))), "colbert-few"
        known = Known(colbert, encoded, home / name, "colbert", True)
        table["colbert_encoding"] = known.rates
        for candidates in args.candidates:
            add(f"bm25, then colbert-shaped of {candidates}, known vectors", Reranker(bm25, known, candidates))
        start, cpu, few = time.monotonic(), time.process_time(), asked[:20]
        reranker = Reranker(bm25, colbert, max(args.candidates))
        reranker.search(few, 10)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        table["rerank_with_encoding"] = {
            "candidates": max(args.candidates),
            "question_ms": 1000 * seconds / len(few),
            "question_cpu_ms": 1000 * cpu / len(few),
            "passages_encoded": len(reranker._vectors),
        }
        print("rerank_with_encoding", table["rerank_with_encoding"], flush=True)
        settings = read_settings(Path(args.encoder))
        sentences = SentenceEncoder(Path(args.encoder), local_mesh(), settings)

        def by_vectors(label, known, folder, probe=0):
            store = VectorStore(folder, index.passages.numbers, local_mesh(), known.normalized)
            size = sum(file.stat().st_size for file in folder.glob("*.np*"))
            return add(label + f", probe {probe}" * bool(probe), VectorRetriever(index, known, store, probe), size)

        encoded_once = Known(sentences, index, home / "dense", "dense", settings.normalized)
        table["dense_encoding"] = encoded_once.rates
        dense = by_vectors("dense", encoded_once, home / "dense")
        for candidates in (max(args.candidates), 100):
            add(f"hybrid of bm25 and dense, {candidates} of each", Fusion([bm25, dense], candidates))
        if args.whole:
            by_vectors("colbert-shaped", known, home / name)
        for bits in args.bits if args.whole else ():
            folder, start = home / f"colbert-{bits}", time.monotonic()
            how = {"fingerprint": "colbert", "bits": bits, "normalized": True}
            vector_indexing.update(folder, index, lambda: known, **how)
            print(f"{bits} bits: {time.monotonic() - start:.0f} s to compress", flush=True)
            by_vectors(f"colbert-shaped, {bits} bits", known, folder)
            if bits == 2:
                by_vectors("colbert-shaped, 2 bits", known, folder, probe=8)
    return table


def speed(args) -> dict:
    """Encode passages and compare queries with them, here and in torch, in turns."""
    import torch
    import transformers

    rows = [row for _, row in read_rows(epath.Path(args.data) / "corpus.jsonl.gz")][: args.passages]
    passages = [{"title": "", "text": row["contents"]} for row in rows]
    with tempfile.TemporaryDirectory() as home:
        folder = write_colbert(Path(args.encoder), Path(home) / "colbert")
        colbert = ColBERT(folder, local_mesh())
        model = transformers.BertModel.from_pretrained(args.encoder, add_pooling_layer=False).eval()
        weight = torch.tensor(np.asarray(colbert.encoder.array))
    texts = [passage_text(p) for p in passages]

    def in_torch():
        """As ColBERT's own code: sorted by length, batches of 32, each padded to its longest."""
        tokenized = colbert._tokenize(texts, colbert.passage_length, colbert.passage_marker)
        order, vectors = sorted(range(len(tokenized)), key=lambda i: len(tokenized[i])), [None] * len(tokenized)
        for start in range(0, len(order), 32):
            batch = [torch.tensor(tokenized[i]) for i in order[start : start + 32]]
            tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            mask = (torch.arange(tokens.shape[1]) < torch.tensor([len(b) for b in batch])[:, None]).long()
            with torch.inference_mode():
                hidden = model(tokens, attention_mask=mask).last_hidden_state
                found = torch.nn.functional.normalize(hidden @ weight.T, dim=-1).numpy()
            for i, row in zip(order[start : start + 32], found, strict=True):
                kept = ~np.isin(tokenized[i], colbert.skipped)
                vectors[i] = row[: len(kept)][kept]
        return vectors

    colbert.encode_passages(passages)  # compiles
    (ours_s, ours), (torch_s, theirs) = _in_turns(lambda: colbert.encode_passages(passages), in_torch)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))
    queries = colbert.encode_queries([text[:60] for text in texts[:16]])
    padded, lengths = pad(ours)
    kept = np.arange(padded.shape[1]) < lengths[:, None]

    def torch_maxsim():
        with torch.inference_mode():
            similar = torch.einsum("qwz,rvz->qrwv", torch.tensor(queries), torch.tensor(padded))
            similar.masked_fill_(~torch.tensor(kept)[None, :, None], -9999)
            return similar.amax(-1).sum(-1).numpy()

    compiled = jax.jit(maxsim)
    np.asarray(compiled(queries, padded, kept))
    (maxsim_s, mine), (torch_maxsim_s, other) = _in_turns(
        lambda: np.asarray(compiled(queries, padded, kept)), torch_maxsim
    )
    pieces = [len(ids) for ids in colbert._tokenize(texts, colbert.passage_length, colbert.passage_marker)]
    flops, rates = _encoder_flops(read_bert_config(Path(args.encoder)), pieces), _matmul_rates(model.config.hidden_size)
    return {
        "passages": len(passages),
        "passages_per_second": len(passages) / ours_s,
        "torch_passages_per_second": len(passages) / torch_s,
        "encoding_ratio": torch_s / ours_s,
        "matmul_gflops": rates[0] / 1e9,
        "torch_matmul_gflops": rates[1] / 1e9,
        "encoding_of_matmul_rate": flops / ours_s / rates[0],
        "torch_encoding_of_matmul_rate": flops / torch_s / rates[1],
        "queries_per_second": len(queries) / maxsim_s,
        "torch_queries_per_second": len(queries) / torch_maxsim_s,
        "maxsim_ratio": torch_maxsim_s / maxsim_s,
        "largest_difference": max(difference, float(np.abs(mine - other).max())),
    }


def _in_turns(*runs, rounds: int = 3) -> list[tuple[float, object]]:
    """The shortest time of each, and its result; one after the other, several times."""
    times, results = [[] for _ in runs], [None for _ in runs]
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.monotonic()
            results[i] = run()
            times[i].append(time.monotonic() - start)
    return [(min(each), result) for each, result in zip(times, results, strict=True)]


def _encoder_flops(config: BertConfig, lengths: list[int]) -> float:
    """Operations of the matmuls that texts of so many word pieces need, padding not counted."""
    D, each = config.embed_dim, 4 * config.embed_dim**2 + 2 * config.embed_dim * config.mlp_dim
    return config.num_layers * sum(2 * n * each + 4 * n * n * D for n in lengths)


def _matmul_rates(D: int) -> tuple[float, float]:
    """Operations a second of the MLP's first matmul alone, here and in torch, on 1,024 word pieces."""
    import torch

    x, weight = np.ones((1024, D), np.float32), np.ones((4 * D, D), np.float32)
    matmul, operands, tensors = jax.jit(lambda x, w: x @ w.T), (jnp.asarray(x), jnp.asarray(weight)), (x, weight)
    tensors = tuple(map(torch.tensor, tensors))

    def here():
        for _ in range(100):
            matmul(*operands).block_until_ready()

    def in_torch():
        with torch.inference_mode():
            for _ in range(100):
                torch.nn.functional.linear(*tensors)

    here()
    (ours, _), (theirs, _) = _in_turns(here, in_torch)
    return tuple(100 * 2 * x.size * 4 * D / seconds for seconds in (ours, theirs))


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "compare", "speed"))
    parser.add_argument("--passages", type=int, default=None, help="passages to make, or to encode")
    parser.add_argument("--questions", type=int, default=250)
    parser.add_argument("--own", action="store_true", help="search the passages of the questions' own rows alone")
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 20, 30], help="passages that are ordered")
    parser.add_argument("--whole", action="store_true", help="ColBERT's vectors of the whole corpus, not of candidates")
    parser.add_argument("--bits", type=int, nargs="*", default=[], help="compressions to try, of 4, 2 and 1")
    parser.add_argument("--encoder", help="folder of a sentence encoder in safetensors")
    parser.add_argument("--data", default="../shared/data/hotpotqa")
    parser.add_argument("--folder", help="where files go; those of `compare` are kept there")
    args = parser.parse_args()
    args.passages = args.passages or {"corpus": 100_000}.get(args.what, 256)
    if args.folder:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    print(json.dumps({"corpus": corpus, "compare": compare, "speed": speed}[args.what](args)))


if __name__ == "__main__":
    main()
