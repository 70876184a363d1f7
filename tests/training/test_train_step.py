"""The training step: torch and peft's gradient, and what must change nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_files
from flax import nnx

from roserag_jax.distributed.mesh import make_mesh
from roserag_jax.hub import loading, model_files, peft_adapter
from roserag_jax.models.lora import LoRAConfig, LoRAParam
from roserag_jax.training.pair_loader import Pair, Stream, epoch_order, hold_out, tokenize
from roserag_jax.training.train_step import Objective, TrainStep, make_optimizer, pair_losses, summed_logprobs

torch = pytest.importorskip("torch")
LORA = LoRAConfig(4, 8.0)
RNG = np.random.default_rng(0)
PAIRS = [
    Pair(f"q{i}", RNG.integers(3, 131, p).tolist(), RNG.integers(3, 131, c).tolist(), RNG.integers(3, 131, r).tolist())
    for i, (p, c, r) in enumerate([(20, 5, 9), (33, 12, 3), (9, 7, 7), (14, 2, 11), (25, 6, 6), (30, 8, 4), (5, 5, 5)])
]
BEGINNING = RNG.integers(3, 131, 40).tolist()


def adapter_with_life(opened, mesh):
    state = loading.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    return jax.tree.map(lambda a: a + 0.05 * jax.random.normal(jax.random.key(a.size), a.shape), state)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradient(graph, without, objective, adapter, base, batch, shared):
    def loss(adapter):
        reference = nnx.merge(without, base) if objective.loss == "dpo" else None
        model = nnx.merge(graph, adapter, base)
        losses, _ = pair_losses(model, batch, objective, shared, reference=reference)
        return (losses * batch.weights).sum() / batch.weights.sum()

    return jax.value_and_grad(loss)(adapter)


def gradient(model, batch, objective, shared=None):
    """Adapter gradient of the mean loss over the real rows, by path."""
    graph, adapter, base = nnx.split(model, LoRAParam, ...)
    without = nnx.split(loading.assemble(model.config, base))[0]
    value, grads = _gradient(graph, without, objective, adapter, base, batch, shared)
    return float(value), {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}


def assert_same_gradient(ours, theirs):
    """Our adapter gradient by path, and that of a peft model after `backward`."""
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(found) == sum(len(grad) for grad in ours.values())
    for name, grad in found.items():
        parts = name.split(".")
        layer, projection, kind = int(parts[parts.index("layers") + 1]), parts[-4], parts[-3].lower()
        np.testing.assert_allclose(ours[("layers", projection, kind)][layer].T, grad, atol=1e-5, err_msg=name)


def test_orpo_gradient_equals_peft(tiny_folder, tiny_llama, one_device, tmp_path):
    """Loss and LoRA gradient of unequal pairs, against peft on transformers with the prompt repeated."""
    peft = pytest.importorskip("peft")
    import transformers

    opened, base = tiny_llama
    state = adapter_with_life(opened, one_device)
    write_files(tmp_path, peft_adapter.adapter_files(state, LORA, ""))
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
    model = loading.assemble(opened.config, base, LORA, state)
    value, ours = gradient(model, batch, Objective("orpo", 0.3, remat="layer"))
    np.testing.assert_allclose(value, total.item(), atol=1e-5)
    assert_same_gradient(ours, theirs)


# A common beginning, then rows of unequal length. No response begins with white space: TRL would merge that with the
# end of the prompt, into a token that no prompt has at inference.
ROWS = [
    {
        "id": f"q{i}",
        "prompt": "<|im_start|>system\n" + "Read the passages and say what they say. " * 4 + "<|im_end|>\n"
        f"<|im_start|>user\n{passage}\n\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n",
        "chosen": chosen,
        "rejected": rejected,
    }
    for i, (passage, question, chosen, rejected) in enumerate(
        [
            ("Passage 1: Moss: Moss is green.", "Which colour is moss?", "Passage 1 says green.\nAnswer: green", "red"),
            ("Passage 1: The Hat: A play of 1902.", "When?", "1902", "Passage 1 says nothing of it.\nAnswer: 1903"),
            ("Passage 1: A.\nPassage 2: Ænea, naïve: 3.5 km", "How far?", "3.5 km\n", "Far.\n\nAnswer: 12"),
        ]
    )
]


@pytest.mark.parametrize(("loss", "span"), [("orpo", "prompt+response"), ("dpo", "response")])
def test_trl_trainers(loss, span, smollm_tokenizer, one_device, tmp_path):
    """TRL's own trainers on real text: the same tokens from its tokenisation and collation, the same loss, the same
    LoRA gradient."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    import datasets
    import transformers
    from safetensors.torch import load_file
    from trl.experimental import orpo

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    config = transformers.LlamaConfig(vocab_size=len(smollm_tokenizer), hidden_size=32, initializer_range=0.2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    opened = model_files.open_model(str(tmp_path / "model"))
    state = adapter_with_life(opened, one_device)
    write_files(tmp_path / "adapter", peft_adapter.adapter_files(state, LORA, ""))

    kinds = {"orpo": (orpo.ORPOTrainer, orpo.ORPOConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}
    trainer, arguments = kinds[loss]
    quiet = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    trainer = trainer(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model"),
        args=arguments(str(tmp_path / "out"), beta=0.3, max_length=512, **quiet),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=smollm_tokenizer,
        peft_config=peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    peft.set_peft_model_state_dict(trainer.model, load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    fed = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    theirs = trainer.compute_loss(trainer.model.train(), dict(fed))
    theirs.backward()

    pairs, _ = tokenize(smollm_tokenizer, smollm_tokenizer.eos_token_id, ROWS, 64)
    for side, at in (("chosen", 0), ("rejected", len(ROWS))):
        for i, pair in enumerate(pairs):
            ids, said = pair.prompt + getattr(pair, side), len(getattr(pair, side))
            if loss == "orpo":
                seen, row = fed[f"{side}_attention_mask"][i].bool(), fed[f"{side}_input_ids"][i]
                answer = fed[f"{side}_labels"][i] != -100
            else:
                seen, row, answer = (fed[k][at + i] for k in ("attention_mask", "input_ids", "completion_mask"))
            assert row[seen.bool()].tolist() == ids and answer.sum() == said
    stream = Stream(pairs, 4, 1, 0, 0)
    assert len(stream.shared) > 32
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    model = loading.assemble(opened.config, base, LORA, state)
    value, ours = gradient(model, stream.collate(0), Objective(loss, 0.3, sft_span=span), stream.shared)
    np.testing.assert_allclose(value, theirs.item(), atol=1e-5)
    assert_same_gradient(ours, trainer.model)


def test_what_changes_nothing(tiny_llama, one_device):
    """Remat, padding, the order of rows and a beginning read once leave loss and gradient as they are."""
    opened, base = tiny_llama
    model = loading.assemble(opened.config, base, LORA, adapter_with_life(opened, one_device))
    pairs = [pair._replace(prompt=BEGINNING + pair.prompt) for pair in PAIRS]
    stream = Stream(pairs, 8, 1, 0, 0)
    apart = stream.collate(0)
    assert stream.shared.tolist() == BEGINNING and apart.prompt.shape[1] == 32
    stream.shared = stream.shared[:0]
    batch = stream.collate(0)
    objective = Objective("orpo", 0.3, sft_span="prompt+response", remat="none")
    value, expected = gradient(model, batch, objective)
    wider = batch._replace(
        prompt=np.pad(batch.prompt, ((0, 0), (0, 16)), constant_values=7),
        branches=np.pad(batch.branches, ((0, 0), (0, 0), (0, 16)), constant_values=7),
        targets=np.pad(batch.targets, ((0, 0), (0, 0), (0, 16)), constant_values=7),
    )
    turned = type(batch)(*(a[::-1] for a in wider))
    # Rejected first: a sibling's place changes nothing, so swapping them back gives the same sums.
    swapped = batch._replace(**{n: getattr(batch, n)[:, ::-1] for n in ("branches", "targets", "response_lengths")})
    sums = jax.jit(lambda b: summed_logprobs(model, b)[0])
    np.testing.assert_allclose(sums(swapped)[:, ::-1], sums(batch), atol=1e-4)
    for other, remat in [(batch, "layer"), (turned, "dots"), (apart, "none")]:
        shared = np.array(BEGINNING) if other is apart else None
        other_value, other_gradient = gradient(model, other, dataclasses.replace(objective, remat=remat), shared)
        np.testing.assert_allclose(other_value, value, atol=1e-5)
        for path, grad in expected.items():
            np.testing.assert_allclose(other_gradient[path], grad, atol=2e-6)


def run_steps(opened, mesh, steps=3, accumulate=1, objective=None):
    base = loading.load_base(opened, jnp.dtype("float32"), mesh)
    model = loading.assemble(
        opened.config, base, LORA, loading.init_adapter(opened.config, LORA, mesh, jax.random.key(0))
    )
    stream = Stream(PAIRS, 8, steps, 0, 0)
    optimizer, schedule = make_optimizer(1e-2, len(stream), 0.1, 0.0, 1.0)
    step = TrainStep(model, mesh, objective or Objective("orpo", 0.3), optimizer, schedule, accumulate, 0)
    state, losses = step.initial, []
    for number in range(len(stream)):
        state, metrics = step(state, stream.collate(number), number)
        losses.append(float(metrics["loss"]))
    return losses, state


@pytest.fixture(scope="module")
def losses_of_one_device(tiny_folder, one_device):
    return run_steps(model_files.open_model(str(tiny_folder("llama")[0])), one_device)[0]


@pytest.mark.parametrize("shape", [(1, 2, 4), (2, 2, 2)], ids=str)
def test_sharded_training_equals_one_device(shape, tiny_folder, losses_of_one_device):
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    expected = losses_of_one_device
    losses, _ = run_steps(opened, make_mesh(*shape))
    np.testing.assert_allclose(losses, expected, atol=1e-5)
    assert expected[-1] < expected[0]


def test_accumulated_equals_full_batch(tiny_folder, one_device):
    """Unequal lengths and a row that only fills the batch included."""
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    objective = Objective("orpo", 0.3, sft_span="prompt+response")  # its mean is over the tokens of all parts
    expected, _ = run_steps(opened, one_device, steps=2, objective=objective)
    losses, _ = run_steps(opened, one_device, steps=2, accumulate=4, objective=objective)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_dropout_is_random_and_repeatable(tiny_folder, one_device, losses_of_one_device):
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    global LORA
    plain, LORA = LORA, LoRAConfig(4, 8.0, 0.5)
    try:
        run = lambda: run_steps(opened, one_device, objective=Objective("orpo", 0.3, dropout=True))[0]
        first = run()
        assert first == run()
    finally:
        LORA = plain
    assert first != losses_of_one_device


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "cpo"])
def test_every_loss_learns(loss, tiny_folder, one_device):
    """The reward of chosen rises over that of rejected; the reference model starts as the model itself."""
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    losses, _ = run_steps(opened, one_device, steps=3, objective=Objective(loss, 0.5, remat="none"))
    assert losses[-1] < losses[0]
    at_start = {"dpo": np.log(2), "ipo": 1.0}
    assert loss not in at_start or losses[0] == pytest.approx(at_start[loss], abs=1e-5)


def test_sft_raises_the_chosen(tiny_folder, one_device):
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    losses, _ = run_steps(opened, one_device, steps=4, objective=Objective("sft"))
    assert losses[-1] < losses[0]


def test_a_bad_step_can_be_skipped(tiny_folder, one_device):
    """A frozen weight that is no number spoils loss and gradient: adapter, moments and schedule stay as they were."""
    opened = model_files.open_model(str(tiny_folder("llama")[0]))
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    adapter = loading.init_adapter(opened.config, LORA, one_device, jax.random.key(0))
    model = loading.assemble(opened.config, base, LORA, adapter)
    model.embed[...] = model.embed[...].at[PAIRS[0].prompt[0]].set(jnp.nan)
    optimizer, schedule = make_optimizer(1e-2, 9, 0.1, 0.0, 1.0)
    assert 0 < schedule(9) < schedule(8)  # the last step learns too
    step = TrainStep(model, one_device, Objective(), optimizer, schedule, 1, 0, skip_nonfinite=True)
    before = jax.tree.map(np.asarray, step.initial)
    state, metrics = step(step.initial, Stream(PAIRS[:1], 1, 1, 0, 0).collate(0), 0)
    assert not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, state, before)


def test_long_pairs_lose_passages_only(smollm_tokenizer):
    """Worked examples, question, instruction and responses stay; short passages too; what cannot fit is counted."""
    from roserag_jax.rag.prompts import PromptBuilder

    contexts = [{"title": "Short", "text": "It is."}, *({"title": f"T{i}", "text": "Long words. " * 60} for i in "ab")]
    row = {"id": "a", "question": "Passage 1: what?", "golden_answers": ["x"], "contexts": contexts}
    whole = PromptBuilder(smollm_tokenizer, 4096, 3, 2).plain(row)
    said = {"chosen": "It is so.", "rejected": "It is not so at all."}
    spans = {"passage_spans": [list(span) for span in whole.passage_spans]}
    rows = [{"id": "a", "prompt": whole.text} | spans | said, {"id": "b", "prompt": "No passages here. " * 999} | said]
    rows += [{"id": "c", "prompt": "Short."} | said, {"id": "d", "prompt": "Short."} | said | {"chosen": "so " * 70}]
    limit = len(whole.tokens) - 150
    pairs, counts = tokenize(smollm_tokenizer, 2, rows, 64, limit)
    assert counts == {"cut": 1, "response too long": 1, "prompt too long": 1} and [p.id for p in pairs] == ["a", "c"]
    cut, responses = pairs[0], [smollm_tokenizer(said[s]).input_ids + [2] for s in ("chosen", "rejected")]
    assert [cut.chosen, cut.rejected] == responses
    assert limit - 4 <= len(cut.prompt) + len(cut.rejected) <= limit
    text = smollm_tokenizer.decode(cut.prompt)
    start, end = whole.text.rindex("Passage 2: "), whole.text.rindex("\n\nQuestion: ")
    assert text.startswith(whole.text[:start]) and text.endswith(whole.text[end:])  # first passage, question and all
    sizes = [len(line) for line in text[start : -len(whole.text[end:])].splitlines()]
    assert len(sizes) == 2 and abs(sizes[0] - sizes[1]) < 12
    assert tokenize(smollm_tokenizer, 2, rows[:1], 64, 40)[1]["prompt too long"] == 1


def test_held_out_by_question():
    """Whole questions, the same whatever the order, never all pairs on both sides."""
    pairs = [Pair(f"q{i // 2}", [1], [2], [3]) for i in range(40)]
    training, held = hold_out(pairs, 0.2, 0)
    names = [{p.id for p in side} for side in (training, held)]
    assert len(held) == 8 and len(training) == 32 and not names[0] & names[1]
    assert {p.id for p in hold_out(pairs[::-1], 0.2, 0)[1]} == names[1]
    assert len(hold_out(pairs[:6], 0.1, 0)[1]) == 2 and hold_out(pairs, 0.0, 0) == (pairs, [])


def test_order_is_a_function_of_the_step():
    """Every pair once an epoch, epochs differ, and a stream that begins late goes on with the same batches."""
    lengths = RNG.integers(10, 100, 37).tolist()
    first, second = epoch_order(lengths, 4, 0, 0), epoch_order(lengths, 4, 0, 1)
    assert sorted(i for batch in first for i in batch) == list(range(37)) and first != second
    assert first == epoch_order(lengths, 4, 0, 0)
    stream = Stream(PAIRS, 2, 2, 0, 0)
    whole, late = list(stream.start(0)), list(stream.start(3))
    assert len(whole) == 8 and len(late) == 5  # so the number of steps is the loader's whole state
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
