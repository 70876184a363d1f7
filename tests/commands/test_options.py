"""The option table: defaults, bounds, choices, and what only makes sense together."""

import importlib
from pathlib import Path

import pytest

from roserag_jax import options
from roserag_jax.errors import UserError

CONFIGS = sorted(f.stem for f in (Path(__file__).parents[2] / "configs").glob("[a-z]*.py") if f.stem != "base")


@pytest.fixture
def config():
    config = options.defaults()
    config.model, config.workdir = "model", "runs/x"
    options.validate(config)
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_options_of_every_configuration_are_valid(name):
    module = importlib.import_module(f"configs.{name}")
    options.validate(module.get_config())
    for field in ("Command:", "Hardware:", "Time:", "Result:"):
        assert field in module.__doc__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select.strategy": "hardest"}, "config.select.strategy='hardest': choose one of hard, easy, random, all"),
        ({"train.learning_rate": float("nan")}, "config.train.learning_rate=nan: must be a finite number"),
        ({"train.beta": float("inf")}, "config.train.beta=inf: must be a finite number"),
        ({"train.epochs": 0}, "config.train.epochs=0: must be at least 1"),
        ({"generate.min_p": 1.5}, "config.generate.min_p=1.5: must be at most 1"),
        ({"generate.top_p": 0.0}, "config.generate.top_p=0.0: must be more than 0"),
        ({"lora.dropout": 1.0}, "config.lora.dropout=1.0: must be less than 1"),
        ({"seed": 2**32}, "config.seed=4294967296: must be at most 4294967295"),
        ({"mesh.fsdp": 0}, "config.mesh.fsdp=0: 'auto', a number of devices, or -1"),
        ({"mesh.data": "all"}, "config.mesh.data='all': 'auto', a number of devices, or -1"),
        ({"prompt.examples": 3}, "config.prompt.examples=3: must be at most 2"),
        ({"prompt.stop": ("",)}, "config.prompt.stop=('',): a tuple of texts"),
        ({"lora.targets": ("q_proj", "x")}, "['x'] unknown; known: q_proj"),
        ({"evaluate.noise": ("loud",)}, "config.evaluate.noise=('loud',)"),
        ({"evaluate.passages": (0,)}, "config.evaluate.passages=(0,): a tuple of numbers from 1"),
        ({"model": ""}, "config.model='': name a Hub id"),
        ({"workdir": ""}, "config.workdir='': name the folder"),
        ({"data.train": "caf\udce9.jsonl"}, "is not UTF-8 text; rename"),
        ({"evaluate.adapters": ("caf\udce9",)}, "is not UTF-8 text; rename"),
        ({"evaluate.adapters": ("",)}, "config.evaluate.adapters=('',): a tuple of names of folders"),
        ({"serve.host": ""}, "config.serve.host='': name an address; an empty one would be every address"),
        (
            {
                "select.labels": "reward",
                "select.reward_model": "m",
                "generate.guided_samples": 0,
                "select.match": "contains",
            },
            "config.select.match='contains': takes effect with config.select.labels=gold or self_consistency only",
        ),
        ({"train.gamma": 1.0}, "config.train.gamma=1.0: config.train.loss='orpo' has no such term"),
        ({"retrieve.cache": "c.json"}, "is read with config.retrieve.retriever=cache only"),
        ({"retrieve.retriever": "bm25"}, "config.retrieve.corpus='': bm25 needs"),
        ({"train.batch": 8, "train.accumulate": 3}, "config.train.accumulate=3: must divide config.train.batch=8"),
        ({"train.keep": "best"}, "config.train.keep='best': needs held-out pairs"),
        (
            {"data.pairs": "p", "train.held_out": 0.3, "train.answer_questions": 2},
            "config.train.answer_questions=2: pairs made elsewhere",
        ),
        ({"prompt.passages": 0, "evaluate.noise": ("none", "random1")}, "config.prompt.passages=0 shows no passages"),
        ({"evaluate.systems": ()}, "config.evaluate.systems=(): name at least one system"),
        ({"generate.plain_samples": 0, "generate.guided_samples": 1}, "a pair needs at least two candidates"),
        ({"select.rejection": False, "generate.plain_samples": 0}, "config.select.rejection=False: without it both"),
    ],
)
def test_options_that_are_not_allowed_are_named(config, changes, message):
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError) as error:
        options.validate(config)
    assert message in str(error.value)


def test_options_have_help_and_allowed_defaults(config):
    for name, option in options.walk():
        assert len(option.help.split()) >= 3 and option.help[0].isascii(), name
        assert name in ("model",) or option.fault(option.default) is None, name
