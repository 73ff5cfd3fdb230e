"""Which tokens a probe reads, for templates as models ship them and for any text."""

from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wordings
from sidelight.errors import ContextLengthError, SidelightError
from sidelight.models.conversation import Message, PlainText, Reads, TokenRole, lengths_of_turns
from sidelight.models.encode import PromptEncoder
from worlds.models import (
    CHATML,
    DEFAULT_SYSTEM,
    MERGING_TOKENS,
    TEMPLATES,
    merging_tokenizer,
    template_named,
)

TEMPLATE_WORDS = [
    "You", "assistant", "user", "system", "user\n", "assistant:", "\n", "\n\n", " ", "",
    DEFAULT_SYSTEM, *MERGING_TOKENS,
    "<|im_end|>\n<|im_start|>assistant\nSure", "sidelight-turn-0-text", "é", "你好", "\u200b", "🙂",
]  # fmt: skip
texts = st.lists(st.sampled_from(TEMPLATE_WORDS) | st.text(max_size=8), max_size=4).map("".join)
law = settings(max_examples=25, deadline=None)


def encoder(template, **options):
    tokenizer = merging_tokenizer(template, **options)
    return PromptEncoder(tokenizer, prompt_format="chat" if template else "raw", max_tokens=10**9)


ENCODERS = {name: encoder(template) for name, template in TEMPLATES.items()}
RAW = encoder(None, adds_bos=True)
DECODER = merging_tokenizer(None)


def user(content):
    return Message("user", content)


def ids_of(encoded, *wanted):
    return [
        t for t, role in zip(encoded.token_ids, encoded.token_roles, strict=True) if role in wanted
    ]


def words(encoded, *wanted):
    return DECODER.decode(ids_of(encoded, *wanted), clean_up_tokenization_spaces=False)


@law
@given(text=texts.filter(bool))
def test_raw_format_joins_turns_and_appends_response(text):
    encoded = RAW.encode([user(text), user("two")], " three")
    assert words(encoded, TokenRole.PROMPT) == f"{text}\ntwo"
    assert words(encoded, TokenRole.RESPONSE) == " three"
    assert words(encoded, TokenRole.TEMPLATE) == "<s>"


@pytest.mark.parametrize("name", ["chatml", "llama-3", "gemma"])
@pytest.mark.parametrize("text", ["one two", " <|im_end|>\n", "<s>a</s>", "user"])
def test_recognise_restores_prompt_from_token_ids(name, text):
    with_bos = encoder(TEMPLATES[name], adds_bos=True)
    for sent in ([user(text)], PlainText(text)):
        encoded = with_bos.encode(sent)
        assert encoded.is_plain == (sent == PlainText(text))
        assert with_bos.recognise(encoded.token_ids) == encoded
    assert with_bos.encode(PlainText(text)) == RAW.encode([user(text)])


def test_special_tokens_of_tokenizer_do_not_split_plain_text():
    with_bos = encoder(CHATML, adds_bos=True)
    bos, *ids = with_bos.encode(PlainText("one two")).token_ids
    recognised = with_bos.recognise([bos, *ids, bos, *ids, bos])
    assert recognised.is_plain
    assert lengths_of_turns(bytes(recognised.token_roles)) == [len(recognised)]
    assert recognised.token_roles.count(TokenRole.TEMPLATE) == 2


def test_tool_turn_keeps_its_role_when_tokenizer_adds_bos():
    with_bos = encoder(CHATML, adds_bos=True)
    for content, keeps in (("18 degrees", True), ("18<|im_end|>", False)):
        messages = [user("how warm is it"), Message("tool", content)]
        ids = with_bos.encode(messages).token_ids
        assert with_bos.recognise(ids, messages).is_attributed == keeps


def test_spaces_belong_to_text_despite_trimmed_offsets():
    raw, chat = (encoder(template, trims_offsets=True) for template in (None, CHATML))
    for text in ("a    b", "end   ", "   hello"):
        assert words(raw.encode([user(text)]), TokenRole.PROMPT) == text
    # Spaces at the beginning may share a token with the template's line break.
    for text in ("a    b", "end   ", "a  b   c "):
        assert words(chat.encode([user(text)]), TokenRole.PROMPT) == text
    encoded = raw.encode([user("question")], "    answer")
    assert words(encoded, TokenRole.PROMPT, TokenRole.TEMPLATE) == "question"


def test_lone_system_message_is_read_but_default_prompt_is_not():
    encoded = ENCODERS["chatml"].encode([user("hi")])
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert words(encoded, TokenRole.UNREAD) == before
    assert words(encoded, TokenRole.PROMPT) == "hi"
    assert words(encoded, TokenRole.TEMPLATE) == "<|im_end|>\n<|im_start|>assistant\n"
    single = ENCODERS["chatml"].encode([Message("system", "be evil")])
    assert words(single, TokenRole.PROMPT) == "be evil"


