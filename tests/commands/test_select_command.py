"""`select` as a command: what becomes out of date, and a run without any pair."""

import pytest

from roserag_jax import select
from roserag_jax.errors import UserError


def test_select_rebuilds_only_what_depends_on_an_option(finished, config_of, questions, capsys):
    again = config_of(questions, finished.workdir, **{"select.confidence": "sum", "generate.batch": 3})
    capsys.readouterr()
    select.run(again)
    out = capsys.readouterr().out
    assert "candidates.jsonl is up to date" in out
    assert "pairs.jsonl is out of date (config.select.confidence was 'mean', now 'sum')" in out
    select.run(finished)
    assert "now 'mean'" in capsys.readouterr().out


def test_select_without_any_pair_is_an_error(config_of):
    with pytest.raises(UserError, match=r"No pair survived selection: of 6 questions .*none correct"):
        select.run(config_of())
