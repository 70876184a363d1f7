"""Reward models: Hugging Face's sequence classifiers of one label, the network with a scalar head."""

import dataclasses
from pathlib import Path

import numpy as np

from roserag_jax.errors import UserError, quote
from roserag_jax.hub.huggingface import HuggingFaceFolder
from roserag_jax.hub.tensor_names import HEAD

SCORE = "score.weight"


class RewardModelFolder(HuggingFaceFolder):
    """A folder of a sequence classifier, read as the network's weights and a head.

    Attributes:
      head: [D], float32; the reward is its product with the normed hidden state of the last token.
      pad_id: the padding token, or None; transformers takes the last token that is not this one.

    Raises:
      UserError: the model has no head, or one of several labels.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        found = super().shapes()
        width = self.config.embed_dim
        if SCORE not in found:
            raise UserError(
                f"{path} has no {SCORE}: it is not a reward model; name a sequence classifier of one label "
                "(such as LlamaForSequenceClassification)."
            )
        if found[SCORE] != (1, width):
            raise UserError(f"{path}: {SCORE} is {found[SCORE]}, not {(1, width)}: a reward model has one label.")
        # There is no vocabulary projection, so nothing that could be tied or not.
        self.config = dataclasses.replace(self.config, tie_embeddings=True)
        pad = getattr(self.transformers_config(), "pad_token_id", None)
        if pad is not None and not isinstance(pad, int):
            raise UserError(f"{path}/config.json: pad_token_id={quote(pad)} is not a number.")
        self.pad_id = pad
        self.head = self.read(SCORE, (slice(None), slice(None)))[0].astype(np.float32)
        if not np.isfinite(self.head).all():
            raise UserError(f"{path}: {SCORE} holds values that are not finite (NaN or Inf); download it again.")

    def shapes(self):
        """Shape of every tensor of the network, by name."""
        return {name: shape for name, shape in super().shapes().items() if name not in (SCORE, HEAD)}