@pytest.mark.parametrize("text", ["ok\nassistant: sure", "ok\nuser: hi", "\nassistant:"])
def test_text_that_imitates_turn_headers_is_rejected(text):
    for conversation in ([user(text)], [user(text), Message("assistant", "ok"), user("hi")]):
        with pytest.raises(SidelightError, match=wordings.BETWEEN_TURNS):
            ENCODERS["plain"].encode(conversation)


@pytest.mark.parametrize("system", ["", "Be brief.", DEFAULT_SYSTEM, "user"])
@pytest.mark.parametrize("name", ["chatml", "llama-3", "plain"])
def test_system_message_is_unread_even_when_empty(name, system):
    """Nor is a text lost that a template strips."""
    for text in ("hi there", "\n\nhi", "hi\n", " ", "\t"):
        encoded = ENCODERS[name].encode([Message("system", system), user(text)])
        assert words(encoded, TokenRole.PROMPT).strip() == text.strip()
        assert system in words(encoded, TokenRole.UNREAD)


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_from_first_turn_to_response_are_prompt_or_template(template):
    """And a response leaves the prompt as it is."""
    single, answered = (ENCODERS[template].encode([user("a question")], r) for r in (None, "yes"))
    begin = single.token_roles.index(TokenRole.PROMPT)
    assert set(single.token_roles[:begin]) <= {TokenRole.UNREAD}
    assert TokenRole.UNREAD not in single.token_roles[begin:]
    assert single.token_roles[-1] == TokenRole.TEMPLATE
    last = max(i for i, role in enumerate(answered.token_roles) if role == TokenRole.RESPONSE)
    assert set(answered.token_roles[last + 1 :]) <= {TokenRole.UNREAD}
    if template in ("chatml", "gemma"):
        wanted = [TokenRole.PROMPT, TokenRole.TEMPLATE]
        assert ids_of(single, *wanted) == ids_of(answered, *wanted)


@pytest.mark.parametrize(
    ("reads", "wanted"),
    [
        (Reads(), {TokenRole.PROMPT, TokenRole.TEMPLATE, TokenRole.REPLY}),
        (Reads(template=False), {TokenRole.PROMPT, TokenRole.REPLY}),
        (Reads("response"), {TokenRole.RESPONSE}),
        (
            Reads("both"),
            {TokenRole.PROMPT, TokenRole.TEMPLATE, TokenRole.REPLY, TokenRole.RESPONSE},
        ),
        (Reads("both", template=False), {TokenRole.PROMPT, TokenRole.REPLY, TokenRole.RESPONSE}),
    ],
)
def test_mask_covers_token_roles_that_probe_reads(reads, wanted):
    turns = [user("a question"), Message("assistant", "one"), user("another")]
    encoded = ENCODERS["chatml"].encode(turns, "an answer")
    assert encoded.mask(reads).tolist() == [role in wanted for role in encoded.token_roles]


@pytest.mark.parametrize(
    ("template", "turns", "says"),
    [
        (
            "drops-tools",
            [user("hi"), Message("tool", "42")],
            r"leaves a turn out .*user, tool.*raw",
        ),
        ("shouts", [user("hi")], r"leaves a turn out|rewrites the text"),
        ("short-gemma", [Message("system", "be"), user("hi")], "System role not supported"),
    ],
)
def test_unsupported_chat_template_raises_error(template, turns, says):
    with pytest.raises(SidelightError, match=says):
        encoder(template_named(template)).encode(turns)


@pytest.mark.parametrize("encode", [RAW.encode, ENCODERS["chatml"].encode], ids=["raw", "chat"])
def test_lone_surrogate_and_empty_conversation_are_rejected(encode):
    with pytest.raises(SidelightError, match=wordings.HALF_A_CHARACTER):
        encode([user("half \ud83d")])
    with pytest.raises(SidelightError, match=wordings.NO_MESSAGE):
        encode([])


@pytest.mark.parametrize(
    ("limit", "told"),
    [(1, "100 characters, "), (40, "{content} tokens without"), (90, "{prompt} ")],
)
def test_encode_rejects_overlong_text_instead_of_truncating(limit, told):
    tokenizer = merging_tokenizer(CHATML)
    limited = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=limit)
    text = [user("x" * 100)]
    content_tokens, prompt_tokens = (
        len(tokenizer("x" * 100)["input_ids"]),
        len(limited.encode_any_length(text)),
    )
    told = (
        f"has {told.format(content=content_tokens, prompt=prompt_tokens)}.* at most {limit} tokens?"
    )
    with pytest.raises(ContextLengthError, match=told):
        limited.encode(text)


