"""A folder of documents as people have it: what is read, what is left out by name, and where each passage is from."""

import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from roserag_jax import inputs, options
from roserag_jax.errors import UserError
from roserag_jax.rag import corpora, documents
from roserag_jax.retrieval import indexing
from roserag_jax.workdir import Workdir

HTML = """<!doctype html><html><head><title>no</title><style>p {}</style></head><body><nav>Home</nav>
<h1>Moss</h1><p>Moss is <b>gre</b>en.<p>It &amp; fern<br>grow.<script>var x</script>
<h2>Use</h2><table><tr><td>Peat</td><td>fuel</td></tr></table>loose<footer>c</footer></body></html>"""


def pdf(*pages: str) -> bytes:
    fpdf = pytest.importorskip("fpdf")
    made = fpdf.FPDF()
    made.set_font("helvetica")
    for page in pages:
        made.add_page()
        made.multi_cell(0, text=page)
    return bytes(made.output())


def docx(*paragraphs: tuple[str, str]) -> bytes:
    made = pytest.importorskip("docx").Document()
    for style, text in paragraphs:
        made.add_paragraph(text, style=style)
    made.add_table(1, 2).rows[0].cells[0].text = "Cell"
    out = io.BytesIO()
    made.save(out)
    return out.getvalue()


def write(folder: Path, **files) -> Path:
    for name, content in files.items():
        file = folder / name.replace("__", ".")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def places(file: Path) -> list[tuple]:
    return [(p.text, p.page, p.heading) for p in documents.read(file)]


