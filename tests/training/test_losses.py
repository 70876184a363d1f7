"""Losses: TRL's and torch's numbers, in value and gradient, no NaN anywhere, and a registry that all else follows."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from roserag_jax import options
from roserag_jax.errors import UserError
from roserag_jax.training import losses
from roserag_jax.training.losses import LOSSES, PairLogprobs
from roserag_jax.training.objective import Objective

torch = pytest.importorskip("torch")
RNG = np.random.default_rng(0)
CPU = types.SimpleNamespace(device="cpu")


def pair_logprobs(*logprobs, **named) -> PairLogprobs:
    return jax.tree.map(jnp.asarray, PairLogprobs(*logprobs, **named))


def test_orpo_equals_trl():
    """TRL's own `odds_ratio_loss`, called on a bare object that only carries beta."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    chosen, rejected = -RNG.uniform(0.01, 4, (2, 64)).astype(np.float32)
    bare = types.SimpleNamespace(beta=0.3, accelerator=CPU)
    expected = trainer.odds_ratio_loss(bare, torch.tensor(chosen), torch.tensor(rejected))[0].numpy()
    loss, terms = losses.orpo(pair_logprobs(chosen, rejected, log_likelihood=chosen), beta=0.3)
    np.testing.assert_allclose(0.3 * terms["odds_loss"], -expected, rtol=1e-5)
    np.testing.assert_allclose(loss, -chosen - expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "smoothing"), [("simpo", 0.0), ("simpo", 0.2), ("sigmoid", 0.1), ("ipo", 0.0)])
def test_simpo_cpo_and_ipo_equal_trl(kind, smoothing):
    """TRL's `cpo_loss`, of sums or of means; IPO's with a reference is the same of differences."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    chosen, rejected, *reference = -RNG.uniform(0.01, 9, (4, 64)).astype(np.float32)
    bare = types.SimpleNamespace(beta=0.7, simpo_gamma=0.4, label_smoothing=smoothing, loss_type=kind, alpha=0.0)
    bare.accelerator = CPU
    if kind == "ipo":
        sides = torch.tensor(chosen - reference[0]), torch.tensor(rejected - reference[1])
        loss, _ = losses.ipo(pair_logprobs(chosen, rejected, *reference), beta=0.7)
    else:
        sides = torch.tensor(chosen), torch.tensor(rejected)
        loss, _ = losses.simpo(pair_logprobs(chosen, rejected), 0.7, 0.4, smoothing)
        if kind == "sigmoid":
            loss, terms = losses.cpo(pair_logprobs(chosen, rejected, log_likelihood=chosen / 9), 0.7, 2.0, smoothing)
            loss -= 2.0 * terms["nll"]
    np.testing.assert_allclose(loss, trainer.cpo_loss(bare, *sides)[0], rtol=1e-5, atol=1e-6)


def test_dpo_equals_torch():
    chosen, rejected, *reference = -RNG.uniform(0.01, 90, (4, 64)).astype(np.float32)
    margin = torch.tensor(0.2 * ((chosen - reference[0]) - (rejected - reference[1])))
    logsigmoid = torch.nn.functional.logsigmoid
    expected = -0.9 * logsigmoid(margin) - 0.1 * logsigmoid(-margin)
    loss, terms = losses.dpo(pair_logprobs(chosen, rejected, *reference), 0.2, 0.1)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms["reward_margin"], margin, rtol=1e-5)


def test_orpo_gradient_equals_torch():
    chosen, rejected = -RNG.uniform(0.01, 4, (2, 32))
    c, r = (torch.tensor(x, requires_grad=True) for x in (chosen, rejected))
    odds = lambda x: x - torch.log1p(-torch.exp(x))
    (-c - 0.25 * torch.nn.functional.logsigmoid(odds(c) - odds(r))).sum().backward()
    total = lambda c, r: losses.orpo(pair_logprobs(c, r, log_likelihood=c), 0.25)[0].sum()
    of_chosen, of_rejected = jax.grad(total, argnums=(0, 1))(jnp.array(chosen), jnp.array(rejected))
    np.testing.assert_allclose(of_chosen, c.grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(of_rejected, r.grad, rtol=1e-4, atol=1e-6)


def test_orpo_is_finite_at_certainty():
    """A response of probability one, or next to none, gives finite loss and gradient."""
    extremes = jnp.array([0.0, -1e-12, -1e-9, -1e-6, -0.6931472, -1.0, -50.0, -1e4])
    pair = tuple(a.ravel() for a in jnp.meshgrid(extremes, extremes))
    total = lambda pair: losses.orpo(pair_logprobs(*pair, log_likelihood=pair[0]), 0.5)[0].sum()
    value, gradients = jax.value_and_grad(total)(pair)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_log1mexp_is_accurate():
    x = -np.logspace(-8, 1.9, 200).astype(np.float32)
    exact = np.log1p(-np.exp(x.astype(np.longdouble)))
    np.testing.assert_allclose(losses.log1mexp(jnp.asarray(x)), exact.astype(np.float64), rtol=2e-6, atol=1e-37)


def test_losses_are_choices_and_are_described():
    """A registered loss is an option's choice, stands in its help, and its hyper-parameters are options."""
    option = options.OPTIONS["train"]["loss"]
    assert option.choices == tuple(LOSSES) and all(f"{name}: " in option.help for name in LOSSES)
    for name, spec in LOSSES.items():
        assert set(spec.options) <= set(options.OPTIONS["train"]), name
        pair = pair_logprobs(*-jnp.ones((5, 3)))
        value, terms = Objective(name)(pair)
        assert value.shape == (3,) and all(term.shape == (3,) for term in terms.values())
        assert ("reward_margin" in terms) == spec.rejected


@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_options_that_are_not_theirs(name):
    """Every hyper-parameter of any loss, changed: taken by the losses that use it, refused by name by the others."""
    changed = {"beta": 0.7, "gamma": 0.7, "sft_weight": 0.7, "label_smoothing": 0.1, "sft_span": "prompt+response"}
    assert set(changed) == {option for spec in LOSSES.values() for option in spec.options}
    for option, value in changed.items():
        config = options.defaults()
        config.model, config.workdir, config.train.loss = "m", "w", name
        config.train[option] = value
        if option in LOSSES[name].options:
            options.validate(config)
        else:
            with pytest.raises(UserError, match=rf"config.train.{option}=.*{name}.*no such term \(it is for "):
                options.validate(config)
    config = options.defaults()
    config.model, config.workdir, config.train.loss, config.train.beta = "m", "w", name, 0.0
    if name == "orpo":  # plain supervised fine-tuning
        options.validate(config)
    else:
        with pytest.raises(UserError, match=r"config.train.beta=0.0: "):
            options.validate(config)