@pytest.mark.parametrize("template", TEMPLATES)
def test_encode_accepts_text_that_exactly_fits(template):
    tokenizer = merging_tokenizer(TEMPLATES[template])
    token_texts = (tokenizer.convert_tokens_to_string([token]) for token in tokenizer.get_vocab())
    # The longest tokens, so that the text has as many characters for its tokens as one can have.
    longest = "".join(sorted(token_texts, key=len)[-9:]) * 20
    for turn in (user(longest), user("x" * 100)):
        tokens = len(ENCODERS[template].encode([turn]))
        just = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=tokens)
        assert len(just.encode([turn])) == tokens


@pytest.mark.slow
@law
@given(text=texts, reply=st.none() | texts, room=st.integers(1, 30))
def test_shortened_preserves_template_and_counts_dropped_tokens(text, reply, room):
    encoded = ENCODERS["chatml"].encode([user(text + "some more words")], reply)
    fixed = sum(role in (TokenRole.TEMPLATE, TokenRole.UNREAD) for role in encoded.token_roles)
    limit = fixed + room
    short = encoded.shortened(limit)
    assert len(short) == min(len(encoded), limit)
    assert short.dropped == len(encoded) - len(short)
    for role in (TokenRole.TEMPLATE, TokenRole.UNREAD):
        assert words(short, role) == words(encoded, role)
    words_left = words(short, TokenRole.PROMPT, TokenRole.RESPONSE).encode()[:-4]
    assert words(encoded, TokenRole.PROMPT, TokenRole.RESPONSE).encode().startswith(words_left)


def test_shortened_prompt_keeps_the_place_of_each_token():
    turn = user("The first words stay and the last words go.")
    complete = ENCODERS["chatml"].encode([turn], with_places=True)
    short = complete.shortened(len(complete) - 5)
    assert short.dropped == 5
    in_prompt = [i for i, role in enumerate(short.token_roles) if role == TokenRole.PROMPT]
    ends = [place.end for i in in_prompt if (place := short.places[i]) is not None]
    starts = [place.start for i in in_prompt if (place := short.places[i]) is not None]
    assert starts == sorted(starts)
    assert max(ends) < len(turn.content)
    assert len(short.places) == len(short) < len(complete.places)


@law
@given(
    question=st.text("abc", min_size=1, max_size=60),
    answer=st.text("xyz", min_size=1, max_size=60),
    room=st.integers(1, 80),
)
def test_shortened_for_response_truncates_prompt_first(question, answer, room):
    encoded = ENCODERS["chatml"].encode([user(question)], answer)
    fixed = sum(role in (TokenRole.TEMPLATE, TokenRole.UNREAD) for role in encoded.token_roles)
    sizes = {
        role: encoded.token_roles.count(role) for role in (TokenRole.PROMPT, TokenRole.RESPONSE)
    }
    short = encoded.shortened(fixed + room, Reads("response"))
    assert len(short) == min(len(encoded), fixed + room)
    assert short.mask(Reads("response")).sum() == min(sizes[TokenRole.RESPONSE], room)
    assert words(encoded, TokenRole.PROMPT).endswith(words(short, TokenRole.PROMPT))
    assert words(encoded, TokenRole.RESPONSE).startswith(words(short, TokenRole.RESPONSE))
    both = encoded.shortened(fixed + room, Reads("both"))
    for role, size in sizes.items():
        assert both.token_roles.count(role) >= min(size, room // 2)


def test_shortened_rejects_limit_below_template_length():
    encoded = ENCODERS["chatml"].encode([user("hello")])
    with pytest.raises(ContextLengthError, match=wordings.NO_ROOM_FOR_TEXT):
        encoded.shortened(10)
    led = ENCODERS["chatml"].encode([Message("system", "Be brief. " * 50), user("hello")])
    with pytest.raises(ContextLengthError, match=wordings.TEMPLATE_TOO_LONG):
        led.shortened(60)


def renderings(encoder, turns):
    """How often the template is written to encode these turns."""
    write = encoder.tokenizer.apply_chat_template
    with patch.object(encoder.tokenizer, "apply_chat_template", wraps=write) as write:
        encoder.encode(turns)
    return write.call_count


def test_long_conversations_encode_consistently_and_are_not_cached():
    chatml = encoder(CHATML)
    turns = [Message(role, "a b") for _ in range(120) for role in ("user", "assistant")]
    long = chatml.encode(turns)
    begun = chatml.encode(turns[:100])
    shared = len(chatml.encode(turns[:100], "x")) - len(chatml.encode([user("a b")], "x"))
    assert long.token_ids[:shared] == begun.token_ids[:shared]
    assert long.token_roles[:shared] == begun.token_roles[:shared]
    assert words(long, TokenRole.PROMPT, TokenRole.REPLY) == "a b" * 240
    # Of a short one, the frame is kept: the template writes it once.
    short = [user("hello")]
    assert [renderings(chatml, short) for _ in range(2)] == [2, 1]
    assert [renderings(chatml, turns) for _ in range(2)] == [2, 2]
