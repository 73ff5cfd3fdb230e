"""Hidden states of a training are kept whole, compressed or not at all, for the same probe."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sidelight.training.fit
import sidelight.training.loop
import wordings
from sidelight.data.examples import LabelledExamples
from sidelight.data.loading import load_examples
from sidelight.engines.transformers.backbone import TransformersBackbone
from sidelight.errors import SidelightError
from sidelight.probes.artifact import load_probe
from sidelight.probes.mechanisms.base import (
    Geometry,
    build_mechanism,
    mechanism_names,
    mechanism_spec,
)
from sidelight.probes.ragged import Ragged
from sidelight.states.cache import ActivationCache, Shard
from sidelight.states.compression import Compression, directions_of_width
from sidelight.states.extraction import cached_logits, streamed
from sidelight.training import keeping
from sidelight.training.checkpoints import resume
from sidelight.training.dataset import make_split
from sidelight.training.fit import CHECKPOINT, fit
from sidelight.training.loop import layer_products, train_mechanisms
from sidelight.training.settings import FitOptions, suggested_settings
from worlds.data import planted_rows
from worlds.models import tiny_backbone

QUICK = suggested_settings("readout").changed(learning_rate=3e-2, epochs=4, batch_size=16)
READOUT = (mechanism_spec("readout"), QUICK)
# Eight bits of the largest coordinate of a token.
EIGHT_BITS = 2e-2
# The jitter of batches of another shape, after a training.
JITTER = 2e-2


@pytest.fixture(scope="module")
def hidden():
    """States with a few strong directions, as a model's residual stream has them."""
    random = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 24, 24, generator=random) * torch.logspace(0, -2, 24)[:, None]
    return (torch.randn(3, 400, 24, generator=random) @ mixing + 1).bfloat16()


def compressed_shard(compression, hidden):
    return Shard.compressed({0: compression.compress(hidden)})


@pytest.mark.parametrize("is_normalised", [True, False])
def test_full_rank_compression_is_accurate_to_eight_bits(hidden, is_normalised):
    compression = Compression.measured([hidden], is_normalised=is_normalised, directions=24)
    stored = compression.compress(hidden)
    z = stored.values * stored.factors[..., None].float()
    lifted = compression.lifted(z.transpose(0, 1)[None])[0]
    for layer, states in enumerate(hidden):
        wanted = compression.moments.standardised(states, layer)
        torch.testing.assert_close(lifted[:, layer], wanted, atol=2 * EIGHT_BITS, rtol=EIGHT_BITS)


@given(st.integers(8, 8192))
def test_compressed_token_takes_at_most_a_quarter_of_its_bytes(width):
    assert 4 * (directions_of_width(width) + 2) <= 2 * width or width < 12


@pytest.mark.parametrize("name", ["readout", "spans"])
@pytest.mark.parametrize("layers", [None, 2])
def test_restricted_probe_gives_same_logits_on_compressed_and_uncompressed_states(
    hidden, name, layers
):
    compression = Compression.measured([hidden], is_normalised=True, directions=10)
    torch.manual_seed(1)
    mechanism = build_mechanism(mechanism_spec(name), Geometry(3, 24, 1))
    for parameter in mechanism.parameters():
        parameter.data.normal_()
    scaled = compression.moments.limited(layers).weighted(torch.tensor([0.5, 2.0]))
    with torch.no_grad():
        small = layer_products(
            compressed_shard(compression, hidden), compression.fold(scaled, mechanism.projections())
        )
        for parameter in mechanism.layer_parameters():
            parameter.copy_(compression.restricted(parameter))
        again = [compression.restricted(parameter) for parameter in mechanism.layer_parameters()]
        exact = scaled.fold(mechanism.projections()).layers(hidden.float())
    for parameter, restricted in zip(mechanism.layer_parameters(), again, strict=True):
        torch.testing.assert_close(restricted, parameter.data, atol=5e-3, rtol=5e-3)
    spread = float(exact.std())
    torch.testing.assert_close(small / spread, exact / spread, atol=5 * EIGHT_BITS, rtol=0)
    lengths = torch.tensor([400])
    found = [mechanism.logits(Ragged(c.transpose(0, 1), lengths)) for c in (small, exact)]
    assert torch.isfinite(found[0]).all()


