"""The objective: peft's and TRL's loss and gradient, and what must leave them as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LORA, PAIRS, trained_adapter, write_files
from flax import nnx

from roserag_jax.hub import loading, model_files, peft_adapter
from roserag_jax.models.lora import LoRAParam
from roserag_jax.training.objective import Objective, pair_losses, summed_logprobs
from roserag_jax.training.pair_loader import Pairs, Stream

torch = pytest.importorskip("torch")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _gradient(graph, without, objective, adapter, base, batch):
    def loss(adapter):
        reference = nnx.merge(without, base) if objective.spec.reference else None
        model = nnx.merge(graph, adapter, base)
        losses, _ = pair_losses(model, batch, objective, reference=reference)
        return (losses * batch.weights).sum() / batch.weights.sum()

    return jax.value_and_grad(loss)(adapter)


def gradient(model, batch, objective):
    """Adapter gradient of the mean loss over the real rows, by path."""
    graph, adapter, base = nnx.split(model, LoRAParam, ...)
    without = nnx.split(loading.assemble(model.config, base))[0]
    value, grads = _gradient(graph, without, objective, adapter, base, batch)
    return float(value), {path: np.asarray(v.get_value()) for path, v in nnx.to_flat_state(grads)}


def assert_same_gradient(found, peft_model):
    """The adapter gradient by path is that of a peft model after `backward`."""
    expected = {name: p.grad for name, p in peft_model.named_parameters() if p.grad is not None}
    assert len(expected) == sum(len(grad) for grad in found.values())
    for name, grad in expected.items():
        parts = name.split(".")
        layer, projection, kind = int(parts[parts.index("layers") + 1]), parts[-4], parts[-3].lower()
        np.testing.assert_allclose(found[("layers", projection, kind)][layer].T, grad, atol=1e-5, err_msg=name)


def test_objective_equals_peft(tiny_folder, tiny_llama, one_device, tmp_path):
    """Loss and LoRA gradient of unequal pairs, against peft on transformers with the prompt repeated."""
    peft = pytest.importorskip("peft")
    import transformers

    opened, base = tiny_llama
    state = trained_adapter(opened, one_device)
    write_files(tmp_path, peft_adapter.adapter_files(state, LORA, ""))
    peft_model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama")[0])
    peft_model = peft.PeftModel.from_pretrained(peft_model, tmp_path, is_trainable=True)

    def mean_logprob(pair, response):
        tokens = torch.tensor([pair.prompt + response])
        logits = peft_model(tokens).logits[0, len(pair.prompt) - 1 : -1]
        return torch.log_softmax(logits, -1).gather(1, tokens[0, len(pair.prompt) :, None]).mean()

    odds = lambda x: x - torch.log1p(-torch.exp(x))
    total = 0
    for pair in PAIRS[:4]:
        chosen, rejected = mean_logprob(pair, pair.chosen), mean_logprob(pair, pair.rejected)
        total += (-chosen - 0.3 * torch.nn.functional.logsigmoid(odds(chosen) - odds(rejected))) / 4
    total.backward()

    batch = Stream(PAIRS[:4], batch=4, pad_id=0).collate(0)
    model = loading.assemble(opened.config, base, LORA, state)
    value, found = gradient(model, batch, Objective("orpo", 0.3, remat="layer"))
    np.testing.assert_allclose(value, total.item(), atol=1e-5)
    assert_same_gradient(found, peft_model)


# A shared prefix, then rows of unequal length. No response begins with white space: TRL would merge that with the
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
def test_objective_equals_trl_trainers(loss, span, smollm_tokenizer, one_device, tmp_path):
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
    state = trained_adapter(opened, one_device)
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
    expected = trainer.compute_loss(trainer.model.train(), dict(fed))
    expected.backward()

    pairs = Pairs(smollm_tokenizer, smollm_tokenizer.eos_token_id, ROWS, 64)
    for side, at in (("chosen", 0), ("rejected", len(ROWS))):
        for i, pair in enumerate(pairs):
            ids, length = [*pair.prompt, *getattr(pair, side)], len(getattr(pair, side))
            if loss == "orpo":
                seen, row = fed[f"{side}_attention_mask"][i].bool(), fed[f"{side}_input_ids"][i]
                answer = fed[f"{side}_labels"][i] != -100
            else:
                seen, row, answer = (fed[k][at + i] for k in ("attention_mask", "input_ids", "completion_mask"))
            assert row[seen.bool()].tolist() == ids and answer.sum() == length
    stream = Stream(pairs, batch=4, pad_id=0)
    assert len(stream.shared_prefix) > 32
    base = loading.load_base(opened, jnp.dtype("float32"), one_device)
    model = loading.assemble(opened.config, base, LORA, state)
    value, found = gradient(model, stream.collate(0), Objective(loss, 0.3, sft_span=span))
    np.testing.assert_allclose(value, expected.item(), atol=1e-5)
    assert_same_gradient(found, trainer.model)


@pytest.mark.slow
def test_loss_and_gradient_ignore_padding_order_and_remat(tiny_llama, one_device):
    """Remat, padding, the order of rows and a shared prefix prefilled once leave loss and gradient as they are."""
    opened, base = tiny_llama
    model = loading.assemble(opened.config, base, LORA, trained_adapter(opened, one_device))
    prefix = np.random.default_rng(0).integers(3, 131, 40).tolist()
    stream = Stream([pair._replace(prompt=prefix + pair.prompt) for pair in PAIRS], batch=8, pad_id=0)
    without_prefix = stream.collate(0)
    assert without_prefix.shared_prefix.tolist() == prefix and without_prefix.prompt.shape[1] == 32
    stream.shared_prefix = stream.shared_prefix[:0]
    batch = stream.collate(0)
    objective = Objective("orpo", 0.3, sft_span="prompt+response", remat="none")
    value, expected = gradient(model, batch, objective)
    wider = batch._replace(
        prompt=np.pad(batch.prompt, ((0, 0), (0, 16)), constant_values=7),
        branches=np.pad(batch.branches, ((0, 0), (0, 0), (0, 16)), constant_values=7),
        targets=np.pad(batch.targets, ((0, 0), (0, 0), (0, 16)), constant_values=7),
    )
    reversed_rows = type(batch)(*(a[::-1] for a in wider))
    # Rejected first: a sibling's place changes nothing, so swapping them back gives the same sums.
    swapped = batch._replace(**{n: getattr(batch, n)[:, ::-1] for n in ("branches", "targets", "response_lengths")})
    sums = jax.jit(lambda b: summed_logprobs(model, b)[0])
    np.testing.assert_allclose(sums(swapped)[:, ::-1], sums(batch), atol=1e-4)
    for other, remat in [(batch, "layer"), (reversed_rows, "dots"), (without_prefix, "none")]:
        again = gradient(model, other, dataclasses.replace(objective, remat=remat))
        np.testing.assert_allclose(again[0], value, atol=1e-5)
        for path, grad in expected.items():
            np.testing.assert_allclose(again[1][path], grad, atol=2e-6)
