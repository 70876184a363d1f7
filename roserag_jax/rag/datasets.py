"""Questions, corpora and preference pairs from local files or the Hub, row by row, with errors that name the row."""

import collections
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from roserag_jax.errors import UserError, first_line
from roserag_jax.rag import readers, synthetic

HUB = "hf://"
# What a context may hold beside title and text: its types (a truth value is an int as well) and their name.
_OPTIONAL = {"is_supporting": (int, "truth value"), "score": ((int, float), "number")}


def _lines(path: epath.Path) -> Iterator[tuple[int, str]]:
    """Numbered non-empty lines of a plain or gzipped text file."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_json(path: epath.Path) -> list | dict:
    """A file, plain or gzipped, that is one JSON value.

    Raises:
      UserError: it is none.
    """
    try:
        return json.loads("".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: no valid JSON ({error}).") from error


def read_rows(path: epath.Path) -> Iterator[tuple[str, dict]]:
    """JSON objects, one a line or all in one list, each with the place where it stands.

    Raises:
      UserError: a line is no JSON object; it is named.
    """

    def row(where, value):
        if not isinstance(value, dict):
            raise UserError(f"{where}: a JSON object is expected, this is a {type(value).__name__}.")
        return where, value

    for number, line in _lines(path):
        if number == 1 and line.lstrip().startswith("["):
            yield from (row(f"{path}, row {i}", value) for i, value in enumerate(read_json(path), 1))
            return
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: no valid JSON ({error.msg} at column {error.colno}).") from error
        yield row(where, value)


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict]]:
    """Rows of a Hub data set `hf://owner/name[@revision][/configuration][:split]`, through `datasets`."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path, _, wanted = name.removeprefix(HUB).partition(":")
    owner, _, rest = path.partition("/")
    dataset, *configuration = rest.split("/")
    dataset, _, revision = dataset.partition("@")
    if not owner or not dataset or len(configuration) > 1:
        raise UserError(f"{name}: a Hub data set is written hf://owner/name[@revision][/configuration][:split].")
    try:
        found = load_dataset(f"{owner}/{dataset}", *configuration, split=wanted or split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: it has a loading script
        why = first_line(error)
        raise UserError(f"{name} cannot be had from the Hub: {why} Download it and name the local file.") from error
    yield from ((f"{name}, row {i}", row) for i, row in enumerate(found, 1))


def read_questions(
    path: str,
    rows: int = 0,
    answers: bool = True,
    contexts: bool = True,
    layout: str = "auto",
    corpus: str = "",
    split: str = "train",
) -> list[dict]:
    """Rows `{id, question, golden_answers, contexts: [{title, text, is_supporting?}], metadata?}` of any known layout.

    A row that is of no use is left out; how many, and why, is printed.

    Args:
      rows: keep the first so many; 0 is all.
      answers: whether a row must have golden answers.
      contexts: whether a row must have contexts (it need not where a retriever will fetch them).
      layout: a name of `readers.READERS`, or 'auto' to tell it by the first row.
      corpus: where StrategyQA's evidence paragraphs are.
      split: of a Hub data set that names none.

    Raises:
      UserError: the file has no rows that can be used, a row is not of its layout, or two rows share an id.
    """
    found, seen, skipped, first, paragraphs = [], {}, collections.Counter(), "", {}
    source = _hub_rows(path, split) if path.startswith(HUB) else read_rows(epath.Path(path).expanduser())
    for number, (where, raw) in enumerate(source, 1):
        if rows and len(found) == rows:
            break
        if layout == "auto":
            layout = readers.detect(raw, where)
        if layout == "strategyqa" and not paragraphs:
            if not corpus and contexts:
                raise UserError(
                    f"{path}: StrategyQA names its paragraphs by id; set config.retrieve.corpus to their file."
                )
            paragraphs = {p["id"]: p for p in read_corpus(corpus)} if corpus else {}
        try:
            row = _checked(readers.convert(layout, raw, paragraphs, where), number, where, layout, answers, contexts)
        except readers.Skip as reason:
            skipped[str(reason)] += 1
            first = first or f"{where} (id {raw.get('id', raw.get('_id', number))!r}): {reason}"
            continue
        if row["id"] in seen:
            raise UserError(f"{where}: id {row['id']!r} stands on {seen[row['id']]} already; ids must be unique.")
        seen[row["id"]] = where.rsplit(", ", 1)[1]
        found.append(row)
    if not found:
        raise UserError(f"{path} holds no questions{f' that can be used; {first}' if first else ''}.")
    if skipped:
        reasons = ", ".join(f"{n} for {reason}" for reason, n in skipped.items())
        print(f"{path} ({layout}): {len(found)} questions; left out {reasons}.")
    return found


def _checked(row: dict, number: int, where: str, layout: str, answers: bool, contexts: bool) -> dict:
    """A row of ours with its defaults filled in; what our own files must have is an error there."""
    empty = {"id": number, "contexts": [], "metadata": {}}
    row = {**row, **{name: value for name, value in empty.items() if row.get(name) is None}}
    row["id"] = str(row["id"])
    where = f"{where} (id {row['id']!r})"
    if not isinstance(row.get("question"), str) or not row["question"].strip():
        raise UserError(f"{where}: no question.")
    golden = row.get("golden_answers", [])
    if answers and not (isinstance(golden, list) and golden and all(isinstance(a, str) and a.strip() for a in golden)):
        if layout != "unified":
            raise readers.Skip("no answer")
        raise UserError(f"{where}: no answer; golden_answers must be a list of strings.")
    if contexts and not row["contexts"]:
        raise readers.Skip("no contexts; add them, or set config.retrieve.retriever=bm25")
    if not isinstance(row["metadata"], dict):
        raise UserError(f"{where}: metadata must be an object.")
    if not isinstance(row["contexts"], list):
        raise UserError(f"{where}: contexts must be a list of {{title, text}}.")
    for context in row["contexts"]:
        if not isinstance(context, dict) or not isinstance(context.get("text"), str):
            raise UserError(f"{where}: a context must be {{title, text}}.")
        context["title"] = str(context.get("title") or "")
        for name, (kinds, what) in _OPTIONAL.items():
            if context.get(name) is None:
                context.pop(name, None)
            elif not isinstance(context[name], kinds):
                raise UserError(f"{where}: a context's {name} is {context[name]!r}; it must be a {what}.")
    return row


def questions(config, split: str) -> list[dict]:
    """The questions that `config.data.train` or `config.data.eval` names."""
    data, path = config.data, config.data[split]
    rows = data[f"{split}_rows"]
    if path != "synthetic":
        given = config.retrieve.retriever == "given"
        hub_split = {"train": "train", "eval": "validation"}[split]
        return read_questions(path, rows, True, given, data.format, config.retrieve.corpus, hub_split)
    return list(
        synthetic.generate(
            rows or {"train": 200, "eval": 100}[split],
            split,
            seed=data.synthetic_seed,
            passages=data.synthetic_passages,
            missing_gold=data.synthetic_missing_gold,
            counterfactual=data.synthetic_counterfactual,
        )
    )


def read_corpus(path: str) -> list[dict]:
    """Passages `{id, title, text}` of a file of rows or of a folder of `.txt` and `.md` files.

    Rows are FlashRAG's `{id, contents}`, where `contents` is a title, a newline and the text, or StrategyQA's
    paragraphs, one JSON object of `{id: {title, content}}`. A file in a folder gives one passage per run of
    paragraphs of up to about 120 words, titled with the file's name.

    Raises:
      UserError: there is nothing to read, or a row is not as it should be.
    """
    source = epath.Path(path).expanduser()
    if not path or not source.exists():
        raise UserError(f"config.retrieve.corpus={path!r}: there is no such file or folder.")
    passages = []
    if source.is_dir():
        for file in sorted(f for f in Path(source).rglob("*") if f.suffix in (".txt", ".md") and f.is_file()):
            try:
                text = file.read_text()
            except UnicodeDecodeError as error:
                raise UserError(f"{file} is not UTF-8 text: {error}.") from error
            name = str(file.relative_to(source))
            chunks = enumerate(_chunks(text))
            passages += [{"id": f"{name}#{i}", "title": Path(name).stem, "text": chunk} for i, chunk in chunks]
    elif paragraphs := _paragraphs(source):
        for i, row in paragraphs.items():
            if not isinstance(row, dict) or not isinstance(row.get("content"), str):
                raise UserError(f"{path}, paragraph {i!r}: it must be {{title, content}}.")
            passages.append({"id": i, "title": row.get("title", ""), "text": row["content"].strip()})
    else:
        for number, (where, row) in enumerate(read_rows(source), 1):
            if not isinstance(row.get("contents"), str):
                raise UserError(f"{where}: a corpus row must be {{id, contents}}.")
            title, text = split_contents(row["contents"])
            passages.append({"id": str(row.get("id", number)), "title": title, "text": text})
    if not passages:
        raise UserError(f"config.retrieve.corpus={path!r} holds no passages (.txt and .md files, or rows of contents).")
    return passages


def _paragraphs(file: epath.Path) -> dict:
    """StrategyQA's paragraphs by id; empty where the file is one of rows, which may be named .json too."""
    if ".json" not in file.suffixes:
        return {}
    try:
        found = read_json(file)
    except UserError:  # more than one value; what is wrong with a row is told where rows are read
        return {}
    return found if isinstance(found, dict) and "contents" not in found else {}


def split_contents(contents: str) -> tuple[str, str]:
    """Title and text of FlashRAG's `contents`; the title is empty where there is one line only."""
    title, _, text = contents.partition("\n")
    title, text = (title, text) if text.strip() else ("", title)
    return title.strip().strip('"'), text.strip()


def _chunks(text: str, words: int = 120) -> Iterator[str]:
    chunk = []
    for paragraph in text.split("\n\n"):
        pieces = paragraph.split()
        if chunk and len(chunk) + len(pieces) > words:
            yield " ".join(chunk)
            chunk = []
        while len(pieces) > 2 * words:
            yield " ".join(pieces[:words])
            pieces = pieces[words:]
        chunk += pieces
    if chunk:
        yield " ".join(chunk)


def read_pairs(path: str, tokenizer) -> list[dict]:
    """Ready-made pairs `{id, prompt, chosen, rejected}` of a TRL preference file, as text.

    Rows are text or conversational, with a prompt or with it at the beginning of both responses (also where a text
    prompt stands beside conversations, as TRL takes it). A conversation is laid in the tokenizer's chat template; a
    text prompt is taken as it stands.

    Raises:
      UserError: a row is no pair, or no row can be used; it is named.
    """
    from jinja2 import TemplateError

    pairs, skipped = [], collections.Counter()
    source = _hub_rows(path, "train") if path.startswith(HUB) else read_rows(epath.Path(path).expanduser())
    for number, (where, row) in enumerate(source, 1):
        try:
            prompt, chosen, rejected = _pair(row, tokenizer)
        except (KeyError, TypeError, ValueError, TemplateError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{where}: a pair is {{prompt, chosen, rejected}}, text or messages ({why}).") from error
        if not chosen.strip() or not rejected.strip() or chosen == rejected:
            skipped["an empty response" if chosen != rejected else "two equal responses"] += 1
            continue
        pairs.append({"id": str(row.get("id", number)), "prompt": prompt, "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise UserError(f"{path} holds no pairs.")
    left_out = ", ".join(f"{n} for {reason}" for reason, n in skipped.items())
    print(f"{path}: {len(pairs)} pairs{f'; left out {left_out}' if left_out else ''}.")
    return pairs


def _pair(row: dict, tokenizer) -> tuple[str, str, str]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one response is text, the other is not")
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if isinstance(chosen, str) and chosen[:shared].endswith(" "):
            shared -= 1  # the space belongs to the responses
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(chosen, str):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("the prompt is not text")
        return prompt, chosen, rejected
    if not prompt or not isinstance(prompt, list):
        raise ValueError("the prompt is no conversation")
    if tokenizer.chat_template is None:
        raise ValueError("messages need a model with a chat template")
    for response in (chosen, rejected):
        if len(response) != 1 or response[0]["role"] != "assistant" or not isinstance(response[0]["content"], str):
            raise ValueError("a response must be one turn of the assistant, its content text")
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return text, chosen[0]["content"], rejected[0]["content"]