def test_only_mechanisms_with_layer_parameters_train_on_compressed_states():
    geometry = Geometry(2, 32, 1)
    able = {
        name
        for name in mechanism_names()
        if build_mechanism(mechanism_spec(name), geometry).layer_parameters()
    }
    assert able & {"attention", "gate", "pooling", "readout", "spans"} == {"readout", "spans"}


@pytest.fixture(scope="module")
def examples():
    return load_examples(planted_rows("binary", 60))


@pytest.fixture
def all_directions(monkeypatch):
    """A random model has no weak directions."""
    monkeypatch.setattr(keeping, "directions_of_width", lambda width: width)


def fitted(tiny, root, examples, **options):
    spec = options.pop("mechanism", READOUT[0])
    options = FitOptions(cache_root=root, mechanism=spec, settings=QUICK, **options)
    return fit(tiny, examples, None, name="a", options=options, out=root / "probe")


def tensors(probe):
    return {name: value.numpy().tobytes() for name, value in probe.mechanism.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("states", ["disk", "stream"])
def test_state_storage_does_not_change_trained_probe(
    tiny, tmp_path, examples, states, all_directions
):
    exact_fit = fitted(tiny, tmp_path / "whole", examples, states="whole")
    compressed_fit = fitted(tiny, tmp_path / "other", examples, states=states)
    states_record = compressed_fit.probe.card.training.states
    assert (states_record.form, states_record.streamed) == ("compressed", states == "stream")
    assert exact_fit.probe.card.training.states.form == "whole"
    np.testing.assert_allclose(compressed_fit.losses, exact_fit.losses, atol=5 * JITTER)
    # What is saved reads whole states.
    split = make_split(tiny, examples, FitOptions(cache_root=tmp_path))
    logits = [
        cached_logits(each_fit.probe, split.states) for each_fit in (exact_fit, compressed_fit)
    ]
    assert np.corrcoef(*(each_logits.ravel() for each_logits in logits))[0, 1] > 0.98


def test_small_data_and_shared_heads_use_uncompressed_states(tiny, tmp_path, examples):
    pooling = mechanism_spec("pooling")
    for options in ({}, {"states": "disk", "mechanism": pooling}, {"states": "whole"}):
        fitted_probe = fitted(tiny, tmp_path, examples, **options)
        assert fitted_probe.probe.card.training.states.form == "whole"
        assert not fitted_probe.probe.card.training.states.streamed


@pytest.mark.slow
def test_large_data_is_compressed_and_streamed_beyond_disk_limit(
    tiny, tmp_path, examples, monkeypatch, all_directions
):
    monkeypatch.setattr(keeping, "MOST_UNCOMPRESSED_BYTES", 20_000)
    fitted_probe = fitted(tiny, tmp_path / "a", examples)
    states_record = fitted_probe.probe.card.training.states
    assert (states_record.form, states_record.streamed) == ("compressed", False)
    monkeypatch.setattr(keeping, "MOST_DISK_BYTES", 1000)
    fitted_probe = fitted(tiny, tmp_path / "b", examples)
    assert fitted_probe.probe.card.training.states.streamed
    pooling = fitted(tiny, tmp_path / "c", examples, mechanism=mechanism_spec("pooling"))
    states_record = pooling.probe.card.training.states
    assert (states_record.form, states_record.streamed) == ("whole", True)


def test_gpu_streams_states_when_faster_than_disk(tiny):
    # 29 layers of 3,072 dimensions take 6.3e9 operations a token, and 178 KB, or a quarter.
    who, gpu = replace(tiny.fingerprint, layers=29, width=3072), torch.device("cuda")
    assert not keeping.reads_faster_than_disk(who, gpu, 44_000)
    assert keeping.reads_faster_than_disk(who, gpu, 178_000)
    assert not keeping.reads_faster_than_disk(who, torch.device("cpu"), 10**9)


@pytest.mark.slow
def test_lossy_compression_is_abandoned_with_a_warning(
    tiny, tmp_path, examples, monkeypatch, warned
):
    monkeypatch.setattr(keeping, "directions_of_width", lambda width: 1)
    fitted_probe = fitted(tiny, tmp_path, examples, states="disk")
    assert fitted_probe.probe.card.training.states.form == "whole"
    (told,) = [line for line in warned() if "stored uncompressed" in line]
    assert "differ by" in told


@pytest.mark.slow
def test_too_few_texts_disable_compression(tiny, tmp_path, all_directions, monkeypatch, warned):
    # All are taken for directions, which leaves none to compare on.
    monkeypatch.setattr(keeping, "_first", lambda _, rows, least: rows if least == 1 else [])
    examples = load_examples(planted_rows("binary", 40))
    fitted_probe = fitted(tiny, tmp_path, examples, states="disk")
    assert fitted_probe.probe.card.training.states.form == "whole"
    assert any("0 texts are too few to compare" in line for line in warned())


@pytest.mark.slow
def test_streaming_recomputes_states_without_writing_to_disk(tiny, tmp_path, examples, ran):
    split = make_split(tiny, examples, FitOptions(cache_root=tmp_path / "disk"))
    limit = split.states.token_bytes * 100
    small = ActivationCache(
        tmp_path / "stream",
        split.states.prompts,
        reads=split.states.reads,
        fingerprint=tiny.fingerprint,
        engine=tiny.engine,
        shard_bytes=limit,
    )
    states = streamed(tiny, small)
    assert len(states.shards) > 3
    assert not states.missing()
    ran.clear()
    found = [states.read(shard) for shard in states.shards]
    assert len(ran) == len(examples)
    assert not (tmp_path / "stream").exists()
    for shard, rows in zip(found, states.shards, strict=True):
        torch.testing.assert_close(
            shard.hidden, split.states.read(rows).hidden, rtol=2**-6, atol=1e-3
        )
    on_disk, computed = (
        train_mechanisms([READOUT], split=each_split)[0]
        for each_split in (split, replace(split, states=states))
    )
    assert on_disk is not None
    assert computed is not None


class Killed(BaseException):
    """What a signal raises."""


def killing(monkeypatch, after):
    """Ends the training when so many epochs have been saved."""
    saved, save = [], sidelight.training.loop.save_checkpoint

    def counted(runs, path, *, epochs, run_sha256):
        save(runs, path, epochs=epochs, run_sha256=run_sha256)
        saved.append(epochs)
        if len(saved) == after:
            raise Killed

    monkeypatch.setattr(sidelight.training.loop, "save_checkpoint", counted)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("states", ["whole", "disk", "stream"])
@pytest.mark.parametrize("few", [True, False], ids=["cross-fitted", "held out"])
def test_training_resumes_after_last_saved_epoch_to_identical_probe(
    tiny, tmp_path, states, few, all_directions, monkeypatch
):
    examples = load_examples(planted_rows("binary", 60))
    if not few:
        monkeypatch.setattr(LabelledExamples, "cross_fitted_below", 10)
    expected = fitted(tiny, tmp_path / "whole", examples, states=states)
    root = tmp_path / "killed"
    for after in (1, 2):
        with monkeypatch.context() as patch:
            killing(patch, after)
            with pytest.raises(Killed):
                fitted(tiny, root, examples, states=states)
        assert [*root.glob(f"run-*/{CHECKPOINT}")]
    saved = killing(monkeypatch, 99)
    fitted_probe = fitted(tiny, root, examples, states=states)
    # One epoch before the first kill, and two before the second.
    assert saved[0] == 4
    assert tensors(fitted_probe.probe) == tensors(expected.probe)
    np.testing.assert_array_equal(fitted_probe.losses, expected.losses)
    assert tensors(load_probe(root / "probe")) == tensors(expected.probe)
    assert not [*root.glob("run-*")]


# Where a training is killed: the owner of a function, its name, and which call of it.
MOMENTS = (
    (TransformersBackbone, "run", 3),  # Reading the texts.
    (sidelight.training.loop, "save_checkpoint", 2),  # Before the second epoch is saved.
    (sidelight.training.fit, "save_probe", 1),  # After the last epoch.
)


def train_until(moment, root, states, examples, monkeypatch):
    """Train; with the number of a moment, only until the process is killed there."""
    monkeypatch.setattr(keeping, "directions_of_width", lambda width: width)
    # Several batches, so that some states are on disk when the first signal comes.
    monkeypatch.setattr(TransformersBackbone, "batch_tokens", 200)
    if moment is not None:
        owner, name, last = MOMENTS[moment]
        calls, called = count(1), getattr(owner, name)

        def die(*args, **kwargs):
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return called(*args, **kwargs)

        monkeypatch.setattr(owner, name, die)
    return fitted(tiny_backbone(), root, examples, states=states)


# A process of its own, since autograd does not survive a fork.
KILLED = """
import sys
from pathlib import Path
import pytest, torch
import test_keeping
from sidelight.data.loading import load_examples
from worlds.data import planted_rows
torch.set_num_threads(1)
root, states, moment = sys.argv[1:]
texts = load_examples(planted_rows("binary", 60))
test_keeping.train_until(int(moment), Path(root), states, texts, pytest.MonkeyPatch())
"""


@pytest.mark.slow
@pytest.mark.parametrize("states", ["disk", "stream"])
def test_training_killed_by_sigkill_resumes_to_identical_probe(
    tmp_path, states, examples, monkeypatch
):
    expected = train_until(None, tmp_path / "whole", states, examples, monkeypatch)
    root = tmp_path / "killed"
    folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    for moment in range(len(MOMENTS)):
        command = [sys.executable, "-c", KILLED, str(root), states, str(moment)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert len([*root.glob("run-*")]) == 1
    fitted_probe = train_until(None, root, states, examples, monkeypatch)
    assert tensors(fitted_probe.probe) == tensors(expected.probe)
    np.testing.assert_array_equal(fitted_probe.losses, expected.losses)
    assert not [*root.glob("run-*")]


@pytest.mark.slow
def test_corrupt_checkpoint_raises_clear_error(tiny, tmp_path, examples, monkeypatch):
    with monkeypatch.context() as patch:
        killing(patch, 1)
        with pytest.raises(Killed):
            fitted(tiny, tmp_path, examples)
    (path,) = tmp_path.glob(f"run-*/{CHECKPOINT}")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SidelightError, match=wordings.CANNOT_CONTINUE):
        fitted(tiny, tmp_path, examples)


@pytest.mark.slow
def test_changed_settings_restart_training_with_a_notice(
    tiny, tmp_path, examples, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        killing(patch, 2)
        with pytest.raises(Killed):
            fitted(tiny, tmp_path / "a", examples)
    saved = killing(monkeypatch, 99)
    # The same training with less memory has smaller shards, hence other batches.
    fitted(tiny, tmp_path / "a", examples, memory_bytes=200_000)
    assert "Training starts over" in capsys.readouterr().err
    assert saved[0] == 1


@pytest.mark.slow
def test_streaming_works_without_free_disk_space(tiny, tmp_path, examples, monkeypatch):
    monkeypatch.setattr("sidelight.states.cache._RESERVE_BYTES", 2**62)
    fitted_probe = fitted(tiny, tmp_path, examples, states="stream")
    assert fitted_probe.probe.card.training.states.streamed
    with pytest.raises(SidelightError, match=r"states=stream"):
        fitted(tiny, tmp_path, examples, states="whole")


def test_shared_states_stay_uncompressed_on_disk(tiny, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(keeping, "reads_faster_than_disk", lambda *_: True)
    monkeypatch.setattr(keeping, "MOST_UNCOMPRESSED_BYTES", 1)
    split = make_split(tiny, examples, FitOptions(cache_root=tmp_path))
    for candidates, options in (
        ([], FitOptions()),
        ([READOUT], FitOptions(keep_cache=True)),
    ):
        chosen = keeping.choose_keeping(tiny, split, candidates, options, tokens=1_000)
        assert chosen == keeping.Keeping()


def test_resume_without_checkpoint_starts_at_epoch_zero(tmp_path):
    assert resume([], tmp_path / CHECKPOINT, run_sha256="") == 0
