"""The training step: the same on every mesh and in microbatches, and what a non-finite step does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LORA, PAIRS

from roserag_jax.distributed.collectives import count_collectives
from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files
from roserag_jax.models.lora import LoRAConfig
from roserag_jax.training.objective import Objective
from roserag_jax.training.pair_loader import Stream
from roserag_jax.training.train_step import TrainStep, adamw

torch = pytest.importorskip("torch")


def run_steps(opened, mesh, steps=3, accumulate=1, lora=LORA, objective=None, together=None):
    """Losses of the first steps on all pairs, and the state after them."""
    base = loading.load_base(opened, jnp.dtype("float32"), mesh)
    adapter = loading.init_adapter(opened.config, lora, mesh, jax.random.key(0))
    stream = Stream(PAIRS, batch=8, pad_id=0, epochs=steps)
    step = TrainStep(
        loading.assemble(opened.config, base, lora, adapter),
        mesh,
        objective=objective or Objective("orpo", 0.3),
        optimizer=adamw(1e-2, steps=len(stream)),
        accumulate=accumulate,
        together=together,
    )
    state, losses = step.init(), []
    for number in range(len(stream)):
        state, metrics = step(state, stream.collate(number), number)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def llama(tiny_folder):
    return model_files.open_model(str(tiny_folder("llama")[0]))


@pytest.fixture(scope="module")
def losses_of_one_device(llama, one_device):
    return run_steps(llama, one_device)[0]


@pytest.mark.parametrize(
    ("shape", "together"), [((1, 2, 4), False), ((2, 2, 2), True)], ids=["apart", "prompts and branches together"]
)
def test_train_step_on_a_mesh_equals_one_device(shape, together, llama, losses_of_one_device):
    losses, _ = run_steps(llama, make_mesh(*shape), together=together)
    np.testing.assert_allclose(losses, losses_of_one_device, atol=1e-5)
    assert losses[-1] < losses[0]


def test_train_step_in_microbatches_equals_full_batch(llama, one_device):
    """Unequal lengths and a row that only fills the batch included."""
    objective = Objective("orpo", 0.3, sft_span="prompt+response")  # its mean is over the tokens of all microbatches
    expected, _ = run_steps(llama, one_device, steps=2, objective=objective)
    losses, _ = run_steps(llama, one_device, steps=2, accumulate=4, objective=objective, together=True)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_train_step_with_dropout_is_random_and_repeatable(llama, one_device, losses_of_one_device):
    run = lambda: run_steps(
        llama, one_device, lora=LoRAConfig(4, 8.0, 0.5), objective=Objective("orpo", 0.3, dropout=True)
    )[0]
    first = run()
    assert first == run() and first != losses_of_one_device


_LATER = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "cpo")]


@pytest.mark.parametrize("loss", ["dpo", "simpo", *_LATER])
def test_train_step_learns_with_every_loss(loss, llama, one_device):
    """The reward of chosen rises over that of rejected; the reference model starts as the model itself."""
    losses, _ = run_steps(llama, one_device, steps=3, objective=Objective(loss, 0.5, remat="none"))
    assert losses[-1] < losses[0]
    at_start = {"dpo": np.log(2), "ipo": 1.0}
    assert loss not in at_start or losses[0] == pytest.approx(at_start[loss], abs=1e-5)


def test_train_step_with_sft_raises_the_chosen(llama, one_device):
    losses, _ = run_steps(llama, one_device, steps=4, objective=Objective("sft"))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("where", ["weights", "learning_rate"])
def test_train_step_skips_nonfinite_updates(where, llama, one_device):
    """NaN in the loss, or a learning rate with which the update overflows: adapter and moments stay as they were."""
    base = loading.load_base(llama, jnp.dtype("float32"), one_device)
    adapter = loading.init_adapter(llama.config, LORA, one_device, jax.random.key(0))
    model = loading.assemble(llama.config, base, LORA, adapter)
    if where == "weights":
        model.embed[...] = model.embed[...].at[PAIRS[0].prompt[0]].set(jnp.nan)
    optimizer = adamw(1e-2 if where == "weights" else 1e300, steps=9)
    step = TrainStep(model, one_device, optimizer=optimizer, skip_nonfinite=True)
    before = jax.tree.map(np.asarray, step.init())
    state, metrics = step(step.init(), Stream(PAIRS[:1], batch=1, pad_id=0).collate(0), 0)
    assert np.isfinite(metrics["loss"]) == (where == "learning_rate") and not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_adamw_learns_in_the_last_step_too():
    schedule = adamw(1e-2, steps=9).schedule
    assert 0 < schedule(9) < schedule(8) and schedule(1) == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("shape", "together"),
    [
        ((8, 1, 1), False),
        pytest.param((8, 1, 1), True, marks=pytest.mark.slow),
        ((1, 8, 1), False),
        ((1, 8, 1), True),
    ],
    ids=["replicated", "replicated, together", "fsdp", "fsdp, together"],
)
def test_train_step_sends_no_more_than_it_must(shape, together, llama):
    """Compiled from shapes alone. Replicated, only the adapter's gradients and the metrics are summed; in fsdp, each
    layer is gathered once forward and once backward, and activations stay where they are."""
    abstract = loading.abstract_model(llama.config, LORA, jnp.dtype("float32"))
    batch = Stream(PAIRS, batch=8, pad_id=0).collate(0)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    mesh = make_mesh(*shape)
    step = TrainStep(abstract, mesh, optimizer=adamw(1e-2, steps=9), together=together)
    for leaf in jax.tree.leaves(step.abstract_state):
        assert isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding.mesh == mesh
    lowered = step.lower(shapes)
    compiled = lowered.compile()
    assert compiled.memory_analysis().temp_size_in_bytes > 0
    traffic = count_collectives(compiled.as_text())
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    adapter, weights = size(step.adapter), size(step.base)
    twice = 2 * 7 / 8  # a ring sends each device's part of an array to the seven others, and the sums again
    if shape[0] == 8:
        # The means over the batch are summed, and the weights that they divide by.
        means = len(lowered.out_info[1].keys() - {"gradient_norm", "learning_rate", "finite"})
        assert set(traffic) == {"all-reduce"} and traffic["all-reduce"].bytes == twice * (adapter + 4 * (means + 1))
    else:
        assert "collective-permute" not in traffic and traffic["all-reduce"].bytes <= twice * adapter + 1000
        assert sum(each.bytes for each in traffic.values()) <= 2 * weights + 4 * adapter + 1e5
        assert traffic["all-gather"].bytes <= 2 * (weights + adapter)
