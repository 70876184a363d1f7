"""Documents: the files of a folder that are read, and their paragraphs with the place of each.

    find(folder)        which files are read, and which are left out and why
    read(file)          a file's title and paragraphs, each with its page or heading

Text and Markdown are read as they are; HTML, PDF and Word documents with the libraries of the extra `documents`,
without which they are left out. What is left out is counted and named, and never keeps the rest from being read.
"""

import collections
import importlib.util
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from roserag_jax.errors import first_line, shorten

_SURROGATE = re.compile("[\ud800-\udfff]")
_LATIN = ["cp1252", "cp1250", "cp1254", "cp1257"]  # Western, Central European, Turkish, Baltic
MAX_BYTES = 1 << 30  # of one document
MAX_DOCX_TEXT = 64 << 20  # bytes of the XML in a .docx, some thousands of pages: it is parsed as a whole


_LOCK = ".lock"  # what a workdir and an index hold while they are written, and keep


class Unreadable(Exception):
    """A document that cannot be read; the message says why."""


class Paragraph(NamedTuple):
    """A paragraph of a document, on one line, and its place."""

    text: str
    page: int | None = None
    heading: str | None = None
    is_heading: bool = False

    @property
    def place(self) -> dict:
        """Page and heading, those that are known."""
        return {name: value for name in ("page", "heading") if (value := getattr(self, name)) is not None}


class Format(NamedTuple):
    """A kind of document: file name endings, the function from bytes to paragraphs, and the package that it needs."""

    suffixes: tuple[str, ...]
    read: Callable[[bytes], Iterator[Paragraph]]
    package: str = ""

    @property
    def is_available(self) -> bool:
        """Whether its package is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def one_line(text: str) -> str:
    """A text with every run of white space as one space."""
    return " ".join(text.split())


def decode(data: bytes) -> str:
    """Decode a text file: UTF-8, UTF-16 with its mark, or what `charset_normalizer` finds.

    Raises:
      Unreadable: it is not text.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", "replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    if b"\0" in data[: 1 << 16]:
        raise Unreadable("not text")
    import charset_normalizer

    sample = data[: 1 << 20]
    # A few accented letters among plain ones: without this they are taken for Arabic or Chinese ones in short files.
    is_latin = len(re.findall(rb"[A-Za-z]", sample)) > 1.5 * len(re.findall(rb"[\x80-\xff]", sample))
    if is_latin and len(data) < 128:
        return data.decode("cp1252", "replace")
    best = charset_normalizer.from_bytes(sample, cp_isolation=_LATIN if is_latin else None).best()
    if best is None:
        raise Unreadable("its encoding is not known; save it as UTF-8")
    return data.decode(best.encoding, "replace")


def _text(data: bytes) -> Iterator[Paragraph]:
    for block in re.split(r"\n\s*\n", decode(data).replace("\r\n", "\n").replace("\r", "\n")):
        yield Paragraph(one_line(block))


