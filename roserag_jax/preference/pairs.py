"""Ready-made preference pairs in TRL's layouts."""

import collections
from collections.abc import Mapping

from roserag_jax.errors import UserError, first_line
from roserag_jax.rag.chat import render_chat
from roserag_jax.rag.files import open_rows
from roserag_jax.rag.layouts import as_text


def read_pairs(path: str, tokenizer, template_arguments: Mapping | None = None, most: int = 0) -> list[dict]:
    """Read ready-made pairs `{id, prompt, chosen, rejected, plain_text?}` of a TRL preference file, as text.

    Rows are text or conversational, with a prompt or with it at the beginning of both responses (also where a text
    prompt stands beside conversations, as TRL takes it). A conversation is laid in the tokenizer's chat template; a
    text prompt is taken as it stands, and its row may say where passages stand in it, `passage_spans`, as in
    `pairs.jsonl`. Other text prompts are marked as `plain_text` where the tokenizer has a chat template, so that they
    get the special tokens (BOS) that the template writes into conversations.

    Args:
      most: how many pairs are read, from the first; 0 is all.

    Raises:
      UserError: a row is not a pair, or no row can be used; it is named.
    """
    from jinja2 import TemplateError

    pairs, skipped = [], collections.Counter()
    for number, (where, row) in enumerate(open_rows(path), 1):
        if most and len(pairs) == most:
            break
        try:
            prompt, chosen, rejected = _pair(row, tokenizer, template_arguments)
            name = as_text(row.get("id", number))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, TemplateError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(f"{where}: a pair is {{prompt, chosen, rejected}}, text or messages ({why}).") from error
        if not chosen.strip() or not rejected.strip() or chosen == rejected:
            skipped["an empty response" if chosen != rejected else "two equal responses"] += 1
            continue
        pair = {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected}
        if row.get("passage_spans"):
            pair["passage_spans"] = _spans(row, where)
        elif isinstance(row["chosen"], str) and tokenizer.chat_template is not None:
            pair["plain_text"] = True
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} holds no pairs.")
    left_out = ", ".join(f"{n} for {reason}" for reason, n in skipped.items())
    print(f"{path}: {len(pairs)} pairs{f'; left out {left_out}' if left_out else ''}.")
    return pairs


def _spans(row: dict, where: str) -> list[list[int]]:
    """A row's `passage_spans`: character positions [start, end) in its text prompt, in order, without overlap."""
    spans, prompt, behind = row["passage_spans"], row.get("prompt"), 0
    valid = isinstance(prompt, str) and isinstance(row["chosen"], str) and isinstance(spans, list)
    for span in spans if valid else []:
        valid = valid and isinstance(span, list) and [type(edge) for edge in span] == [int, int]
        valid = valid and behind <= span[0] <= span[1] <= len(prompt)
        behind = span[1] if valid else 0
    if not valid:
        raise UserError(
            f"{where}: passage_spans must be a list of [start, end], character positions in a text prompt, in order."
        )
    return spans


def _pair(row: dict, tokenizer, template_arguments: Mapping | None) -> tuple[str, str, str]:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("one response is text, the other is not")
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):
        shared, most = 0, min(len(chosen), len(rejected)) - (not isinstance(chosen, str))
        while shared < most and chosen[shared] == rejected[shared]:
            shared += 1
        if isinstance(chosen, str) and chosen[:shared].endswith(" "):
            shared -= 1  # the space belongs to the responses
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(chosen, str):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("the prompt is not text")
        return prompt, chosen, rejected
    if not prompt or not isinstance(prompt, list):
        raise ValueError("the prompt is not a conversation")
    if tokenizer.chat_template is None:
        raise ValueError("messages need a model with a chat template")
    for response in (chosen, rejected):
        if len(response) != 1 or response[0]["role"] != "assistant" or not isinstance(response[0]["content"], str):
            raise ValueError("a response must be one turn of the assistant, its content text")
    text = render_chat(tokenizer, prompt, template_arguments)
    return text, chosen[0]["content"], rejected[0]["content"]
