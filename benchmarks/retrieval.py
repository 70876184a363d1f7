"""Retrieval: an index of many passages, retrievers side by side on real questions, and torch on the same work.

    python -m benchmarks.retrieval corpus [--passages 100000]
    python -m benchmarks.retrieval compare --data FOLDER --encoder FOLDER [--questions 80] [--others 0]
    python -m benchmarks.retrieval speed --encoder FOLDER [--passages 256]

`corpus` makes passages of 100 words whose frequencies fall as those of words do, indexes them and asks questions.
`compare` takes the questions, gold passages and corpus of a data set (eval.jsonl.gz, corpus.jsonl.gz) and a sentence
encoder; ColBERT's place is taken by the same encoder with a drawn projection to 128 dimensions, which nobody has
trained. `speed` encodes and compares passages with that checkpoint here and in torch. Times are CPU seconds of the
process, which other work on the machine changes less than the clock. The last line is one JSON object.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from etils import epath

from roserag_jax.rag.corpora import Corpus
from roserag_jax.rag.files import read_rows
from roserag_jax.retrieval import indexing, vector_indexing
from roserag_jax.retrieval.batches import local_mesh
from roserag_jax.retrieval.colbert import ColBERT, passage_text
from roserag_jax.retrieval.combined import Fusion, Reranker, maxsim, pad
from roserag_jax.retrieval.dense import SentenceEncoder, read_settings
from roserag_jax.retrieval.index import Index
from roserag_jax.retrieval.vectors import VectorRetriever, VectorStore


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


def _bytes(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())


def corpus(args) -> dict:
    """Index a made corpus, open it and ask."""
    with tempfile.TemporaryDirectory(dir=args.folder or None) as home:
        home = Path(home)
        questions = write_corpus(home / "corpus.jsonl", args.passages)
        start, cpu = time.monotonic(), time.process_time()
        indexing.update(home / "index", Corpus(str(home / "corpus.jsonl")))
        built = {"build_seconds": time.monotonic() - start, "build_cpu_seconds": time.process_time() - cpu}
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        start = time.monotonic()
        index = Index(home / "index")
        opening, cpu = time.monotonic() - start, time.process_time()
        for question in questions:
            assert index.search([question], 10)[0]
        asked = 1000 * (time.process_time() - cpu) / len(questions)
        disk = _bytes(home / "index")
    more = {"opening_seconds": opening, "question_cpu_ms": asked, "bytes_per_passage": disk / args.passages}
    return {"passages": args.passages, **built, "peak_memory_bytes": memory, **more}


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
    """An encoder whose passages were encoded before, so that each compression costs its own time alone."""

    def __init__(self, encoder, passages: list[dict]):
        self.encoder, self.size = encoder, encoder.size
        cpu = time.process_time()
        vectors = encoder.encode_passages(passages)
        self.seconds = time.process_time() - cpu
        self.known = {(p["title"], p["text"]): v for p, v in zip(passages, vectors, strict=True)}

    def encode_queries(self, queries):
        """The encoder's."""
        return self.encoder.encode_queries(queries)

    def encode_passages(self, passages):
        """Those that are known."""
        return [self.known[p["title"], p["text"]] for p in passages]


