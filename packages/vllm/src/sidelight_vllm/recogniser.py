"""Recognition of the turns of a prompt, and refusal of what no blocking probe reads."""

# pyright: reportMissingImports=false

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, PlainText, TokenRole
from sidelight.models.encode import PromptEncoder
from sidelight.policy.decisions import PolicyError
from sidelight.policy.request import RequestContext

# Fields of vLLM's ``StructuredOutputsParams`` that can dictate words of a response.
_STRUCTURES = ("json", "regex", "choice", "grammar", "structural_tag")


class PromptRecogniser:
    """Finds the turns in the token ids of vLLM's prompts.

    Attributes:
        template: Chat template of the server, if it is not the tokenizer's own, and the operator's
            fixed arguments.
    """

    def __init__(self, encoder: PromptEncoder):
        self._encoder = encoder
        self.template: tuple[str | None, Mapping[str, Any]] = (None, {})
        self._heads: tuple[date | None, Sequence[tuple[int, ...]]] = (None, ())

    def recognise(
        self, prompt: Mapping[str, Any], messages: Sequence[Message] | None, *, with_places: bool
    ) -> EncodedPrompt | None:
        """The prompt with token roles; None if they cannot be determined.

        Its messages are ``messages``, if it has any. Positions refer to these, or to its text.
        """
        ids = prompt.get("prompt_token_ids")
        if ids is None or prompt.get("type", "token") != "token":
            return None
        try:
            encoded = self._encoder.recognise(ids, messages)
        # Ids that the tokenizer does not accept.
        except (OverflowError, TypeError, ValueError):
            return None
        if not with_places:
            return encoded
        try:
            text = messages or PlainText(prompt.get("prompt", ""))
            located = self._encoder.encode(text, with_places=True)
        # vLLM has encoded the text differently.
        except (SidelightError, TypeError, ValueError):
            return encoded
        if located.token_ids != encoded.token_ids:
            return encoded
        return replace(encoded, texts=located.texts, places=located.places)

    def require_read(self, prompt: EncodedPrompt | None, context: RequestContext) -> None:
        """Refuse text that a client can write but no blocking probe reads.

        Raises:
            PolicyError: There is such text, or this cannot be determined.
        """
        refuses_system = context.policy.refuses_system_turns
        if prompt is None and refuses_system:
            raise PolicyError(
                "The prompt is not a list of token ids, so it cannot be checked for a system "
                "turn at its beginning, which the server's policy refuses. Send text without "
                "images.",
                code="system_turn_refused",
            )
        if prompt is None or prompt.is_plain:
            return
        turns = self._encoder.chat_format.turns(prompt.token_ids)
        if (
            refuses_system
            and turns[0].role == "system"
            and not self._is_template_header(_unread(prompt))
        ):
            raise PolicyError(
                "The conversation begins with a system turn that is not part of the chat "
                "template's default: a system or developer message, tools, documents, or "
                "template arguments. No probe of chats reads it, so the server's policy refuses "
                "it. Leave it out. If only the operator writes such turns, set system_turns = "
                '"trust" in the policy.',
                code="system_turn_refused",
            )
        is_guarded = any(bound.is_enforced and bound.side == "output" for bound in context.rules)
        if is_guarded and turns[-1].role == "assistant" and turns[-1].stop == len(prompt):
            raise PolicyError(
                "The conversation ends with a response to be continued. Probes of responses read "
                "only what the model generates, so the server's policy refuses the request. End "
                "with a user's turn.",
                code="answer_continued",
            )

    def _is_template_header(self, head: tuple[int, ...]) -> bool:
        """Whether the template itself writes this text before the first turn, as of today."""
        if self._heads[0] != date.today():
            heads = (self._head(role) for role in ("user", "assistant", "tool"))
            self._heads = date.today(), [head for head in heads if head is not None]
        return any(template_head[: len(head)] == head for template_head in self._heads[1])

    def _head(self, role: str) -> tuple[int, ...] | None:
        template, arguments = self.template
        tokenizer = self._encoder.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                [{"role": role, "content": "x"}],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **arguments,
            )
        # Templates refuse conversations in many ways, and read arbitrary fields of messages.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return _unread(self._encoder.recognise(ids))


def _unread(prompt: EncodedPrompt) -> tuple[int, ...]:
    """The ids before the first token that may be read."""
    token_roles = takewhile(lambda role: role == TokenRole.UNREAD, prompt.token_roles)
    return prompt.token_ids[: len([*token_roles])]


def refuse_structured_outputs(params: Any, context: RequestContext) -> None:
    """Refuse responses whose words the client dictates in vLLM's ``SamplingParams``.

    They are allowed if a blocking probe reads them.

    Raises:
        PolicyError: The client constrains the response.
    """
    blocking = {bound.side for bound in context.rules if bound.is_blocking}
    is_read = "output" in blocking or not blocking
    if is_read or not context.policy.refuses_system_turns:
        return
    structure = params.structured_outputs
    is_structured = params.trace_decode_token_ids is not None or any(
        getattr(structure, kind, None) is not None for kind in _STRUCTURES
    )
    if is_structured:
        raise PolicyError(
            "The request constrains the response with a schema, choice, regular expression, "
            "grammar or forced tool call, and such a constraint can dictate its words. The "
            "server's policy blocks only prompts, so no blocking probe would read these words. "
            "Leave the constraint out, or ask for a JSON object. If only the operator writes "
            'such requests, set system_turns = "trust" in the policy, or let a rule block '
            "outputs.",
            code="structured_outputs_refused",
        )


def require_drawable(params: Any) -> None:
    """Refuse seeded sampling on the CPU, where vLLM crashes if the prompt is read in several steps.

    Raises:
        SidelightError: Sampling is seeded on the CPU backend.
    """
    from vllm.platforms import current_platform

    if params.seed is not None and params.temperature > 0 and current_platform.is_cpu():
        raise SidelightError(
            "vLLM's CPU backend cannot sample with a seed. Leave 'seed' out, or set "
            "'temperature' to 0."
        )
