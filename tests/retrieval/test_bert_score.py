"""BERTScore against the published formula, computed with torch from transformers' encoder."""

import pytest
from support.retrieval import word_pieces

from roserag_jax.retrieval.bert_score import BertScore


def published_score(model, tokenizer, said, golden):
    """The harmonic mean of mean best cosines; marks are matched but have no weight, as in the authors' package."""
    import torch

    def vectors(text):
        found = tokenizer(text, return_tensors="pt", truncation=True, max_length=96, return_special_tokens_mask=True)
        weights = 1.0 - found.pop("special_tokens_mask")[0].float()
        with torch.no_grad():
            hidden = model(**found).last_hidden_state[0]
        return torch.nn.functional.normalize(hidden, dim=-1), weights

    (x, x_weights), (y, y_weights) = vectors(said), vectors(golden)
    if not (x_weights.any() and y_weights.any()):
        return 0.0
    cosines = x @ y.T
    precision = (cosines.max(dim=1).values * x_weights).sum() / x_weights.sum()
    recall = (cosines.max(dim=0).values * y_weights).sum() / y_weights.sum()
    return float(2 * precision * recall / (precision + recall))


def test_bert_score_equals_the_published_formula(bert_folder, one_device):
    """Also for texts of other lengths beside it, for one that is cut, for none, and with several golden answers."""
    folder, model = bert_folder()
    measure = BertScore(folder, one_device)
    pieces = [piece for piece in word_pieces() if piece.isalpha() and len(piece) == 3]
    texts = [" ".join(pieces[i : i + n]) for i, n in ((0, 4), (2, 5), (40, 90), (1, 120), (7, 1))]
    said = [texts[0], texts[1], texts[2], texts[3], "", texts[0]]
    golden = [[texts[1]], [texts[4], texts[0]], [texts[3]], [texts[2]], [texts[0]], [texts[0]]]
    found = measure(said, golden)
    of = lambda text, answers: max(published_score(model, measure.tokenizer, text, answer) for answer in answers)
    assert found == pytest.approx([of(*each) for each in zip(said, golden, strict=True)], abs=1e-5)
    assert found[4] == 0.0 and found[5] == pytest.approx(1.0) and measure.cut == 1
    assert [measure([text], [answers])[0] for text, answers in zip(said, golden, strict=True)] == pytest.approx(
        found, abs=1e-5
    )
