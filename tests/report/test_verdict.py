"""What the evaluations while training say."""

from roserag_jax.report.verdict import verdict

STEPS = [{"step": s, "loss": 1.0, "margin": s / 10} for s in range(1, 5)]


def evaluation(step, f1):
    return {"step": step, "held_out_loss": 1.0, "held_out_margin": 0.1, "held_out_f1": f1}


def test_verdict_names_overfitting():
    """The margin in training grows while F1 falls."""
    text = verdict(STEPS, [evaluation(0, 10.0), evaluation(2, 30.0), evaluation(4, 20.0)], "latest")
    assert "from step 2 to 4 training's margin goes from 0.150 to 0.350, the held-out f1 from 30.000 to 20.000" in text
    assert "keep='best'" in text
    text = verdict(STEPS, [evaluation(0, 30.0), evaluation(4, 20.0)], "best")
    assert "from step 0 to 4 training's margin goes to 0.250, the held-out f1 from 30.000" in text
    assert "keep" not in text


def test_verdict_without_overfitting_is_a_table():
    text = verdict(STEPS, [evaluation(0, 10.0), evaluation(2, 20.0), evaluation(4, 30.0)], "latest")
    assert "Overfitting" not in text and "held-out f1" in text and "20.000" in text


def test_verdict_of_steps_that_were_lost():
    """Steps that the log has lost leave their cells empty."""
    text = verdict(STEPS[2:], [evaluation(0, 10.0), evaluation(2, 20.0), evaluation(4, 30.0)], "latest")
    assert text.count("0.350") == 1 and "0.150" not in text
    assert "20.000" in verdict([], [evaluation(2, 20.0)], "latest")
