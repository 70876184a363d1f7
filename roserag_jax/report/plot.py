"""A curve per system over the number of passages or over noise, from the metrics of finished evaluations.

    python -m roserag_jax.report.plot runs/study/eval --over passages --output passages.svg
    python -m roserag_jax.report.plot runs/study/eval --over noise --metric f1 --output noise.png

Bars are bootstrap 95% intervals over questions; the closed book is a dashed line. Needs matplotlib:
`pip install -e '.[report]'`.
"""

import argparse
import collections
from pathlib import Path

from etils import epath

from roserag_jax import cli
from roserag_jax.errors import UserError, first_line
from roserag_jax.rag.metrics import MEASURES
from roserag_jax.rag.noise import CONDITIONS, parse
from roserag_jax.report.comparison import load


def curves(results: dict[str, dict], over: str, noise: str = "none", passages: int = 0) -> tuple[list, dict]:
    """Where the points of each system stand: the values along the axis, and `{system: {value: metrics}}`.

    Args:
      over: 'passages' or 'noise'.
      noise: the condition that curves over passages are of.
      passages: K of the curves over noise; 0 is the one with the most evaluations.

    Raises:
      UserError: there are not two values to draw a curve through.
    """
    found = [r for r in results.values() if r["system"] != "closed_book"]
    if over == "passages":
        found = [r for r in found if r["noise"] == noise]
    elif found:
        passages = passages or collections.Counter(r["passages"] for r in found).most_common(1)[0][0]
        found = [r for r in found if r["passages"] == passages]
    lines = collections.defaultdict(dict)
    for result in found:
        lines[result["system"]][result[over]] = result
    kinds = list(CONDITIONS)

    def order(value):
        if over == "passages":
            return value
        kind, number = parse(value)
        return kinds.index(kind), number

    axis = sorted({value for line in lines.values() for value in line}, key=order)
    if len(axis) < 2:
        raise UserError(f"There are {len(axis)} values of {over} to draw; evaluate more (config.evaluate.{over}).")
    return axis, dict(lines)


def draw(results: dict[str, dict], output: Path, over: str, metric: str = "em", **which) -> None:
    """Write the picture; its format is the file's ending, .svg or .png.

    Raises:
      UserError: matplotlib is not installed, or there is nothing to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Plots need matplotlib: pip install -e '.[report]'.") from error
    results = {name: result for name, result in results.items() if metric in result}
    axis, lines = curves(results, over, **which)
    places = axis if over == "passages" else list(range(len(axis)))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    shift = (max(places) - min(places)) / 120  # so that bars at one place do not hide one another
    for number, (system, line) in enumerate(lines.items()):
        at = [(place, line[value]) for place, value in zip(places, axis, strict=True) if value in line]
        scores = [result[metric] for _, result in at]
        bars = [[abs(r[metric] - r[f"{metric}_interval"][side]) for _, r in at] for side in (0, 1)]
        moved = [place + shift * (number - (len(lines) - 1) / 2) for place, _ in at]
        style = "o-" if over == "passages" else "o:"  # conditions are no scale: the line only guides the eye
        axes.errorbar(moved, scores, bars, fmt=style, capsize=3, markersize=4, label=system)
    if "closed_book" in results:
        axes.axhline(results["closed_book"][metric], color="grey", linestyle="--", linewidth=1, label="closed_book")
    axes.set_xticks(places, [str(value).replace("_", " ") for value in axis], rotation=0 if over == "passages" else 30)
    questions = {result["questions"] for line in lines.values() for result in line.values()}
    axes.set_xlabel({"passages": "passages shown (K)", "noise": "noise"}[over])
    axes.set_ylabel(f"{MEASURES[metric]} (%), {'/'.join(map(str, sorted(questions)))} questions")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)  # inside it would lie over the bars
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the eval folder of a workdir")
    parser.add_argument("--over", choices=("passages", "noise"), default="passages")
    parser.add_argument("--metric", choices=tuple(MEASURES), default="em")
    parser.add_argument("--noise", default="none", help="the condition that curves over passages are of")
    parser.add_argument("--passages", type=int, default=0, help="K of the curves over noise")
    parser.add_argument("--output", required=True, help="a file that ends in .svg or .png")
    arguments = parser.parse_args()
    which = {"noise": arguments.noise, "passages": arguments.passages}
    try:
        draw(load(epath.Path(arguments.folder)), Path(arguments.output), arguments.over, arguments.metric, **which)
    except ValueError as error:  # no such format
        raise UserError(f"--output {arguments.output}: {first_line(error)}.") from error


if __name__ == "__main__":
    cli.guard(main)
