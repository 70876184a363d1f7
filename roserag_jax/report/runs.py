"""What a workdir holds, for the report: a run that is finished, stopped, under way, or damaged in parts.

Nothing is locked, changed or rebuilt. What is absent or cannot be read is a note in the report, and no error.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from roserag_jax import options, rounds
from roserag_jax.errors import UserError, first_line
from roserag_jax.partial_results import partial_rows
from roserag_jax.preference.labels import with_rewards
from roserag_jax.preference.selection import Outcome, outcome
from roserag_jax.rag import answers
from roserag_jax.rag.metrics import measures_of
from roserag_jax.report import comparison
from roserag_jax.training.log import is_evaluation, is_number, read_rows
from roserag_jax.workdir import ADAPTER, CANDIDATES, PAIRS, RETRIEVED, REWARDS, Workdir, read_manifest, verify_files


@dataclasses.dataclass
class Run:
    """What was found in a workdir.

    Attributes:
      name: what the report calls it.
      retrieved: rows by split.
      candidates: rows of all questions, or of those that are finished.
      pairs: None where none were selected yet.
      steps: training's rows of steps.
      held_out: training's rows of evaluations.
      metrics: those of finished evaluations, by name.
      examples: their questions with answers and scores, by name.
      options: those that the artifacts were made with, by dotted name.
      stages: what `progress` recorded of finished stages: time and command.
      rounds: the earlier ones, where training had several; the run itself is the last.
      notes: what is absent, under way or damaged, as sentences.
    """

    name: str
    workdir: Workdir
    retrieved: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    candidates: list[dict] = dataclasses.field(default_factory=list)
    pairs: list[dict] | None = None
    steps: list[dict] = dataclasses.field(default_factory=list)
    held_out: list[dict] = dataclasses.field(default_factory=list)
    metrics: dict[str, dict] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    stages: list[dict] = dataclasses.field(default_factory=list)
    has_adapter: bool = False
    rounds: list["Run"] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The configuration as far as the artifacts know it, the rest at its defaults."""
        config = options.defaults()
        for name, default in ((name, option.default) for name, option in options.walk()):
            if name in self.options and not isinstance(default, dict):
                value = self.options[name]
                value = tuple(value) if isinstance(value, list) else value
                if isinstance(value, type(default)) or {type(value), type(default)} == {int, float}:
                    config.update_from_flattened_dict({name: value})
        return config

    @functools.cached_property
    def measure(self) -> answers.Measure:
        """How answers are compared."""
        return answers.Measure(self.config.evaluate.metric, self.config.data.language)

    @functools.cached_property
    def by_id(self) -> dict[str, dict]:
        """The training questions by id."""
        return {row["id"]: row for row in self.retrieved.get("train", [])}

    def shown(self, question: str) -> list[dict]:
        """The passages of a training question that were shown, best first."""
        return self.by_id.get(question, {}).get("contexts", [])[: self.config.prompt.passages]

    @functools.cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """What selection makes of each question's candidates."""
        select = self.config.select
        return {row["id"]: outcome(row, self.shown(row["id"]), select, self.measure) for row in self.candidates}

    @functools.cached_property
    def pairs_of(self) -> dict[str, list[dict]]:
        """The pairs of each question."""
        found: dict[str, list[dict]] = {}
        for pair in self.pairs or []:
            found.setdefault(pair["id"], []).append(pair)
        return found

    def scores(self, name: str) -> dict[str, dict]:
        """The scores of an evaluation's questions by their ids."""
        return {row["id"]: row["scores"] for row in self.examples[name]}


def read_run(path: str) -> Run:
    """Read a workdir.

    Raises:
      UserError: there is no such folder, or nothing of a run is in it.
    """
    workdir = Workdir(path)
    if not workdir.path.is_dir():
        raise UserError(f"{path}: there is no such folder; name the workdir of a run.")
    run = Run(workdir.path.name, workdir)
    for split, name in RETRIEVED.items():
        if rows := _artifact(run, name, _is_question):
            run.retrieved[split] = rows
    run.candidates = _artifact(run, CANDIDATES, _is_candidates_row) or _unfinished_candidates(run)
    run.pairs = _artifact(run, PAIRS, _is_pair)
    _read_training(run)
    _read_evaluations(run)
    run.stages = _stages(workdir)
    _add_rewards(run)
    _read_rounds(run)
    if not (run.retrieved or run.candidates or run.pairs or run.steps or run.metrics or run.has_adapter or run.rounds):
        raise UserError(f"{path} holds nothing of a run: no retrieved.jsonl, candidates.jsonl, eval/ or other.")
    return run


def _read_rounds(run: Run) -> None:
    for number in rounds.earlier(run.workdir):
        run.workdir.label = f"round {number + 1}: "
        with contextlib.suppress(UserError):  # of a round that has not begun
            found = read_run(str(run.workdir / f"rounds/{number}"))
            found.name = f"round {number}"
            run.rounds.append(found)
            run.notes += [f"Round {number}: {note}" for note in found.notes]


def _is_question(row: dict) -> bool:
    passages = all(
        _has_texts(c, "title", "text") and c.get("is_supporting") in (None, True, False)
        for c in _list(row.get("contexts", []))
    )
    known = _has_texts(row, "id", "question") and isinstance(row.get("metadata", {}), dict)
    return passages and known and _is_texts(row["golden_answers"])


