"""Conversations as a tokenizer's chat template writes them, and which stretches of that text are the assistant's.

Knows tokenizers' templates; knows nothing of files, models or tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from influence.errors import RequestError

Turn = Mapping[str, Any]
"""`role`, and most often `content`."""

Tools = Sequence[Mapping[str, Any]] | None

_MARK_THEM = "put {% generation %} and {% endgeneration %} around its words in the tokenizer's template, or give prompt and completion"

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def check_template(tokenizer: Any) -> None:
    """Raises RequestError for a tokenizer without a chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("the tokenizer has no chat template, so messages cannot be written as text: give prompt and completion")


def written(tokenizer: Any, turns: Sequence[Turn], *, prompt_for_reply: bool = False, tools: Tools = None) -> str:
    """The conversation as text, with what invites the assistant's reply at its end if wanted. Raises RequestError where the template refuses it."""
    if not turns:
        return ""
    try:
        return str(tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=prompt_for_reply))
    except Exception as error:  # whatever a template of somebody else's runs into
        raise RequestError(f"the chat template refuses the conversation: {' '.join(str(error).split())}") from None


def before_reply(tokenizer: Any, turns: Sequence[Turn], whole: str, tools: Tools = None) -> str | None:
    """What stands in `whole`, which begins with these turns and a reply, before the reply; None where it does not begin with them as they are alone.

    The reply begins where the template's prompt for it ends, if the text goes on from there: such a prompt may open what the reply itself does not
    have, such as a thought.
    """
    for prompt in (True, False):
        before = written(tokenizer, turns, prompt_for_reply=prompt, tools=tools)
        if whole.startswith(before) and whole != before:
            return before
    return None


def assistant_turns(tokenizer: Any, turns: Sequence[Turn], tools: Tools = None) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and (first character, last + 1) of each stretch that the assistant wrote.

    A template says so itself with `{% generation %}`. Otherwise a turn is what the template adds for it, with the mark of its end: from where the
    conversation so far, and the prompt for a reply, end, to where the conversation with the turn ends. Raises RequestError where that is not exact,
    because the template writes a turn otherwise once others follow it.
    """
    check_template(tokenizer)
    whole = written(tokenizer, turns, tools=tools)
    template = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    if _MARKED.search(template):
        return whole, _marked(tokenizer, turns, tools, template, whole)
    found = []
    for place, turn in enumerate(turns):
        if turn.get("role") != "assistant":
            continue
        if place == 0:  # what a template writes before it, such as a system turn of its own, would pass for the assistant's
            raise RequestError(
                f"the conversation begins with the assistant, and where its words begin cannot be told from the text: {_MARK_THEM}"
            )
        after = written(tokenizer, turns[: place + 1], tools=tools)
        before = before_reply(tokenizer, turns[:place], after, tools)
        if before is None or not whole.startswith(after):
            raise RequestError(
                f"the chat template writes turn {place + 1} otherwise once another follows it, so what the assistant said cannot be told from the "
                f"text: {_MARK_THEM}"
            )
        found.append((len(before), len(after)))
    return whole, found


def _marked(tokenizer: Any, turns: Sequence[Turn], tools: Tools, template: str, whole: str) -> list[tuple[int, int]]:
    """The stretches between the template's own marks, in characters: transformers' mask of tokens runs on where a stretch ends within none."""
    texts, stretches = render_jinja_template(
        conversations=[[dict(turn) for turn in turns]],
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if texts[0] != whole:
        raise RequestError("the chat template does not write the same conversation twice alike: take what changes (a date) out of it")
    return [(start, end) for start, end in stretches[0] if end > start]
