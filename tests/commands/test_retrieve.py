"""`retrieve`: whose questions a workdir holds."""

import pytest

from roserag_jax import evaluate, generate
from roserag_jax.errors import UserError
from roserag_jax.workdir import Workdir, digest


def test_retrieve_never_replaces_user_data_by_synthetic_questions(finished, config_of):
    """A later command without the options that name the questions is refused, and nothing is made again."""
    work = Workdir(finished.workdir)
    before = [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]
    with pytest.raises(UserError, match=r"data.eval='synthetic', but .*/retrieved_eval.jsonl is of .*/eval.jsonl"):
        evaluate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match=r"data.train='synthetic', but .*/retrieved.jsonl is of .*/train.jsonl"):
        generate.run(config_of(workdir=finished.workdir))
    with pytest.raises(UserError, match="evaluated on synthetic questions"):
        evaluate.run(config_of(finished.data.train, **{"data.eval": "synthetic"}))
    assert before == [digest(work / name) for name in ("retrieved.jsonl", "retrieved_eval.jsonl")]