def test_read_text_and_markdown(tmp_path):
    write(tmp_path, a__TXT="One\nline.\n \nTwo.\r\n\r\nThree.", b__txt="old\r\rmac")
    assert places(tmp_path / "a.TXT") == [("One line.", None, None), ("Two.", None, None), ("Three.", None, None)]
    assert [text for text, *_ in places(tmp_path / "b.txt")] == ["old", "mac"]
    text = "Before\n# Moss #\nIs green.\n\n## \n```sh\n# no heading\n```\nUse\n---\n- peat\n"
    write(tmp_path, c__Md=text)
    assert places(tmp_path / "c.Md") == [
        ("Before", None, None),
        ("Moss", None, "Moss"),
        ("Is green.", None, "Moss"),
        ("```sh # no heading ```", None, "Moss"),
        ("Use", None, "Use"),
        ("- peat", None, "Use"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252", "cp1251", "gb18030", "shift_jis"])
def test_read_guesses_the_encoding(encoding, tmp_path):
    texts = {
        "cp1251": "Мох растёт в лесу, и он зелёный круглый год. Торф из него служит топливом. " * 3,
        "gb18030": "燕鸥博物馆由伦德女士于一九〇一年创办，位于下谷镇。馆内收藏了许多鸟类标本。" * 3,
        "shift_jis": "アジサシ博物館は下谷町にあり、ルンド女史によって創設された。多くの鳥の標本が収められている。" * 3,
    }
    text = texts.get(encoding, "Le musée fut fondé à Besançon où naquit l’été dernier un café très apprécié. " * 3)
    write(tmp_path, a__txt=text.encode(encoding))
    assert places(tmp_path / "a.txt") == [(" ".join(text.split()), None, None)]


@pytest.mark.parametrize("text", ["café latin", "Müller", "L’été à Besançon", "Straße 7 in Österreich", "a naïve plan"])
def test_read_takes_one_accented_letter_for_a_latin_one(text, tmp_path):
    """A file too short to guess its encoding from: what Windows writes in the west."""
    write(tmp_path, a__txt=text.encode("cp1252"))
    assert [p.text for p in documents.read(tmp_path / "a.txt")] == [text]


@pytest.mark.parametrize("declared", ["", '<meta charset="cp1252">', '<?xml version="1.0" encoding="utf-8"?>'])
def test_read_html(declared, tmp_path):
    pytest.importorskip("lxml")
    text = HTML.replace("Peat", "Peat, été")
    write(tmp_path, a__html=(declared + text).encode("cp1252" if "cp1252" in declared else "utf-8"))
    assert [(text, heading) for text, _, heading in places(tmp_path / "a.html")] == [
        ("Moss", "Moss"),
        ("Moss is green.", "Moss"),
        ("It & fern", "Moss"),
        ("grow.", "Moss"),
        ("Use", "Use"),
        ("Peat, été", "Use"),
        ("fuel", "Use"),
        ("loose", "Use"),
    ]


def test_read_pdf_and_word_with_page_and_heading(tmp_path):
    pytest.importorskip("pypdf"), pytest.importorskip("mammoth")
    write(tmp_path, a__pdf=pdf("Moss is green.", "Peat is brown."))
    write(tmp_path, b__docx=docx(("Normal", "Before."), ("Heading 1", "Moss"), ("Normal", "Moss is green.")))
    assert places(tmp_path / "a.pdf") == [("Moss is green.", 1, None), ("Peat is brown.", 2, None)]
    found = [("Before.", None, None), ("Moss", None, "Moss"), ("Moss is green.", None, "Moss"), ("Cell", None, "Moss")]
    assert places(tmp_path / "b.docx") == found
    passages = corpora.read_corpus(str(tmp_path))
    assert [(p["id"], p["title"], p["source"]) for p in passages] == [
        ("a.pdf#0", "a", {"file": "a.pdf", "page": 1}),
        ("a.pdf#1", "a", {"file": "a.pdf", "page": 2}),
        ("b.docx#0", "b", {"file": "b.docx"}),
        ("b.docx#1", "b", {"file": "b.docx", "heading": "Moss"}),
    ]
    assert corpora.read_corpus(str(tmp_path / "a.pdf"))[1]["source"] == {"file": "a.pdf", "page": 2}


def test_find_leaves_out_what_is_no_document(tmp_path, capsys):
    good = write(tmp_path / "docs", a__txt="Moss is green.")
    write(good / "deep", b__md="Peat is brown.")
    hidden = {".ipynb_checkpoints": "a", "__MACOSX": "a", ".git": "a"}
    for name in hidden:
        write(good / name, c__txt="hidden")
    write(good, **{".DS_Store": "x", "._a__txt": "x", "~$a__docx": "x"})
    write(good, image__png="x", README="x", empty__txt=" \n", binary__txt=b"\x00\xff\xfe\x00" * 9, cut__pdf="%PDF-1.4")
    write(good, zip__docx=zip_of("nothing"), broken__docx="x")
    (good / "gone.txt").symlink_to(tmp_path / "nowhere")
    (good / "self.txt").symlink_to(good / "self.txt")
    (good / "loop").symlink_to(good)
    (good / "deep" / "up").symlink_to(good / "deep")
    (good / "io.txt").symlink_to("/proc/self/mem")  # opens, and cannot be read
    os.mkfifo(good / "pipe.txt")
    (good / os.fsdecode(b"caf\xe9.txt")).write_text("Odd name.")
    passages = corpora.read_corpus(str(good))
    assert [(p["source"]["file"], p["text"]) for p in passages] == [
        ("a.txt", "Moss is green."),
        ("caf\ufffd.txt", "Odd name."),
        ("deep/b.md", "Peat is brown."),
    ]
    out = capsys.readouterr().out
    assert out.startswith(f"{good}: 3 passages of 3 documents; left out ") and len(out) < 1000
    left_out = documents.find(good).left_out
    assert left_out["gone.txt"] == "broken link" and left_out["pipe.txt"] == "not a regular file"
    assert "symbolic links" in left_out["self.txt"]
    assert left_out["image.png"].endswith(".png") and left_out["README"].endswith("no ending")
    for reason in ("1 broken link (gone.txt)", "1 not a regular file (pipe.txt)", "without text (empty.txt)"):
        assert reason in out
    assert not any(name in out for name in ("hidden", "MACOSX", "checkpoints", "DS_Store", "._a", "~$"))


def test_find_leaves_out_workdirs_and_indexes(tmp_path):
    """A workdir below the documents holds texts of its own, as `merged/merges.txt`."""
    write(tmp_path, a__md="Moss.")
    with Workdir(str(tmp_path / "runs" / "mine")).lock():
        write(tmp_path / "runs" / "mine" / "merged", merges__txt="x")
    indexing.update(tmp_path / "index", corpora.Corpus(str(tmp_path)))
    found = documents.find(tmp_path)
    assert [file.name for file in found.files] == ["a.md"]
    assert found.left_out == {"index": "workdir or index", "runs/mine": "workdir or index"}


def zip_of(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr(name, "x")
    return out.getvalue()


def test_find_names_the_extra_where_a_library_is_missing(tmp_path, monkeypatch):
    write(tmp_path, a__txt="Moss.", b__pdf="x", c__HTM="x", d__docx="x")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    found = documents.find(tmp_path)
    assert [f.name for f in found.files] == ["a.txt"] and len(found.left_out) == 3
    assert all("pip install 'roserag_jax[documents]'" in reason for reason in found.left_out.values())
    assert len(corpora.read_corpus(str(tmp_path))) == 1


@pytest.mark.parametrize("suffix", [".pdf", ".docx", ".html"])
def test_read_survives_damaged_files(suffix, tmp_path):
    """Cut, flipped, nested or empty: paragraphs, or one line that says why not."""
    import random

    good = {".pdf": pdf("Moss " * 50), ".docx": docx(("Normal", "Moss " * 50)), ".html": HTML.encode()}[suffix]
    rng = random.Random(0)
    damaged = [good[: rng.randrange(len(good))] for _ in range(10)] + [b"", b"\0" * 99, b"<div>" * 20_000 + b"x"]
    for _ in range(15):
        flipped = bytearray(good)
        for _ in range(20):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        damaged.append(bytes(flipped))
    for data in damaged:
        (tmp_path / f"a{suffix}").write_bytes(data)
        try:
            assert all(p.text for p in documents.read(tmp_path / f"a{suffix}"))
        except documents.Unreadable as error:
            assert 0 < len(str(error)) < 200 and "\n" not in str(error)


def test_word_bomb_is_refused(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("word/document.xml", b" " * (65 << 20))
    write(tmp_path, a__docx=out.getvalue())
    with pytest.raises(documents.Unreadable, match="decompresses to over 64 MiB"):
        documents.read(tmp_path / "a.docx")


def test_chunks_keep_to_size_overlap_and_place():
    paragraph = lambda n, word="w", **place: documents.Paragraph(" ".join(f"{word}{i}" for i in range(n)), **place)
    sizes = lambda found: [len(text.split()) for text, _ in found]
    run = lambda *paragraphs, **kw: list(corpora.chunks(paragraphs, **{"size": 10} | kw))
    assert sizes(run(paragraph(4), paragraph(5), paragraph(3))) == [9, 3]
    assert sizes(run(paragraph(35))) == [10, 10, 15] and sizes(run(paragraph(20))) == [20]
    overlapping = run(paragraph(35), paragraph(8), overlap=3)
    assert [text.split()[0] for text, _ in overlapping] == ["w0", "w7", "w14", "w32"]
    assert {word for text, _ in overlapping for word in text.split()} == {f"w{i}" for i in range(35)}
    by_page = run(paragraph(3, page=1), paragraph(3, page=1), paragraph(2, page=2), overlap=2)
    assert [(len(text.split()), place) for text, place in by_page] == [(6, {"page": 1}), (2, {"page": 2})]
    title = paragraph(1, heading="a", is_heading=True), paragraph(1, heading="b", is_heading=True)
    assert [(len(t.split()), place) for t, place in run(*title, paragraph(4, heading="b"))] == [(6, {"heading": "b"})]
    assert run(*title) == [("w0 w0", {"heading": "b"})] and run() == []
    # A token begins every second letter: w0 to w9 have one and a half with their space, w10 and on two.
    by_tokens = run(paragraph(35), token_starts=lambda text: range(0, len(text), 2), overlap=3)
    assert all(len(text) <= 20 for text, _ in by_tokens[:-1]) and len(by_tokens) > 5
    words = [word for text, _ in by_tokens for word in text.split()]
    assert set(words) == {f"w{i}" for i in range(35)} and len(words) > 35


def test_digest_of_a_folder_is_of_what_is_read(tmp_path):
    config = options.defaults()
    config.retrieve.corpus = str(write(tmp_path, a__txt="Moss.", b__md="Peat."))
    digest = lambda: inputs.input_digest(config, "retrieve.corpus")
    before = digest()
    write(tmp_path, **{".DS_Store": "x", "image__png": "x"})
    write(tmp_path / ".git", c__txt="x")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    assert digest() == before
    write(tmp_path, a__txt="Moss?")
    assert digest() != before
    write(tmp_path, a__txt="Moss.")
    assert digest() == before
    shutil.move(tmp_path / "a.txt", tmp_path / "c.txt")
    assert digest() != before


def test_corpus_rows_with_title_and_text_keep_their_source(tmp_path):
    from conftest import write_lines

    rows = [
        {"_id": 7, "title": 1984, "text": " A novel. ", "source": {"file": "x.pdf", "page": 3}},
        {"contents": '"It"\nAda.', "source": "y.pdf", "id": None},
    ]
    assert corpora.read_corpus(write_lines(tmp_path / "c.jsonl", *rows)) == [
        {"id": "7", "title": "1984", "text": "A novel.", "source": {"file": "x.pdf", "page": 3}},
        {"id": "2", "title": "It", "text": "Ada.", "source": {"file": "y.pdf"}},
    ]
    for bad in ({"id": 1}, {"id": [1], "text": "x"}, {"id": 1, "text": "x", "title": ["a"]}):
        with pytest.raises(UserError, match=r"c\.jsonl, line 1"):
            corpora.read_corpus(write_lines(tmp_path / "c.jsonl", bad))


def test_read_corpus_takes_a_hub_data_set(monkeypatch):
    import datasets as library

    rows = library.Dataset.from_list([{"id": "1", "contents": "It\nAda."}])
    monkeypatch.setattr(library, "load_dataset", lambda *_, **__: rows)
    assert corpora.read_corpus("hf://owner/name")[0] == {"id": "1", "title": "It", "text": "Ada."}
