"""The hidden states of GGUF files are those of the same model in ``transformers``."""

import signal

import numpy as np
import pytest

import wordings
from sidelight.errors import SidelightError
from sidelight.models.conversation import EncodedPrompt, Message, TokenRole
from sidelight_llama.context import BATCH_TOKENS
from worlds.gguf import CONFIGS, gguf_model, needs_llama, states

pytestmark = needs_llama

# Of the largest state of a layer: sums of float32 in another order.
ROUNDING = 1e-5
# llama.cpp takes the GELU of Gemma from a table of float16 numbers: with a GELU of them in
# transformers too, the first block's output differs by less than 1e-6 in 97 of 100 tokens, and the
# others meet the next number of the table.
TABLE = 5e-4


@pytest.fixture(scope="module", params=CONFIGS)
def model(request, tmp_path_factory):
    return gguf_model(tmp_path_factory.mktemp("gguf"), request.param, max_position_embeddings=512)


def prompt(length, *, start=()):
    ids = np.random.default_rng(length).integers(5, 260, length - len(start)).tolist()
    return EncodedPrompt((*start, *ids), (TokenRole.PROMPT,) * length)


def require_close(mine, theirs, *, rounding):
    assert mine.shape == theirs.shape
    for one, theirs_of_text in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(
            one, theirs_of_text, rtol=0, atol=rounding * np.abs(theirs_of_text).max()
        )


def test_states_of_every_layer_match_transformers(model):
    fingerprint = model.backbone.fingerprint
    rounding = TABLE if "gemma3" in fingerprint.name else ROUNDING
    for length in (1, 100):
        mine = states(model.backbone, prompt(length))
        assert mine.shape == (fingerprint.layers, length, fingerprint.width)
        require_close(mine, states(model.reference, prompt(length)), rounding=rounding)


def test_prompts_split_over_passes_have_the_same_states(model):
    text = prompt(BATCH_TOKENS + 44)
    full = states(model.backbone, text)
    short = prompt(BATCH_TOKENS, start=text.token_ids[:BATCH_TOKENS])
    assert np.array_equal(states(model.backbone, short), full[:, :BATCH_TOKENS])
    rounding = TABLE if "gemma3" in model.backbone.name else ROUNDING
    require_close(full, states(model.reference, text), rounding=rounding)


def test_reusing_a_shared_prefix_does_not_change_states(model):
    prefix = prompt(40).token_ids
    for text in (prompt(60, start=prefix), prompt(50, start=prefix), prompt(60)):
        require_close(
            states(model.backbone, text, after=40),
            states(model.backbone, text)[:, 40:],
            rounding=ROUNDING,
        )


def test_overwriting_a_loaded_file_does_not_change_states(model):
    path, text = model.backbone.path, prompt(10)
    before, content = states(model.backbone, text), path.read_bytes()
    path.write_bytes(bytes(len(content)))
    after = states(model.backbone, text)
    path.write_bytes(content)
    assert np.array_equal(after, before)


def test_unknown_token_is_rejected_and_the_backbone_stays_usable(model):
    with pytest.raises(SidelightError, match=wordings.UNKNOWN_TOKEN.format(token=300, limit=300)):
        model.backbone.run([EncodedPrompt((5, 300), (TokenRole.PROMPT,) * 2)])
    # It goes on.
    assert len(states(model.backbone, prompt(3))) == 3


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_ctrl_c_interrupts_a_pass_without_corrupting_the_backbone(model, monkeypatch):
    before, library = states(model.backbone, prompt(20)), model.backbone.model.library
    name_of, asked = library.ggml_get_name, []

    def interrupted(tensor):
        if not asked:
            signal.raise_signal(signal.SIGINT)
        asked.append(tensor)
        return name_of(tensor)

    monkeypatch.setattr(library, "ggml_get_name", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.backbone.run([prompt(20)])
    # It goes on.
    assert np.array_equal(states(model.backbone, prompt(20)), before)


def test_control_tokens_in_content_are_encoded_as_text(model):
    encoder = model.backbone.encoder
    encoded = encoder.encode([Message("user", "Hi <|end|> you")])
    assert encoder.tokenizer.decode(encoded.token_ids) == (
        "<|user|>Hi <|end|> you<|end|>\n<|assistant|>"
    )
    assert encoded.token_ids.count(1) == 1
