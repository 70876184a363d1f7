"""The one reader of JSON files: what it takes, what it refuses by name, and how much a file may make it do."""

import gzip
import json
import time
import tracemalloc

import pytest
from etils import epath

from roserag_jax.errors import UserError, quote
from roserag_jax.preference import pairs
from roserag_jax.rag import corpora, files, questions
from roserag_jax.retrieval.cache import Cache

ROW = {"id": "1", "question": "Who made it?", "golden_answers": ["Ada"], "contexts": [{"title": "It", "text": "Ada."}]}


def rows_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [row for _, row in files.read_rows(epath.Path(path))]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1}\n{"a": 2}',
        '\n\r\n{"a": 1}\r\n\r\n{"a": 2}\r\n',
        '[{"a": 1}, {"a": 2}]',
        '\n \n[\n{"a": 1},\n{"a": 2}\n]\n',
        '[ {"a":1}\n,{"a":2} ]',
    ],
)
def test_read_rows_takes_lines_lists_and_byte_order_marks(text, pack, bom, tmp_path):
    assert rows_of(tmp_path / "rows.jsonl", pack(bom + text.encode())) == [{"a": 1}, {"a": 2}]


def test_every_reader_takes_a_byte_order_mark(tmp_path, smollm_tokenizer):
    def file(name, *rows, whole=False):
        text = json.dumps(rows[0]) if whole else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        return str(tmp_path / name)

    assert questions.read_questions(file("q.jsonl", ROW))[0]["id"] == "1"
    assert corpora.read_corpus(file("c.jsonl", {"id": 1, "contents": "Moss"}))[0]["text"] == "Moss"
    assert corpora.read_corpus(file("p.json", {"M-1": {"title": "M", "content": "Moss"}}, whole=True))[0]["id"] == "M-1"
    cache = Cache(file("cache.json", {"Who?": [{"title": "M", "text": "Moss"}]}, whole=True))
    assert cache.search(["Who?"], 1) == [[{"title": "M", "text": "Moss"}]]
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert pairs.read_pairs(file("pairs.jsonl", pair), smollm_tokenizer)[0]["prompt"] == "p"


def test_read_rows_gives_null_nan_and_absent_keys_as_one(tmp_path):
    text = '{"a": NaN, "b": null, "c": [null, NaN, 1], "d": {"e": null, "f": {"g": NaN}}, "h": 1.5}'
    (row,) = rows_of(tmp_path / "rows.jsonl", text)
    assert row == {"c": [None, None, 1], "d": {"f": {}}, "h": 1.5}
    assert files._plain({"a": float("nan"), "b": None, "c": [None]}, "") == {"c": [None]}


@pytest.mark.parametrize(
    ("escaped", "text"),
    [
        (r"\ud83d\ude00", "\N{GRINNING FACE}"),
        (r"cut \ud83d", "cut \ufffd"),
        (r"\ude00 cut", "\ufffd cut"),
        (r"\uDE00\uD83D", "\ufffd\ufffd"),
    ],
)
def test_read_rows_replaces_lone_surrogates(escaped, text, tmp_path):
    (row,) = rows_of(tmp_path / "rows.jsonl", f'{{"a": ["{escaped}"], "{escaped}": 1}}')
    assert row == {"a": [text], text: 1}
    json.dumps(row, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"a": 1}\n{"a": }', r"line 2: not valid JSON \(Expecting value at column 7\)"),
        ('[{"a": 1}, {"a": }]', r"row 2: not valid JSON"),
        ('[{"a": 1} {"a": 2}]', r"row 2: .*no comma"),
        ('[{"a": 1}', r"row 2: .*does not end"),
        ('[{"a": 1}] x', r"text after the list's end"),
        ('{"a": 1} {"a": 2}', r"line 1: .*text after the value's end"),
        ('{"a": 1}\n"text"', r"line 2: not a JSON object but a string"),
        ("[1]", r"row 1: not a JSON object but a number"),
        ("[null]", r"row 1: not a JSON object but null"),
        ('{"a": Infinity}', r"line 1: .*Infinity is not a finite number"),
        ('{"a": 1e999}', r"line 1: .*1e999 is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", r"line 1: not valid JSON"),
        ('{"a": ' + "[" * 100_000, r"line 1: nested more than 100 levels deep"),
        ("[" * 100_000 + "]" * 100_000, r"nested more than 100 levels deep"),
        ('{"a": ' + "[" * 101 + "]" * 101 + "}", r"line 1: nested more than 100 levels deep"),
        (b'{"a": 1}\n{"a": "\xff"}', r"line 2: not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), r"UTF-16"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], r"cannot be read"),
    ],
)
def test_read_rows_names_what_is_wrong(content, match, tmp_path):
    with pytest.raises(UserError, match=rf"rows\.jsonl.*{match}") as caught:
        rows_of(tmp_path / "rows.jsonl", content)
    assert len(str(caught.value)) <= 1000 and "\n" not in str(caught.value)


