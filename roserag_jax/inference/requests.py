"""What a task asks of the decoder, what it gets back, and how much the decoder must have room for.

A task is a generator: it yields a `PrefillRequest` (a prompt) or a `DecodeRequest` (branches behind the prompt that was
prefilled last), is sent the outcome, and returns its result. A server has a task of one branch for each completion
(`inference.service.Generation`): its sampling parameters, limits and stop function are the client's, its question id is
the client's seed and its sample the number of the choice.
"""

import dataclasses
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from roserag_jax.distributed.sharding import held_kv_heads
from roserag_jax.inference.engine import bucket
from roserag_jax.inference.sampling import SamplingParams
from roserag_jax.models.cache import PrefixCache
from roserag_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class PrefillRequest:
    """Prefill a prompt into the task's slot; the task is sent None.

    Args:
      tokens: the whole prompt. Its last token is not prefilled: it is the first one of every branch.
      shared_prefix: the cache of what it begins with, from `Engine.prefill_shared_prefix`.
      few_shapes: whether it is prefilled on its own and in one of few padded lengths: for many kinds of short prompts,
        where each length and each number of prompts would be compiled behind each shared prefix.
    """

    tokens: list[int]
    shared_prefix: PrefixCache | None = None
    few_shapes: bool = False


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """Decode branches behind the prompt that was prefilled last; the task is sent a list of `Completion`, one a branch.

    There may be more branches than a slot holds at a time: they are then decoded in several rounds.

    Args:
      forced_prefixes: what each branch begins with: the prompt's last token, then tokens of the completion that are
        given instead of sampled.
      max_new_tokens: the most tokens sampled for a branch; 0 asks for the forced prefixes' log-probabilities only.
      sampling: how tokens are drawn.
      question_id, first_sample: branch n draws with the random key of this question's sample `first_sample + n`.
      use_extra_stop_ids: the scheduler's extra stop token ids end a branch too.
      stop_function: tells from a branch's new tokens whether it is finished. It is called now and then, so it may see
        tokens past the end.
      prompt_length: how many of the prefilled tokens the branches see; None is all of them.
    """

    forced_prefixes: list[list[int]]
    max_new_tokens: int
    sampling: SamplingParams = SamplingParams()
    question_id: str = ""
    first_sample: int = 0
    use_extra_stop_ids: bool = False
    stop_function: Callable[[list[int]], bool] | None = None
    prompt_length: int | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a branch generated. Log-probabilities are of temperature 1, over the whole vocabulary.

    Args:
      tokens: the new tokens, without the stop token.
      logprobs: [tokens] of the new tokens.
      finished: False where the branch ran into `max_new_tokens`.
      forced_logprobs: [forced tokens] of the forced prefix, without the prompt's last token.
    """

    tokens: list[int]
    logprobs: np.ndarray
    finished: bool
    forced_logprobs: np.ndarray


Task = Generator[PrefillRequest | DecodeRequest, Any, Any]


@dataclasses.dataclass(frozen=True)
class DecoderCapacity:
    """How much a decoder holds at a time.

    Args:
      slots: sequence slots; each holds one task.
      branches: branches of a slot that are decoded at a time.
      request_shapes: for each kind of `DecodeRequest`, the most tokens of a forced prefix and the most new tokens.
    """

    slots: int
    branches: int
    request_shapes: tuple[tuple[int, int], ...]

    @property
    def max_new_tokens(self) -> int:
        """The most new tokens of a branch."""
        return max(new for _, new in self.request_shapes)

    @property
    def suffix_length(self) -> int:
        """M, the length of the suffix cache: the tokens of a branch, or a padded forced prefix if that is longer.

        The last token of a forced prefix is the first that is decoded.
        """
        longest = max(prefix for prefix, _ in self.request_shapes) - 1
        tokens = max(prefix - 1 + new for prefix, new in self.request_shapes)
        return max(-(-tokens // 16) * 16, bucket(longest))

    def slot_bytes(self, config: ModelConfig, itemsize: int, prompt_length: int, tensor: int = 1) -> int:
        """Bytes that one slot takes on a device, weights aside, as the program compiled for a TPU v5e allocates them.

        These are the caches; the values of the branches once more, for a chunk of steps holds them in a second layout;
        and four arrays of the branches' logits. With small heads the suffix cache is padded to tiles of 128.

        Args:
          tensor: devices that heads and vocabulary are split over.
        """
        tiled = self.suffix_length if config.head_dim >= 128 else -(-self.suffix_length // 128) * 128
        token = self.token_bytes(config, itemsize, tensor)
        working = token * self.branches * (3 * tiled - 2 * self.suffix_length)
        logits = 4 * self.branches * _split(config.vocab_size, tensor)
        return self.cache_bytes(config, itemsize, prompt_length, tensor) + working + 4 * logits

    def cache_bytes(self, config: ModelConfig, itemsize: int, prompt_length: int, tensor: int = 1) -> int:
        """Bytes of one slot's caches on a device: keys and values of the prompt and of the branches."""
        tokens = bucket(prompt_length) + self.branches * self.suffix_length
        return 2 * self.token_bytes(config, itemsize, tensor) * tokens

    @staticmethod
    def token_bytes(config: ModelConfig, itemsize: int, tensor: int) -> int:
        """Bytes of a token's keys, or of its values, on one of `tensor` devices that heads are split over."""
        held = held_kv_heads(config.num_heads, config.num_kv_heads, tensor)
        return config.num_layers * _split(held, tensor) * config.head_dim * itemsize


def _split(size: int, devices: int) -> int:
    """What each of `devices` has of a dimension, which is replicated where they do not divide it."""
    return size if size % devices else size // devices
