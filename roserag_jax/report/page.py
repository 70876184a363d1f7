"""The report's page: one HTML file that needs no network, from the templates and scripts beside this module.

What the page computes nothing from is written by the templates; charts and lists are drawn by its script from JSON.
Every text of the run is data: the templates escape it, the JSON cannot end its element, the script sets text only, and
a content security policy lets nothing run but the script of the page itself, known by its hash.
"""

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.report import terms
from roserag_jax.report.curves import curves
from roserag_jax.report.funnel import funnel
from roserag_jax.report.overview import summary
from roserag_jax.report.questions import questions
from roserag_jax.report.runs import Run, read_run
from roserag_jax.report.several import comparison_of
from roserag_jax.report.systems import differences, evaluation
from roserag_jax.workdir import write_atomic

NAME = "report.html"  # in the workdir
LARGEST = 5_000_000  # bytes of the page
_MOST = 1000  # questions in a list; of larger runs, evenly spaced ones
_COMPRESSED_FROM = 500_000  # bytes of JSON
_SCRIPTS = ("elements.js", "charts.js", "questions.js", "differences.js", "page.js")


def write_page(workdirs: list[str], output: str = "") -> epath.Path:
    """Write the report of a workdir, compared with others if there are several; returns where it is.

    Args:
      output: the file; empty is report.html in the first workdir.

    Raises:
      UserError: a workdir does not exist or holds nothing of a run, or a folder is where the page is to be.
    """
    runs = [read_run(path) for path in workdirs]
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = "/".join(run.workdir.path.parts[-2:])
    path = epath.Path(output).expanduser() if output else runs[0].workdir / NAME
    if path.is_dir():
        raise UserError(f"{path} is a folder; move it away, or name a file with --output.")
    write_atomic(path, page(runs).encode("utf-8", "replace"))  # half a surrogate pair is no text
    return path


def page(runs: list[Run]) -> str:
    """The page as text; lists are sampled until it is small enough."""
    run, most = runs[0], _MOST
    sections = {
        "summary": summary(run),
        "funnel": funnel(run),
        "training": curves(run),
        "evaluation": evaluation(run),
        "comparison": comparison_of(runs),
    }
    while True:
        lists = {"questions": questions(run, most), "differences": differences(run, most)}
        text = _render(run, sections, lists)
        if len(text.encode("utf-8", "replace")) <= LARGEST or most <= 10:
            return text
        most = most * 2 // 3


def _render(run: Run, sections: dict[str, Any], lists: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("roserag_jax.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    script, style = "\n".join(map(_source, _SCRIPTS)), _source("style.css")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    )
    charts = {
        "histograms": (sections["funnel"] or {}).get("histograms", []),
        **{name: _charts(sections[name]) for name in ("training", "evaluation", "comparison")},
    }
    results, table = run.metrics, sections["summary"]["scores"]
    words = {
        "funnel": terms.FUNNEL,
        "scores": terms.of_scores(results, table.header) if table else [],
        "tests": terms.TESTS,
    }
    return environment.get_template("page.html").render(
        run=run,
        policy=policy,
        script_source=markupsafe.Markup(script),
        style=markupsafe.Markup(style),
        charts=_embedded(charts),
        lists=_embedded(lists),
        words=words,
        counts={name: (len(found["rows"]), found["total"]) for name, found in lists.items()},
        **sections,
    )


def _charts(section: dict[str, Any] | None) -> dict[str, Any]:
    return {name: (section or {}).get(name, []) for name in ("charts", "intervals")}


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the policy knows an element's content by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embedded(value: Any) -> dict[str, Any]:
    """JSON for a script element, as its `text`, and how it is `encoded`: '' or 'gzip' (in base64)."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if len(text) < _COMPRESSED_FROM:
        for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
            text = text.replace(character, escape)  # nothing can end the element, or begin a comment in it
        return {"text": markupsafe.Markup(text), "encoded": ""}
    packed = gzip.compress(text.encode("utf-8", "replace"), 9, mtime=0)
    return {"text": base64.b64encode(packed).decode(), "encoded": "gzip"}
