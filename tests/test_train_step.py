"""The training step: torch and peft's gradient, and what must change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_files
from flax import nnx

from roserag_jax.models import adapter as adapters
from roserag_jax.models import source, weights
from roserag_jax.models.lora import LoRAConfig, LoRAParam
from roserag_jax.runtime.loader import Pair, Stream, epoch_order
from roserag_jax.runtime.mesh import make_mesh
from roserag_jax.runtime.train_step import Objective, TrainStep, make_optimizer, pair_losses

torch = pytest.importorskip("torch")
LORA = LoRAConfig(4, 8.0)
RNG = np.random.default_rng(0)
PAIRS = [
    Pair(f"q{i}", RNG.integers(3, 131, p).tolist(), RNG.integers(3, 131, c).tolist(), RNG.integers(3, 131, r).tolist())
    for i, (p, c, r) in enumerate([(20, 5, 9), (33, 12, 3), (9, 7, 7), (14, 2, 11), (25, 6, 6), (30, 8, 4), (5, 5, 5)])
]
BEGINNING = RNG.integers(3, 131, 40).tolist()


def adapter_with_life(opened, mesh):
    state = weights.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), state)


def gradient(model, batch, objective, shared=None):
    """Adapter gradient of the mean loss over the real rows, by path."""
    graph, adapter, base = nnx.split(model, LoRAParam, ...)

    def loss(adapter):
        losses, _ = pair_losses(nnx.merge(graph, adapter, base), batch, objective, shared)
        return (losses * batch.weights).sum() / batch.weights.sum()

    value, grads = jax.jit(jax.value_and_grad(loss))(adapter)
    return float(value), {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}


def test_orpo_gradient_equals_peft(tiny_folder, tiny_llama, one_device, tmp_path):
    """Loss and LoRA gradient of unequal pairs, against peft on transformers with the prompt repeated."""
    peft = pytest.importorskip("peft")
    import transformers

    opened, base = tiny_llama
    state = adapter_with_life(opened, one_device)
    write_files(tmp_path, adapters.to_files(state, LORA, ""))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path, is_trainable=True)

    def mean_logprob(pair, response):
        tokens = torch.tensor([pair.prompt + response])
        logits = theirs(tokens).logits[0, len(pair.prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, tokens[0, len(pair.prompt) :, None]).mean()

    odds = lambda x: x - torch.log1p(-torch.exp(x))
    total = 0
    for pair in PAIRS[:4]:
        chosen, rejected = mean_logprob(pair, pair.chosen), mean_logprob(pair, pair.rejected)
        total += (-chosen - 0.3 * torch.nn.functional.logsigmoid(odds(chosen) - odds(rejected))) / 4
    total.backward()

    batch = Stream(PAIRS[:4], 4, 1, 0, 0).collate(0)
    model = weights.assemble(opened.config, base, LORA, state)
    value, ours = gradient(model, batch, Objective("orpo", 0.3, remat="layer"))
    np.testing.assert_allclose(value, total.item(), atol=1e-5)
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        parts = name.split(".")
        layer, projection, kind = int(parts[parts.index("layers") + 1]), parts[-4], parts[-3].lower()
        grad = ours[("layers", projection, kind)][layer].T
        np.testing.assert_allclose(grad, parameter.grad, atol=1e-5, err_msg=name)


def test_what_changes_nothing(tiny_llama, one_device):
    """Remat, padding, the order of rows and a beginning read once leave loss and gradient as they are."""
    opened, base = tiny_llama
    model = weights.assemble(opened.config, base, LORA, adapter_with_life(opened, one_device))
    pairs = [pair._replace(prompt=BEGINNING + pair.prompt) for pair in PAIRS]
    stream = Stream(pairs, 8, 1, 0, 0)
    apart = stream.collate(0)
    assert stream.shared.tolist() == BEGINNING and apart.prompt.shape[1] == 32
    stream.shared = stream.shared[:0]
    batch = stream.collate(0)
    value, expected = gradient(model, batch, Objective("orpo", 0.3, remat="none"))
    wider = batch._replace(
        prompt=np.pad(batch.prompt, ((0, 0), (0, 16)), constant_values=7),
        branches=np.pad(batch.branches, ((0, 0), (0, 0), (0, 16)), constant_values=7),
        targets=np.pad(batch.targets, ((0, 0), (0, 0), (0, 16)), constant_values=7),
    )
    turned = type(batch)(*(a[::-1] for a in batch))
    cases = [(batch, "layer"), (batch, "dots"), (wider, "none"), (turned, "none"), (apart, "none"), (apart, "layer")]
    for other, remat in cases:
        shared = np.array(BEGINNING) if other is apart else None
        other_value, other_gradient = gradient(model, other, Objective("orpo", 0.3, remat=remat), shared)
        np.testing.assert_allclose(other_value, value, atol=1e-5)
        for path, grad in expected.items():
            np.testing.assert_allclose(other_gradient[path], grad, atol=2e-6)


def run_steps(opened, mesh, steps=3, accumulate=1, objective=None):
    base = weights.load_base(opened, jnp.dtype("float32"), mesh)
    model = weights.assemble(
        opened.config, base, LORA, weights.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    )
    stream = Stream(PAIRS, 8, steps, 0, 0)
    optimizer, schedule = make_optimizer(1e-2, len(stream), 0.1, 0.0, 1.0)
    step = TrainStep(model, mesh, objective or Objective("orpo", 0.3), optimizer, schedule, accumulate, 0)
    state, losses = step.initial, []
    for number in range(len(stream)):
        state, metrics = step(state, stream.collate(number), number)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)], ids=str)
def test_sharded_training_equals_one_device(shape, tiny_folder, one_device):
    opened = source.open_source(str(tiny_folder("llama")[0]))
    expected, _ = run_steps(opened, one_device)
    losses, _ = run_steps(opened, make_mesh(*shape))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert expected[-1] < expected[0]


def test_accumulated_equals_full_batch(tiny_folder, one_device):
    """Unequal lengths and a row that only fills the batch included."""
    opened = source.open_source(str(tiny_folder("llama")[0]))
    expected, _ = run_steps(opened, one_device, steps=2)
    losses, _ = run_steps(opened, one_device, steps=2, accumulate=4)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_dropout_is_random_and_repeatable(tiny_folder, one_device):
    opened = source.open_source(str(tiny_folder("llama")[0]))
    global LORA
    plain, LORA = LORA, LoRAConfig(4, 8.0, 0.5)
    try:
        run = lambda: run_steps(opened, one_device, steps=2, objective=Objective("orpo", 0.3, dropout=True))[0]
        first = run()
        assert first == run()
    finally:
        LORA = plain
    assert first != run_steps(opened, one_device, steps=2)[0]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "cpo"])
def test_every_loss_learns(loss, tiny_folder, one_device):
    """The reward of chosen rises over that of rejected; the reference model starts as the model itself."""
    opened = source.open_source(str(tiny_folder("llama")[0]))
    losses, _ = run_steps(opened, one_device, steps=3, objective=Objective(loss, 0.5, remat="none"))
    assert losses[-1] < losses[0]
    at_start = {"dpo": np.log(2), "ipo": 1.0}
    assert loss not in at_start or losses[0] == pytest.approx(at_start[loss], abs=1e-5)


def test_sft_raises_the_chosen(tiny_folder, one_device):
    opened = source.open_source(str(tiny_folder("llama")[0]))
    losses, _ = run_steps(opened, one_device, steps=4, objective=Objective("sft"))
    assert losses[-1] < losses[0]


def test_order_is_a_function_of_the_step():
    """Every pair once an epoch, epochs differ, and a stream that begins late goes on with the same batches."""
    lengths = RNG.integers(10, 100, 37).tolist()
    first, second = epoch_order(lengths, 4, 0, 0), epoch_order(lengths, 4, 0, 1)
    assert sorted(i for batch in first for i in batch) == list(range(37)) and first != second
    assert first == epoch_order(lengths, 4, 0, 0)
    stream = Stream(PAIRS, 2, 2, 0, 0)
    whole, late = list(stream.start(0)), list(stream.start(3))
    assert len(whole) == 8 and len(late) == 5
    for a, b in zip(whole[3:], late, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_batch_says_what_is_real():
    """A pair's arrays: the prompt's last token opens both branches, and short epochs are filled with weight 0."""
    stream = Stream(PAIRS[:1], 2, 1, 0, 99)
    batch, pair = stream.collate(0), PAIRS[0]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert batch.prompt[0, :19].tolist() == pair.prompt[:-1] and batch.prompt[0, 19:].tolist() == [99] * 13
    assert batch.branches[0, 1, :9].tolist() == [pair.prompt[-1], *pair.rejected[:-1]]
    assert batch.targets[0, 0, :5].tolist() == pair.chosen and batch.response_lengths[0].tolist() == [5, 9]