def _is_candidates_row(row: dict) -> bool:
    known = all(
        _has_texts(c, "rationale", "answer", "response", "source")
        and c["correct"] in (None, True, False)
        and is_number(c["logprob"])
        and is_number(c["tokens"])
        and c["tokens"] > 0
        for c in _list(row["candidates"])
    )
    dropped = all(map(is_number, row.get("dropped", {}).values()))
    return known and dropped and _has_prompt(row) and _has_texts(row, "id") and _is_texts(row["golden_answers"])


def _is_pair(row: dict) -> bool:
    logprobs = all(is_number(row.get(f"{side}_logprob", 0)) for side in ("chosen", "rejected"))
    return logprobs and _has_texts(row, "id", "chosen", "rejected") and ("prompt" not in row or _has_prompt(row))


def _is_example(row: dict) -> bool:
    scores = all(is_number(row["scores"][name]) for name in {"em", "f1", *measures_of(row["scores"])})
    return scores and _has_texts(row, "id", "question", "prediction", "response") and _is_texts(row["golden_answers"])


def _has_prompt(row: dict) -> bool:
    spans = all(type(start) is type(end) is int for start, end in _list(row.get("passage_spans", [])))
    return spans and isinstance(row["prompt"], str)


def _has_texts(row: dict, *names: str) -> bool:
    return all(isinstance(row[name], str) for name in names)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _list(value: Any) -> list:
    if not isinstance(value, list):
        raise TypeError
    return value


def _lines(path: epath.Path, is_row: Callable[[dict], bool]) -> tuple[list[dict], int]:
    """The rows of a file that are what they should be, and how many lines are not."""
    rows, bad = [], 0
    for line in path.read_bytes().split(b"\n"):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            good = is_row(row)
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, RecursionError):
            good = False
        if good:
            rows.append(row)
        bad += not good
    return rows, bad


def _artifact(run: Run, name: str, is_row: Callable[[dict], bool]) -> list[dict] | None:
    """The rows of an artifact, and its options into the run's; None where it is absent."""
    path = run.workdir / name
    if not path.is_file():
        return None
    try:
        if manifest := run.workdir.manifest(name):
            run.options = manifest["options"] | run.options
            verify_files(path, manifest)
        else:
            run.notes.append(f"{name} has no manifest: its stage is under way, or was stopped while it wrote it.")
    except UserError as error:
        run.notes.append(str(error))
    rows, bad = _lines(path, is_row)
    if bad:
        run.notes.append(f"{name}: {bad} of {bad + len(rows)} lines are damaged and left out.")
    return rows


def _unfinished_candidates(run: Run) -> list[dict]:
    """The questions that a stage under way has finished."""
    folders = [f for f in _folders(run.workdir / ".parts") if f.name.startswith("generate-")]
    if not folders:
        return []
    rows = max((partial_rows(folder)[0] for folder in folders), key=len)
    run.notes.append(f"generate is under way, or was stopped: {len(rows)} questions are finished.")
    return rows


def _add_rewards(run: Run) -> None:
    """The rewards that judge the candidates, where rewards do."""
    if run.config.select.labels != "reward" or not run.candidates:
        return
    rewards = {
        row["id"]: row["rewards"]
        for row in _artifact(run, REWARDS, lambda row: _has_texts(row, "id") and _list(row["rewards"]) is not None)
        or []
    }
    found = [rewards.get(row["id"], [None] * len(row["candidates"])) for row in run.candidates]
    with contextlib.suppress(ValueError):  # of other candidates
        run.candidates = with_rewards(run.candidates, found)


def _folders(path: epath.Path) -> list[epath.Path]:
    return sorted(path.iterdir()) if path.is_dir() else []


def _read_training(run: Run) -> None:
    rows, damaged = read_rows(run.workdir / "metrics.jsonl")
    if damaged:
        run.notes.append(f"metrics.jsonl: {damaged} lines are damaged and left out.")
    run.steps = [row for row in rows if not is_evaluation(row)]
    run.held_out = [row for row in rows if is_evaluation(row)]
    try:
        manifest = run.workdir.manifest(ADAPTER)
    except UserError as error:
        run.notes.append(str(error))
        return
    run.has_adapter = manifest is not None
    if manifest:
        run.options = manifest["options"] | run.options
    elif run.steps:
        run.notes.append(f"Training is under way, or was stopped: {len(run.steps)} steps are done.")


def _read_evaluations(run: Run) -> None:
    for folder in _folders(run.workdir / "eval"):
        try:
            manifest = read_manifest(folder / "manifest.json")
            if manifest is None:
                continue
            metrics = comparison.read_metrics(folder)
            examples, bad = _lines(folder / "examples.jsonl", _is_example)
        except (UserError, OSError) as error:
            run.notes.append(first_line(error))
            continue
        run.metrics[folder.name], run.examples[folder.name] = metrics, examples
        run.options = manifest["options"] | run.options  # of the others there is one each
        if bad:
            run.notes.append(f"{folder.name}: {bad} lines of examples.jsonl are damaged and left out.")
    run.metrics = comparison.in_order(run.metrics)
    for folder in _folders(run.workdir / ".parts"):
        stage = folder.name.rpartition("-")[0]
        if stage.startswith("evaluate-"):
            run.notes.append(f"{stage.replace('-', ' ', 1)} is under way, or was stopped.")


def _stages(workdir: Workdir) -> list[dict]:
    path = workdir / "stages.jsonl"
    is_row = lambda row: _has_texts(row, "stage", "command") and is_number(row["seconds"])
    return _lines(path, is_row)[0] if path.is_file() else []
