"""Official files, tables and plots of finished evaluations."""

import json
import random

import pytest

from roserag_jax import evaluate
from roserag_jax.errors import UserError
from roserag_jax.report import plot, tables


def test_strategyqa_predictions():
    rng = random.Random(0)
    rows = [
        {"id": str(i), "prediction": rng.choice(["yes", "No way", "hm"]), "scores": {"accuracy": 1.0}} for i in range(6)
    ]
    files = evaluate._official(rows)
    found = json.loads(files["predictions_strategyqa.json"])
    expected = {"yes": True, "No way": False, "hm": None}
    assert {i: row["answer"] for i, row in found.items()} == {r["id"]: expected[r["prediction"]] for r in rows}
    rows[0]["scores"]["accuracy"] = None
    assert set(evaluate._official(rows)) == {"predictions.json"}


def test_markdown():
    assert tables.markdown(["a", "b"], [["x|y", "1  [0]"]]) == "| a | b |\n|---|---:|\n| x\\|y | 1 [0] |"


def evaluation(system, passages, noise, em):
    bounds = {f"{m}_interval": [em - 5.0, em + 5.0] for m in ("em", "f1")}
    return {"system": system, "passages": passages, "noise": noise, "em": em, "f1": em, "questions": 9, **bounds}


def test_plots(tmp_path):
    """Curves in the order of the axis, each system its line; the picture names them."""
    runs = [("base", k, "none", 20.0 + k) for k in (10, 1, 5)] + [("rose", 5, n, 40.0) for n in ("random10", "none")]
    runs += [("rose", 5, n, 30.0) for n in ("random2", "shuffled")] + [("closed_book", 0, "none", 10.0)]
    results = {f"{s}-{k}-{n}" if k else s: evaluation(s, k, n, em) for s, k, n, em in runs}
    axis, lines = plot.curves(results, "passages")
    assert (
        axis == [1, 5, 10]
        and [lines["base"][k]["em"] for k in axis] == [21.0, 25.0, 30.0]
        and set(lines["rose"]) == {5}
    )
    assert plot.curves(results, "noise")[0] == ["none", "shuffled", "random2", "random10"]
    with pytest.raises(UserError, match="There are 1 values of noise"):
        plot.curves(results, "noise", passages=10)
    pytest.importorskip("matplotlib")
    for over in ("passages", "noise"):
        plot.draw(results, tmp_path / f"{over}.png", over)
        plot.draw(results, tmp_path / f"{over}.svg", over, "f1")
        assert (tmp_path / f"{over}.png").stat().st_size > 5000 and (tmp_path / f"{over}.svg").stat().st_size > 5000
