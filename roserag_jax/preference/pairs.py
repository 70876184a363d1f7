"""Ready-made preference pairs in TRL's layouts."""

import collections
from collections.abc import Mapping

from etils import epath

from roserag_jax.errors import UserError
from roserag_jax.rag.files import HUB, hub_rows, read_rows
from roserag_jax.rag.prompts import render_chat


def read_pairs(path: str, tokenizer, template_arguments: Mapping | None = None) -> list[dict]:
    """Ready-made pairs `{id, prompt, chosen, rejected}` of a TRL preference file, as text.

    Rows are text or conversational, with a prompt or with it at the beginning of both responses (also where a text
    prompt stands beside conversations, as TRL takes it). A conversation is laid in the tokenizer's chat template; a
    text prompt is taken as it stands, and its row may say where passages stand in it, `passage_spans`, as in
    `pairs.jsonl`.

    Raises:
      UserError: a row is no pair, or no row can be used; it is named.
    """
    from jinja2 import TemplateError

    pairs, skipped = [], collections.Counter()
    source = hub_rows(path, "train") if path.startswith(HUB) else read_rows(epath.Path(path).expanduser())
    for number, (where, row) in enumerate(source, 1):
        try:
            prompt, chosen, rejected = _pair(row, tokenizer, template_arguments)
        except (KeyError, TypeError, ValueError, TemplateError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{where}: a pair is {{prompt, chosen, rejected}}, text or messages ({why}).") from error
        if not chosen.strip() or not rejected.strip() or chosen == rejected:
            skipped["an empty response" if chosen != rejected else "two equal responses"] += 1
            continue
        pair = {"id": str(row.get("id", number)), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        if row.get("passage_spans"):
            pair["passage_spans"] = _spans(row, where)
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
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        if isinstance(chosen, str) and chosen[:shared].endswith(" "):
            shared -= 1  # the space belongs to the responses
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(chosen, str):
        if not isinstance(prompt, str) or not prompt:
            raise ValueError("the prompt is not text")
        return prompt, chosen, rejected
    if not prompt or not isinstance(prompt, list):
        raise ValueError("the prompt is no conversation")
    if tokenizer.chat_template is None:
        raise ValueError("messages need a model with a chat template")
    for response in (chosen, rejected):
        if len(response) != 1 or response[0]["role"] != "assistant" or not isinstance(response[0]["content"], str):
            raise ValueError("a response must be one turn of the assistant, its content text")
    text = render_chat(tokenizer, prompt, template_arguments)
    return text, chosen[0]["content"], rejected[0]["content"]
