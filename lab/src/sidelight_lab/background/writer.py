"""An LLM writes ordinary conversations, batch by batch.

A turn is sampled from what its chat template writes before it (Magpie: Xu et al. 2024, arXiv
2406.08464), or continues an opening of ``seeds.json``: short turns as they are, and openings that
the LLM completes. There ``{subject}``, ``{Subject}`` and ``{city}`` are drawn, ``{text}`` is a text
that the LLM has written, and ``{call}`` a call of a tool. A tool has a request, a call, and its
result: with ``{text}`` in it, or else completed by the LLM.
"""

import json
import random
import re
from collections.abc import Sequence
from importlib.resources import files
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from sidelight.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.prompts import EncodedPrompt, Message, control_tokens

ROWS = 32
_SEEDS: dict[str, list[Any]] = json.loads(
    (files("sidelight_lab.background") / "seeds.json").read_text("utf-8")
)
_SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "repetition_penalty": 1.05}
# A batch ends once this share of its turns have ended; the others are cut at a sentence's end.
_ENOUGH = 0.8
# Tokens of documents: log-uniform, all of a batch about as long.
_SHORTEST, _LONGEST = 40, 800
_MOST_TURNS = 6
_SENTENCE_END = re.compile(r"[.!?\u3002\u2026](?=[\s\"')\]*]|$)|[\n}\]>](?=\s|$)")

_ITEM = re.compile(r"\n\s*(\*{0,2}\d{1,2}\.|[-*#]+)\s*$")

_JSON = ("[{", '{"')
_FENCE = re.compile("```")
_AFTER_JSON = re.compile(r"```|\n\s*\n")

# Grows turn by turn.
Draft = list[Message]


def write_batch(backbone: TransformersBackbone, number: int, seed: int) -> list[Draft]:
    """A batch of conversations, some with empty turns where the LLM wrote no whole sentence.

    Args:
        backbone: The LLM.
        number: Of the batch; decides what kind its conversations are of.
        seed: With ``number``, decides all samples.
    """
    devices = [backbone.device] if backbone.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(100_000 * seed + number)
        writer = _Writer(backbone, random.Random(f"{seed} {number}"))
        kind = _CYCLE[number % len(_CYCLE)]
        # Without a template there are no turns.
        is_raw = backbone.encoder.prompt_format == "raw"
        if kind == "document" or (is_raw and kind in ("chat", "agent")):
            before = _CYCLE[: number % len(_CYCLE)].count("document")
            return writer.documents((before + writer.random.random()) / _CYCLE.count("document"))
        return _KINDS[kind](writer)