_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]+(.*?))??(?:[ \t]+#+)?[ \t]*")


_UNDERLINE = re.compile(r" {0,3}(=+|-{3,})[ \t]*")
_FENCES = ("```", "~~~")


def _markdown(data: bytes) -> Iterator[Paragraph]:
    """Paragraphs below their headings (# Heading, or underlined); code blocks have none."""
    heading, block, fence = None, [], ""
    for line in [*decode(data).splitlines(), ""]:
        mark = line.lstrip()[:3]
        if fence:  # blank lines and headings within are code
            block.append(line)
            fence = "" if mark == fence else fence
            if fence:
                continue
            line = ""
        underlined = len(block) == 1 and _UNDERLINE.fullmatch(line)
        found = _HEADING.fullmatch(f"# {block.pop()}" if underlined else line)
        if not line.strip() or found or mark in _FENCES:
            yield Paragraph(one_line(" ".join(block)), heading=heading)
            block = []
        if found:
            heading = one_line(found.group(1) or "") or heading
            yield Paragraph(one_line(found.group(1) or ""), heading=heading, is_heading=True)
        elif line.strip():
            block.append(line)
            fence = mark if mark in _FENCES else ""
    yield Paragraph(one_line(" ".join(block)), heading=heading)


_HIDDEN = {"script", "style", "noscript", "template", "svg", "head", "nav", "footer", "iframe", "object"}
_BLOCKS = set(
    "address article aside blockquote br caption dd details div dl dt fieldset figcaption figure form h1 h2 h3 h4 "
    "h5 h6 header hr li main ol p pre section summary table tbody td tfoot th thead tr ul body".split()
)


def _html(data: bytes) -> Iterator[Paragraph]:
    """The visible text of a page, in blocks below their headings; navigation and footers are left out."""
    from lxml import etree, html

    encoding = None  # what the page itself declares
    if not data.startswith((b"\xff\xfe", b"\xfe\xff")) and not re.search(rb"(?i)charset|encoding=", data[:4096]):
        data, encoding = decode(data).encode(), "utf-8"
    try:
        page = html.document_fromstring(data, parser=html.HTMLParser(encoding=encoding, remove_comments=True))
    except (etree.ParserError, ValueError) as error:
        raise Unreadable(f"no HTML ({first_line(error)})") from error
    heading, words, hidden = None, [], 0

    def flush(is_heading: bool = False) -> Iterator[Paragraph]:
        text = one_line("".join(words))
        words.clear()
        if text:
            yield Paragraph(text, heading=text if is_heading else heading, is_heading=is_heading)

    for event, element in etree.iterwalk(page, events=("start", "end")):
        tag = element.tag if isinstance(element.tag, str) else ""
        hidden += (event == "start") - (event == "end") if tag in _HIDDEN else 0
        if tag in _BLOCKS and not hidden:
            is_heading = event == "end" and re.fullmatch("h[1-6]", tag) is not None
            for paragraph in flush(is_heading):
                heading = paragraph.heading
                yield paragraph
        if not hidden:
            words.append((element.text if event == "start" and tag else element.tail if event == "end" else "") or "")
    yield from flush()


def _docx(data: bytes) -> Iterator[Paragraph]:
    """A Word document, by way of the HTML that `mammoth` makes of its styles."""
    import io

    import mammoth

    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        texts = [part.file_size for part in parts.infolist() if part.filename.lower().endswith((".xml", ".rels"))]
        if sum(texts) > MAX_DOCX_TEXT:
            raise Unreadable(f"its text decompresses to over {MAX_DOCX_TEXT >> 20} MiB")
    ignore_images = mammoth.images.img_element(lambda image: {"src": ""})
    made = mammoth.convert_to_html(io.BytesIO(data), convert_image=ignore_images)
    yield from _html(f'<meta charset="utf-8"><body>{made.value}</body>'.encode())


def _pdf(data: bytes) -> Iterator[Paragraph]:
    """The text of a PDF, page by page; lines of a paragraph are joined."""
    import io

    import pypdf

    logging.getLogger("pypdf").setLevel(logging.ERROR)
    pages = pypdf.PdfReader(io.BytesIO(data))
    if pages.is_encrypted and not pages.decrypt(""):
        raise Unreadable("encrypted")
    for number, page in enumerate(pages.pages, 1):
        for block in re.split(r"\n\s*\n", page.extract_text()):
            # A hyphen at the end of a line has split a word.
            yield Paragraph(one_line(re.sub(r"(?<=\w)-\n(?=[a-z])", "", block)), page=number)


FORMATS = (
    Format((".txt", ".text"), _text),
    Format((".md", ".markdown"), _markdown),
    Format((".html", ".htm", ".xhtml"), _html, "lxml"),
    Format((".pdf",), _pdf, "pypdf"),
    Format((".docx",), _docx, "mammoth"),
)
SUFFIXES = {suffix: kind for kind in FORMATS for suffix in kind.suffixes}


class Found(NamedTuple):
    """The documents of a folder, in the order of their names, and the reason for each file that is left out."""

    files: list[Path]
    left_out: dict[str, str]

    def summary(self) -> str:
        """How many files are left out for each reason, and the name of the first."""
        reasons = collections.defaultdict(list)
        for name, reason in self.left_out.items():
            reasons[reason].append(name)
        said = [f"{len(names)} {reason} ({shorten(names[0], 60)})" for reason, names in sorted(reasons.items())]
        return shorten("; ".join(said), 600)


def describe(source: dict) -> str:
    """The place that a passage is from, for people: file, page and heading."""
    page = f"page {source['page']}" if "page" in source else ""
    return ", ".join(str(part) for part in (source.get("file"), page, source.get("heading")) if part)


def is_document(path: Path) -> bool:
    """Whether a file's name ends as that of a document."""
    return path.suffix.lower() in SUFFIXES


def find(folder: Path) -> Found:
    """Find the documents below a folder, through links too, each folder once.

    Hidden files and folders, `__MACOSX` and the lock files of Office are no documents and are not named. A workdir or
    an index below the folder is left out, so that no run reads what another has written.
    """
    files, left_out, seen, waiting = [], {}, set(), [folder]
    while waiting:
        path = waiting.pop()
        try:
            status = path.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link to what was visited, or is being visited
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(path))
            if path != folder and any(entry.name == _LOCK for entry in entries):
                left_out[name_below(folder, path)] = "workdir or index"
                continue
        except OSError as error:
            left_out[name_below(folder, path)] = f"cannot be read: {error.strerror}"
            continue
        for entry in entries:
            if entry.name.startswith((".", "~$")) or entry.name == "__MACOSX":
                continue
            try:
                if entry.is_dir():
                    waiting.append(Path(entry.path))
                    continue
                reason = _left_out(entry)
            except OSError as error:  # a link to itself
                reason = f"cannot be read: {error.strerror}"
            if reason:
                left_out[name_below(folder, Path(entry.path))] = reason
            else:
                files.append(Path(entry.path))
        waiting.sort(reverse=True)  # of two ways to a folder, always the same one
    return Found(sorted(files), dict(sorted(left_out.items())))