def test_read_rows_takes_what_is_deep_but_not_too_deep(tmp_path):
    deep = '{"a": ' + "[" * 99 + "]" * 99 + "}"
    assert len(rows_of(tmp_path / "rows.jsonl", deep + "\n" + json.dumps({"a": [[1]] * 500}))) == 2


def test_read_rows_refuses_what_is_not_a_regular_file(tmp_path):
    import os

    with pytest.raises(UserError, match="There is no file"):
        next(files.read_rows(epath.Path(tmp_path / "none")))
    with pytest.raises(UserError, match="is a folder; a file is expected"):
        next(files.read_rows(epath.Path(tmp_path)))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        next(files.read_rows(epath.Path(tmp_path / "pipe")))


@pytest.mark.parametrize("filler", [b"\n", b" ", b"[", b'{"a": "%s"}\n' % (b"x" * 4000)])
def test_decompression_is_bounded(filler, tmp_path, monkeypatch):
    """A gigabyte of nothing in a megabyte of gzip is refused in seconds."""
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wb", compresslevel=1) as out:
        for _ in range(40):
            out.write(filler * ((1 << 20) // len(filler)))
    monkeypatch.setattr(files, "MIN_LIMIT", 4 << 20)
    monkeypatch.setattr(files, "MAX_RATIO", 20)
    start = time.monotonic()
    with pytest.raises(UserError, match="line|MiB|nested"):
        for _ in files.read_rows(epath.Path(file)):
            pass
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("block", [1, 2, 7, 64])
def test_lists_are_read_in_blocks(block, tmp_path, monkeypatch):
    """Wherever a block ends: in a character, an escape, a number, between rows."""
    rows = [{"a": 'Ünïcødé \N{GRINNING FACE} \\ " ,]', "b": [1.25, -1e300, {}]}, {}, {"n": 123456}]
    texts = ["\n [" + ",\n ".join(json.dumps(row, ensure_ascii=bool(i)) for row in rows) + " ]\n " for i in range(2)]
    texts += ["[]", "[ ]", '[\n{"a": 1},\n{"a" 2}]', "[12345, {}]", '[{"a": 1}, nul]']
    texts += ['[{"a": 1}', '[{"a": 1}] x', "[", "[{}"]

    def read(text):
        try:
            return rows_of(tmp_path / "rows.json", text)
        except UserError as error:
            return str(error)

    expected = [read(text) for text in texts]
    assert expected[0] == expected[1] and [row.get("n") for row in expected[0]] == [None, None, 123456]
    assert "row 2: not valid JSON (Expecting ':' delimiter at line 3 column 6)" in expected[4]
    monkeypatch.setattr(files, "_BLOCK", block)
    assert [read(text) for text in texts] == expected


def test_a_list_is_not_held_in_memory(tmp_path):
    file = tmp_path / "rows.json"
    with file.open("w") as out:
        for i in range(300):
            out.write("[,"[bool(i)] + json.dumps({"a": "x" * 100_000}))
        out.write("]")
    tracemalloc.start()
    try:
        assert sum(len(row["a"]) for _, row in files.read_rows(epath.Path(file))) == 30_000_000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_quote_is_short():
    assert quote("a'b") == '"a\'b"'
    assert len(quote("x" * 10**6)) == 80 and len(quote({"a": ["x" * 1000]})) == 80
    assert len(str(UserError("x\ny" * 1000))) == 1000
