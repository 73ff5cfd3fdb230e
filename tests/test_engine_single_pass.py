"""Probes cost no forward pass, and no hidden state outlives its layer."""

import gc
import weakref

import torch

from sidelight.bank import Bank
from sidelight.engines.base import Sampling
from sidelight.prompts import Message, Reads
from test_engine_decoding import ask, run
from tiny import three_probes, tiny_backbone, untrained_probe

TEXT = "a prompt of some length, to be told from anything else by its shape"
WIDTH = 32


def passes(backbone, probes):
    """Rows and tokens of every forward pass of one completion."""
    shapes = []

    def note(_module, _args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = backbone.model.register_forward_pre_hook(note, with_kwargs=True)
    answer = run(backbone, lambda engine: ask(engine, TEXT), probes=probes)
    hook.remove()
    return shapes, answer


def test_three_probes_add_no_forward_pass_and_no_token():
    backbone = tiny_backbone()
    with_probes, judged = passes(backbone, three_probes(backbone))
    without, plain = passes(backbone, [])
    assert with_probes == without
    prompt = judged.finished.prompt_tokens
    assert without == [(1, prompt)] + [(1, 1)] * (judged.finished.completion_tokens - 1)
    assert len(judged.judged.verdicts) == 3
    assert judged.text == plain.text


def test_probes_of_the_response_add_no_forward_pass_either():
    backbone = tiny_backbone()
    late = [untrained_probe(backbone, "late", reads=Reads("both"))]
    with_probe, judged = passes(backbone, late)
    assert with_probe == passes(backbone, [])[0]
    assert len(judged.finished.verdicts) == 1


def test_a_hidden_state_is_dead_once_the_next_layer_has_run():
    backbone = tiny_backbone()
    late = untrained_probe(backbone, "late", reads=Reads("both"), mechanism="attention")
    states: list[weakref.ref[torch.Tensor]] = []
    alive_before: list[int] = []

    def note(_module, _args, output):
        # The newest state is the running layer's input, so it may live.
        alive_before.append(sum(state() is not None for state in states[:-1]))
        states.append(weakref.ref(output))

    hooks = [layer.register_forward_hook(note) for layer in backbone.model.model.layers]
    run(backbone, lambda engine: ask(engine, TEXT), probes=[*three_probes(backbone), late])
    for hook in hooks:
        hook.remove()
    assert len(states) == 16 * len(hooks)
    assert set(alive_before) == {0}
    assert not any(state() is not None for state in states)


def test_nothing_as_wide_as_a_hidden_state_is_left_after_the_pass():
    backbone = tiny_backbone()
    alive: list[int] = []
    modules = [backbone.model.model.layers[-1], backbone.model]
    hooks = [m.register_forward_hook(lambda *_: alive.append(len(wide_tensors()))) for m in modules]
    once = Sampling(temperature=0.0, max_tokens=1)
    run(backbone, lambda engine: ask(engine, TEXT, once), probes=three_probes(backbone))
    for hook in hooks:
        hook.remove()
    in_last_layer, after_pass = alive
    # Proves that the audit sees hidden states: the last layer's input and output at least.
    assert in_last_layer >= 2
    assert after_pass == 0


def test_a_tap_keeps_layers_times_columns_numbers_of_a_token():
    backbone = tiny_backbone()
    bank = Bank(three_probes(backbone))
    tap = bank.tap()
    prompt = backbone.encoder.encode([Message("user", TEXT)])
    with backbone.tapped(tap):
        backbone.run([prompt])
    columns = sum(probe.mechanism.columns().shape[-1] for probe in bank.probes)
    assert tap.projected().shape == (1, len(prompt), backbone.fingerprint.layers, columns)


def wide_tensors():
    """Live tensors, weights aside, with the width of a hidden state for every token."""
    # By type: isinstance would wake lazy objects of other libraries.
    tensors = [o for o in gc.get_objects() if type(o) is torch.Tensor]
    return [t for t in tensors if t.shape[-1:] == (WIDTH,) and t.numel() >= len(TEXT) * WIDTH]