class _Writer:
    """Writes batches of each kind.

    Args:
        backbone: The LLM.
        random: Chooses seeds and forms.
    """

    def __init__(self, backbone: TransformersBackbone, random: random.Random):
        self.random = random
        self._backbone = backbone
        self._is_raw = backbone.encoder.prompt_format == "raw"
        self._controls = control_tokens(backbone.tokenizer)

    def short_turns(self) -> list[Draft]:
        """Greetings, thanks and the like, as they are listed."""
        texts = [*_SEEDS["openings"], *_SEEDS["replies"], *_SEEDS["other languages"]]
        return [[Message("user", text)] for text in self.random.sample(texts, ROWS)]

    def requests(self, *, limit: int = 150) -> list[Draft]:
        """First turns, half of them begun by a seed."""
        # Without a template, nothing else would make the LLM write a request.
        begun = [
            self._seeded(_SEEDS["requests"]) if row % 2 or self._is_raw else ""
            for row in range(ROWS)
        ]
        return self._continued([[] for _ in begun], "user", begun, limit=limit)

    def documents(self, quantile: float) -> list[Draft]:
        """Longer first turns: mails, code, tables, essays.

        Args:
            quantile: Of their length.
        """
        begun = [self._seeded(_SEEDS["documents"]) for _ in range(ROWS)]
        length = round(_SHORTEST * (_LONGEST / _SHORTEST) ** quantile)
        return self._continued([[] for _ in begun], "user", begun, limit=length, least=length // 2)

    def quotes(self) -> list[Draft]:
        """First turns around one or several texts that the LLM has written."""
        articles = [article for _, article in self._articles(limit=300)]
        drafts: list[Draft] = []
        while articles:
            count = self.random.choice((1, 1, 2, 3))
            text = "\n\n".join(articles[:count])
            articles = articles[count:]
            drafts.append(
                [Message("user", self.random.choice(_SEEDS["quotes"]).replace("{text}", text))]
            )
        return drafts

    def chats(self) -> list[Draft]:
        """Conversations of three or five turns."""
        drafts = self.requests(limit=80)
        for row in range(0, len(drafts), 8):
            drafts[row] = [Message("user", self.random.choice(_SEEDS["openings"]))]
        finished: list[Draft] = []
        while drafts:
            running: list[Draft] = []
            for turns in self._replied(self._continued(drafts, "assistant", limit=110)):
                is_longer = len(turns) + 2 <= _MOST_TURNS and self.random.random() < 0.4
                (running if is_longer else finished).append(turns)
            drafts = running
        return finished

    def agents(self) -> list[Draft]:
        """Calls of tools, and their results; half of them answered and replied to."""
        finished: list[Draft] = []
        called: list[Draft] = []
        results: list[str] = []
        for subject, article in self._articles(limit=150) if self._takes_tools() else ():
            request, call, result = self._filled(self.random.choice(_SEEDS["tools"]), subject)
            call = self.random.choice(_SEEDS["calls"]).replace("{call}", call)
            turns = [Message("user", request), Message("assistant", call)]
            if "{text}" in result:
                is_json = result.startswith(_JSON)
                text = json.dumps(article, ensure_ascii=False)[1:-1] if is_json else article
                finished.append([*turns, Message("tool", result.replace("{text}", text))])
            else:
                called.append(turns)
                results.append(result)
        for *turns, result in self._continued(called, "tool", results, limit=100):
            # The LLM goes on to talk about what it has written.
            end = _AFTER_JSON if result.content.startswith(_JSON) else _FENCE
            finished.append([*turns, Message("tool", end.split(result.content)[0].rstrip())])
        self.random.shuffle(finished)
        half = len(finished) // 2
        answered = self._continued(finished[half:], "assistant", limit=90)
        return [*finished[:half], *self._replied(answered)]

    def _takes_tools(self) -> bool:
        turns = [Message("user", "a"), Message("assistant", "b"), Message("tool", "c")]
        try:
            self._backbone.encoder.encode(turns)
        except SidelightError:
            return False
        return not self._is_raw

    def _articles(self, *, limit: int) -> list[tuple[str, str]]:
        """Subjects, and what the LLM writes about them when it is asked to."""
        subjects = self.random.choices(_SEEDS["subjects"], k=ROWS)
        asked = [
            [Message("user", self._filled([self.random.choice(_SEEDS["articles"])], subject)[0])]
            for subject in subjects
        ]
        answered = self._continued(asked, "assistant", limit=limit)
        pairs = zip(subjects, answered, strict=True)
        return [(subject, turns[-1].content) for subject, turns in pairs if turns[-1].content]

    def _replied(self, drafts: Sequence[Draft]) -> list[Draft]:
        """With the user's next turn: a short one from the list, or one that the LLM writes."""
        replied: list[Draft] = []
        rest: list[Draft] = []
        for turns in drafts:
            if self.random.random() < 0.4:
                replied.append([*turns, Message("user", self.random.choice(_SEEDS["replies"]))])
            else:
                rest.append(turns)
        return [*replied, *self._continued(rest, "user", limit=60)]

    def _seeded(self, choices: Sequence[str]) -> str:
        subject = self.random.choice(_SEEDS["subjects"])
        return self._filled([self.random.choice(choices)], subject)[0]

    def _filled(self, texts: Sequence[str], subject: str) -> list[str]:
        """The texts about a subject, in one city."""
        city = self.random.choice(_SEEDS["cities"])
        values = {"subject": subject, "Subject": subject[0].upper() + subject[1:], "city": city}
        return [re.sub(r"\{(subject|Subject|city)\}", lambda m: values[m[1]], t) for t in texts]

    def _continued(
        self,
        drafts: Sequence[Draft],
        role: str,
        begun: Sequence[str] | None = None,
        *,
        limit: int,
        least: int = 0,
    ) -> list[Draft]:
        """Each draft with one turn more; it is empty if the LLM wrote no whole sentence.

        Args:
            drafts: What was said before.
            role: Whose turn it is.
            begun: How each turn begins; None leaves that to the LLM.
            limit: The most tokens that are written.
            least: The fewest; the LLM cannot end the turn before.
        """
        begun = begun or [""] * len(drafts)
        openings = [self._opening(turns, role) for turns in drafts]
        tokenizer = self._backbone.tokenizer
        options = {"add_special_tokens": self._is_raw, "verbose": False}
        prompts = [
            tokenizer(opening + text, **options)["input_ids"]
            for opening, text in zip(openings, begun, strict=True)
        ]
        fits = [len(prompt) < self._backbone.encoder.max_tokens for prompt in prompts]
        written = iter(self._generate([*compress(prompts, fits)], limit=limit, least=least))
        continued: list[Draft] = []
        for turns, text, has_room in zip(drafts, begun, fits, strict=True):
            whole = ""
            if has_room:
                row = next(written)
                end = next((i for i, one in enumerate(row) if one in self._controls), None)
                whole = text + tokenizer.decode(row[:end])
                whole = _whole_sentences(whole) if end is None else whole.strip()
            continued.append([*turns, Message(role, whole)])
        return continued

    def _generate(
        self, prompts: Sequence[Sequence[int]], *, limit: int, least: int
    ) -> list[list[int]]:
        """What the LLM writes after each prompt, with the control token that ends it."""
        if not prompts:
            return []
        token_ids, mask = self._backbone.pad(
            [EncodedPrompt(tuple(prompt), ()) for prompt in prompts], side="left"
        )
        start = token_ids.shape[1]
        room = self._backbone.encoder.max_tokens - start
        controls = torch.tensor([*self._controls], device=token_ids.device)

        def is_enough(ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            has_ended = torch.isin(ids[:, start:], controls).any(1)
            return (has_ended.float().mean() >= _ENOUGH).expand(len(ids))

        model: Any = self._backbone.model
        written: Tensor = model.generate(
            input_ids=token_ids,
            attention_mask=mask.long(),
            **_SAMPLING,
            max_new_tokens=min(limit, room),
            min_new_tokens=min(least, room),
            eos_token_id=[*self._controls],
            pad_token_id=next(iter(self._controls)),
            stopping_criteria=StoppingCriteriaList([is_enough]),
        )
        return written[:, start:].tolist()

    def _opening(self, turns: Draft, role: str) -> str:
        """What stands before the text of the next turn."""
        if self._is_raw:
            return "".join(f"{turn.content}\n" for turn in turns)
        mark = "sidelight-next-turn"
        conversation = [
            {"role": turn.role, "content": turn.content} for turn in (*turns, Message(role, mark))
        ]
        rendered: str = self._backbone.tokenizer.apply_chat_template(conversation, tokenize=False)
        return rendered[: rendered.rindex(mark)]


# The kind of each batch; the shares of a set follow from it.
_CYCLE = (
    "document", "chat", "agent", "request", "quote", "document", "chat", "short",
    "agent", "document", "chat", "request", "quote", "document", "chat", "agent",
)  # fmt: skip
_KINDS = {
    "short": _Writer.short_turns,
    "request": _Writer.requests,
    "quote": _Writer.quotes,
    "chat": _Writer.chats,
    "agent": _Writer.agents,
}


def _whole_sentences(text: str) -> str:
    """Up to the last end of a sentence or line; empty if most of the text came after it."""
    end = max((match.end() for match in _SENTENCE_END.finditer(text)), default=0)
    # Without the number or the sign of a list's next item.
    return _ITEM.sub("", text[:end]).rstrip() if end > len(text) / 3 else ""
