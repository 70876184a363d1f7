"""Reward models against transformers' sequence classifiers."""

import json

import numpy as np
import pytest
from conftest import FAMILIES, SIZES, copy_folder
from safetensors.numpy import load_file, save_file

from roserag_jax.errors import UserError
from roserag_jax.hub.reward_model import RewardModelFolder
from roserag_jax.preference import rewards
from roserag_jax.preference.rewards import RewardModel


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A function: the folder of a small random reward model of a family, and its torch model."""
    torch = pytest.importorskip("torch")
    import transformers

    def make(family):
        torch.manual_seed(0)
        sizes = SIZES | {"pad_token_id": 7, "num_labels": 1}
        config = transformers.AutoConfig.for_model(family, **sizes, **FAMILIES[family])
        model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        folder = tmp_path_factory.mktemp(f"reward-{family}")
        model.eval().save_pretrained(folder)
        return folder, model

    return make


def conversations(rng):
    """The candidates of three prompts, as tokens; one ends in padding, one is the beginning of another."""
    prompts = [rng.integers(8, 131, n).tolist() for n in (20, 33, 5)]
    rests = [[rng.integers(8, 131, n).tolist() for n in lengths] for lengths in ((9, 4, 14), (3,), (6, 20))]
    groups = [[prompt + rest for rest in of_prompt] for prompt, of_prompt in zip(prompts, rests, strict=True)]
    groups[0].append(groups[0][0][:-3])
    return groups


_LATER = [pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2", "mistral", "qwen3", "gemma", "gemma3_text")]


@pytest.mark.parametrize("family", ["llama", "gemma2", *_LATER])
def test_rewards_equal_those_of_transformers(family, classifier, one_device):
    """All candidates of a prompt in one pass give what transformers gives for each conversation alone."""
    import torch

    folder, theirs = classifier(family)
    model = RewardModel(RewardModelFolder(folder), None, np.float32, one_device)
    groups = conversations(np.random.default_rng(1))
    found = dict(model.rewards([*groups, []], batch=2, most=max(map(len, groups))))
    assert found[3] == []
    for number, group in enumerate(groups):
        with torch.no_grad():
            expected = [theirs(torch.tensor([tokens])).logits[0, 0].item() for tokens in group]
        np.testing.assert_allclose(found[number], expected, atol=1e-4, rtol=1e-4)


def test_rewards_of_few_questions_take_no_more_work_than_they_are(classifier, one_device, monkeypatch):
    """Lengths that differ share a program, and one for three questions is not filled up to `evaluate.batch`."""
    model = RewardModel(RewardModelFolder(classifier("llama")[0]), None, np.float32, one_device)
    rng, shapes, program = np.random.default_rng(2), [], rewards._rewards

    def noting(network, weights, head, cache, branches, last):
        shapes.append((cache.k.shape[-1], *branches.shape))
        return program(network, weights, head, cache, branches, last)

    monkeypatch.setattr(rewards, "_rewards", noting)
    groups = []
    for common in (66, 80, 97, 113, 128):
        start = rng.integers(8, 131, common).tolist()
        groups.append([start + rng.integers(8, 131, n).tolist() for n in (5, 20, 60)])
    found = dict(model.rewards(groups, batch=48, most=4))
    assert set(shapes) == {(128, 10, 4, 64)} and len(shapes) == 1
    alone = {i: reward for i, group in enumerate(groups) for _, reward in model.rewards([group], batch=1, most=4)}
    for i, reward in found.items():
        np.testing.assert_allclose(reward, alone[i], atol=1e-5)


def test_reward_is_of_the_last_token_that_is_not_padding(classifier, one_device):
    """Also where the chat template itself ends in the padding token, as transformers takes it."""
    import torch

    folder, theirs = classifier("llama")

    def tokenizer(text, add_special_tokens=True):
        return type("Encoding", (), {"input_ids": [int(number) for number in text.split()]})

    tokenizer.chat_template, tokenizer.bos_token_id = None, 1
    model = RewardModel(RewardModelFolder(folder), tokenizer, np.float32, one_device)
    tokens = model.tokens("10 7 12 13 7 7")
    assert tokens == [10, 7, 12, 13]
    with torch.no_grad():
        expected = theirs(torch.tensor([[10, 7, 12, 13, 7, 7]])).logits[0, 0].item()
    ((_, found),) = model.rewards([[tokens]], batch=1, most=1)
    assert found == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("case", ["no head", "two labels", "not finite"])
def test_what_is_not_a_reward_model_is_refused(case, classifier, tmp_path):
    folder = copy_folder(classifier("llama")[0], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    score = tensors.pop("score.weight")
    changed = {"two labels": np.concatenate([score, score]), "not finite": np.full_like(score, np.nan)}
    if case in changed:
        tensors["score.weight"] = changed[case]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    message = {"no head": "no score.weight", "two labels": "has one label", "not finite": "not finite"}[case]
    with pytest.raises(UserError, match=message):
        RewardModelFolder(folder)