def name_below(folder: Path, path: Path) -> str:
    """The name of a file below a folder, as text whatever its bytes are."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "replace")


def _left_out(entry: os.DirEntry) -> str:
    """Why a folder's entry is not read; empty if it is."""
    kind = SUFFIXES.get(Path(entry.name).suffix.lower())
    if kind is None:
        return f"of a kind that is not read: {Path(entry.name).suffix.lower() or 'no ending'}"
    if not entry.is_file():
        return "broken link" if entry.is_symlink() and not os.path.exists(entry.path) else "not a regular file"
    if not kind.is_available:
        return f"{kind.suffixes[0]}, for which pip install 'roserag_jax[documents]' is needed"
    if entry.stat().st_size > MAX_BYTES:
        return f"over {MAX_BYTES >> 20} MiB"
    return ""


def read(file: Path) -> list[Paragraph]:
    """The paragraphs of a document, empty ones left out.

    Raises:
      Unreadable: it cannot be read, or has no text.
    """
    try:
        data = file.read_bytes()
        kind = SUFFIXES[file.suffix.lower()]
        whole = lambda text: text and _SURROGATE.sub("\ufffd", text)  # which PDFs have
        paragraphs = (p._replace(text=whole(p.text), heading=whole(p.heading)) for p in kind.read(data))
        found = [paragraph for paragraph in paragraphs if paragraph.text]
    except Unreadable:
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the libraries raise all kinds on damaged files
        raise Unreadable(f"damaged ({shorten(first_line(error), 80)})") from error
    if not found:
        raise Unreadable("without text (scanned pages?)" if file.suffix.lower() == ".pdf" else "without text")
    return found