def compare(args) -> dict:
    """Recall, time and bytes of each retriever over the same passages and questions."""
    questions = [row for _, row in read_rows(epath.Path(args.data) / "eval.jsonl.gz")][: args.questions]
    passages = {(c["title"], c["text"]) for row in questions for c in row["contexts"]}
    others = (p for p in Corpus(str(Path(args.data) / "corpus.jsonl.gz")).passages())
    for passage in others if args.others else ():
        passages.add((passage["title"], passage["text"]))
        if len(passages) >= args.others:
            break
    asked = [row["question"] for row in questions]
    gold = [{c["title"] for c in row["contexts"] if c["is_supporting"]} for row in questions]
    table = {"passages": len(passages), "questions": len(questions), "candidates": args.candidates, "rows": {}}

    def add(label, retriever, size, built):
        retriever.search(asked, 10)  # compiles
        cpu = time.process_time()
        found = retriever.search(asked, 10)
        each = 1000 * (time.process_time() - cpu) / len(asked)
        pairs = list(zip(gold, found, strict=True))
        recall = lambda k: 100 * float(np.mean([len(g & {c["title"] for c in f[:k]}) / len(g) for g, f in pairs]))
        row = {f"recall@{k}": round(recall(k), 1) for k in (2, 5, 10)}
        row |= {"build_cpu_seconds": round(built, 1), "question_cpu_ms": round(each, 1)}
        table["rows"][label] = row | {"bytes_per_passage": round(size / len(passages))}
        print(label, table["rows"][label], flush=True)
        return retriever

    with tempfile.TemporaryDirectory(dir=args.folder or None) as home:
        home = Path(home)
        rows = ({"title": title, "text": text} for title, text in sorted(passages))
        (home / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        cpu = time.process_time()
        indexing.update(home / "index", Corpus(str(home / "corpus.jsonl")))
        index = Index(home / "index")
        bm25 = add("bm25", index, _bytes(home / "index"), time.process_time() - cpu)
        settings = read_settings(Path(args.encoder))
        dense = SentenceEncoder(Path(args.encoder), local_mesh(), settings)
        colbert = ColBERT(write_colbert(Path(args.encoder), home / "colbert"), local_mesh())

        def store(name, encoder, bits, probe=0, normalized=True):
            cpu = time.process_time()
            folder = home / f"{name}-{bits}"
            how = {"fingerprint": name, "bits": bits, "normalized": normalized}
            vector_indexing.update(folder, index, lambda: encoder, **how)
            built = encoder.seconds + time.process_time() - cpu
            retriever = VectorRetriever(
                index, encoder, VectorStore(folder, index.passages.numbers, local_mesh(), normalized), probe
            )
            label = name + f", {bits} bits" * bool(bits) + f", probe {probe}" * bool(probe)
            return add(label, retriever, sum(entry.stat().st_size for entry in folder.glob("*.np*")), built)

        known = Known(dense, list(index.passages))
        first = store("dense", known, 0, normalized=settings.normalized)
        add("hybrid of bm25 and dense", Fusion([bm25, first], args.candidates), 0, 0.0)
        known = Known(colbert, list(index.passages))
        for bits in (0, 4, 2, 1):
            store("colbert-shaped", known, bits)
        store("colbert-shaped", known, 2, probe=8)
        add("bm25, then colbert-shaped, known vectors", Reranker(bm25, known, args.candidates), 0, 0.0)
        cpu = time.process_time()
        Reranker(bm25, colbert, args.candidates).search(asked[:2], 10)
        table["rerank_question_cpu_ms"] = 500 * (time.process_time() - cpu)
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

    def seconds(run):
        start = time.process_time()
        result = run()
        return time.process_time() - start, result

    colbert.encode_passages(passages)  # compiles
    _, theirs = seconds(in_torch)
    ours_s, ours = seconds(lambda: colbert.encode_passages(passages))
    torch_s, theirs = seconds(in_torch)
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
    maxsim_s, mine = seconds(lambda: np.asarray(compiled(queries, padded, kept)))
    torch_maxsim_s, other = seconds(torch_maxsim)
    return {
        "passages": len(passages),
        "passages_per_cpu_second": len(passages) / ours_s,
        "torch_passages_per_cpu_second": len(passages) / torch_s,
        "encoding_ratio": torch_s / ours_s,
        "queries_per_cpu_second": len(queries) / maxsim_s,
        "torch_queries_per_cpu_second": len(queries) / torch_maxsim_s,
        "maxsim_ratio": torch_maxsim_s / maxsim_s,
        "largest_difference": max(difference, float(np.abs(mine - other).max())),
    }


def main() -> None:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("corpus", "compare", "speed"))
    parser.add_argument("--passages", type=int, default=None, help="passages to make, or to encode")
    parser.add_argument("--questions", type=int, default=80)
    parser.add_argument("--others", type=int, default=0, help="passages of the corpus in all; 0 is the questions' own")
    parser.add_argument("--candidates", type=int, default=50, help="passages that are ordered, or fused")
    parser.add_argument("--encoder", help="folder of a sentence encoder in safetensors")
    parser.add_argument("--data", default="../shared/data/hotpotqa")
    parser.add_argument("--folder", help="where temporary files go")
    args = parser.parse_args()
    args.passages = args.passages or {"corpus": 100_000}.get(args.what, 256)
    print(json.dumps({"corpus": corpus, "compare": compare, "speed": speed}[args.what](args)))


if __name__ == "__main__":
    main()
