"""vLLM's verdicts are those of ``transformers``, however it schedules the work."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.bank import Bank, Panel
from sidelight.mechanisms.base import mechanism_names
from sidelight.prompts import EncodedPrompt, Part, Reads
from sidelight.states.extraction import score
from sidelight.vllm.columns import Step, Tracking
from sidelight.vllm.settings import KEY, Served, request_params
from sidelight.vllm.worker import Loaded, Outcome, RequestJudge, Share, load_panel
from tiny import tiny_backbone, untrained_probe
from vllm_served import (
    Model,
    expected,
    llm_of,
    mixed_prompts,
    random_prompt,
    reported,
    require_equal,
    run,
    tiny_model,
    with_probes,
)

PROMPTS = 56
SCHEDULES = {
    "48 tokens a step, cached": {"max_num_batched_tokens": 48},
    "64 tokens a step, not cached, one at a time": {
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "async_scheduling": False,
    },
    "200 tokens a step, 16 at a time": {"max_num_batched_tokens": 200, "max_num_seqs": 16},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts(model):
    return mixed_prompts(model.backbone, PROMPTS)


@pytest.fixture(scope="module")
def wanted(model, prompts):
    return expected(model, prompts)


@pytest.fixture(scope="module", params=SCHEDULES.values(), ids=SCHEDULES.keys())
def llm(request, model):
    with llm_of(model, **request.param) as engine:
        yield engine


def test_the_reference_would_show_a_difference(model, wanted):
    """Every mechanism is there, and no probe says the same of all prompts."""
    assert set(mechanism_names()) < {probe.name for probe in model.probes}
    for probe in model.probes:
        values = np.array([row[probe.name][0] for row in wanted])
        judged = values[~np.isnan(values)]
        assert len(judged) > PROMPTS / 2
        assert judged.std() > 0.01
        assert ((judged > 0.01) & (judged < 0.99)).mean() > 0.5


def test_verdicts_equal_on_a_first_and_on_a_second_pass(llm, prompts, wanted):
    for _ in range(2):
        outputs = run(llm, prompts)
        require_equal([reported(output) for output in outputs], wanted)


def test_the_second_pass_of_a_cached_prompt_repeats_the_verdict_to_the_last_digit(llm, model):
    prompt = random_prompt(model.backbone, 300, seed=5)
    first, second = (reported(run(llm, [prompt])[0]) for _ in range(2))
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])


def test_several_texts_of_one_prompt_have_its_verdict(llm, model, prompts, wanted):
    longest = max(range(PROMPTS), key=lambda i: len(prompts[i]))
    output = run(llm, [prompts[longest]], n=3, temperature=1.0, max_tokens=4)[0]
    assert len(output.outputs) == 3
    verdicts = reported(output)
    early = {probe.name for probe in model.probes if not probe.reads.includes_response}
    require_equal(
        [{name: verdicts[name] for name in early}],
        [{name: wanted[longest][name] for name in early}],
    )


def test_probes_of_the_response_read_what_is_written(llm, model, prompts):
    chosen = [prompt for prompt in prompts if len(prompt) < 400][:12]
    outputs = run(llm, chosen, max_tokens=24, ignore_eos=True)
    read = [_with_response(p, o.outputs[0].token_ids) for p, o in zip(chosen, outputs, strict=True)]
    require_equal([reported(output) for output in outputs], expected(model, read))


def test_a_conversation_that_goes_on_reads_what_was_written_before(llm, model):
    """Its prompt holds tokens whose states were computed while they were decoded."""
    opening = random_prompt(model.backbone, 70, seed=11)
    written = run(llm, [opening], max_tokens=60, ignore_eos=True)[0].outputs[0].token_ids
    prefix = opening.token_ids + tuple(written)
    whole = random_prompt(model.backbone, len(prefix) + 20, seed=12, prefix=prefix)
    require_equal([reported(run(llm, [whole])[0])], expected(model, [whole]))


def test_a_state_kept_by_request_would_be_wrong(model, prompts):
    """What a prefix-cached request computes itself is not enough to judge it."""
    shared = random_prompt(model.backbone, 320, seed=21)
    tail = random_prompt(model.backbone, 352, seed=22, prefix=shared.token_ids)
    with llm_of(model) as engine:
        run(engine, [shared])
        output = run(engine, [tail])[0]
    assert output.num_cached_tokens >= 256
    require_equal([reported(output)], expected(model, [tail]))
    # The same pass, but reading only the tokens that were not cached.
    own = [Part.UNREAD] * output.num_cached_tokens + list(tail.parts[output.num_cached_tokens :])
    naive = expected(model, [EncodedPrompt(tail.token_ids, tuple(own))])
    with pytest.raises(AssertionError):
        require_equal([reported(output)], naive, rounding=1e-2)


def test_preempted_requests_are_read_again(model):
    """Eight requests, of which the cache holds about four at full length."""
    prompts = [random_prompt(model.backbone, 60 + i, seed=40 + i) for i in range(8)]
    with llm_of(model, num_gpu_blocks_override=24, max_model_len=512) as engine:
        outputs = run(engine, prompts, max_tokens=90, ignore_eos=True)
        metrics = {metric.name: metric for metric in engine.get_metrics()}
    assert metrics["vllm:num_preemptions"].value > 0
    read = [
        _with_response(p, o.outputs[0].token_ids) for p, o in zip(prompts, outputs, strict=True)
    ]
    require_equal([reported(output) for output in outputs], expected(model, read))


@pytest.mark.parametrize("parallel", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_two_workers_give_the_verdicts_of_one(
    model, prompts, wanted, parallel, tmp_path, monkeypatch
):
    def addresses(_worker):
        from sidelight.vllm.worker import INSTALLED

        own = INSTALLED.get()
        buffers = [own._stage.rows, own._pages._rows, *own._stage.product.buffers]
        return [buffer.data_ptr() for buffer in buffers]

    # For the function above.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # vLLM's CPU workers cannot run a pipeline without compilation.
    eager = parallel == "tensor_parallel_size"
    with llm_of(model, enforce_eager=eager, **{parallel: 2}) as engine:
        for _ in range(2):
            outputs = run(engine, prompts)
            require_equal([reported(output) for output in outputs], wanted)
        # Other probes take their place in all processes, and none if one of them cannot.
        others, some = reversed_probes(model, tmp_path), prompts[:8]
        for chosen in (others, with_fewer(model), model, others):
            before = engine.collective_rpc(addresses)
            engine.reset_prefix_cache()
            assert engine.collective_rpc("sidelight_load", args=(chosen.folders,)) == [None] * 2
            outputs = run(engine, some)
            require_equal([reported(output) for output in outputs], expected(chosen, some))
            assert engine.collective_rpc(addresses) == before
        wide = untrained_probe(model.backbone, "wide")
        too_wide = [str(save_probe(wide, tmp_path / "wide")), *others.folders]
        for message in engine.collective_rpc("sidelight_load", args=(too_wide,)):
            assert "SIDELIGHT_COLUMNS=" in message
        outputs = run(engine, some)
        require_equal([reported(output) for output in outputs], expected(others, some))


def reversed_probes(model, folder):
    """The probes in another order, so that each column of a layer is another one."""
    probes = [*reversed(model.probes)]
    folders = [str(save_probe(probe, folder / f"reversed-{probe.name}")) for probe in probes]
    return replace(model, probes=probes, folders=folders)


def with_fewer(model):
    return replace(model, probes=model.probes[1:], folders=model.folders[1:])


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_the_real_model_gives_the_same_verdicts(tmp_path_factory, eager):
    backbone = load_backbone("smollm2", dtype="float32")
    path = backbone.model.config._name_or_path
    real = with_probes(backbone, path, tmp_path_factory.mktemp("real"))
    prompts = mixed_prompts(backbone, 20, longest=500)
    wanted = expected(real, prompts)
    with llm_of(real, enforce_eager=eager, max_num_batched_tokens=200) as engine:
        require_equal([reported(output) for output in run(engine, prompts)], wanted)


def _with_response(prompt, token_ids):
    """The prompt and what was read of the response: all but the token sampled last."""
    read = tuple(token_ids[:-1])
    return EncodedPrompt(prompt.token_ids + read, prompt.parts + (Part.RESPONSE,) * len(read))


def test_the_mean_of_all_tokens_is_not_the_mean_of_the_read_ones(model, prompts, wanted):
    """The parts matter: reading everything gives other verdicts."""
    everything = [
        EncodedPrompt(p.token_ids, (Part.PROMPT,) * len(p)) for p in prompts if len(p) > 20
    ]
    some = [row for p, row in zip(prompts, wanted, strict=True) if len(p) > 20]
    all_read = score(model.backbone, Bank([model.probes[-1]]), everything)[0]
    plain = [model.probes[-1].verdict(row).probabilities["toxic"] for row in all_read]
    assert np.abs(np.array(plain) - [row["plain"][1] for row in some]).max() > 0.01


def test_a_share_of_a_request_that_has_ended_leaves_no_state():
    """Under pipeline parallel a step may still run when its request ends."""
    from sidelight.vllm.connector import ProbeConnector, done

    judge = RequestJudge(Panel([untrained_probe(tiny_backbone(), "late", reads=Reads("both"))]))
    tracking = Tracking(reads_responses=True)
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    for request_id in ("ended", "running"):
        tracking.enter(request_id, request_params(prompt), prompt.token_ids)
    steps = [Step(request_id, 3, True, [0]) for request_id in ("ended", "running")]
    columns = torch.zeros(3, 4, judge.panel.projection.weight.shape[-1])
    shares = [Share(reading, 0, columns) for reading in tracking.plan(steps)]
    tracking.leave("ended")
    connector = object.__new__(ProbeConnector)
    connector.tracking, connector._judge, connector._identity = tracking, judge, "old"
    connector.take(done(Outcome(shares=shares, probes=Loaded(identity="old"))))
    assert list(judge._states) == ["running"]
    assert "verdicts" in tracking.report("running")[KEY]


def test_the_scheduler_follows_its_stages_to_other_probes_or_gives_no_verdict(tmp_path):
    from sidelight.vllm.connector import ProbeConnector, done

    backbone = tiny_backbone()
    probes = [untrained_probe(backbone, name) for name in ("old", "new")]
    served = [
        Served((str(save_probe(probe, tmp_path / probe.name)),), backbone.fingerprint)
        for probe in probes
    ]
    panel, old = load_panel(served[0])
    _, new = load_panel(served[1])
    prompt = EncodedPrompt((5, 6, 7), (Part.PROMPT,) * 3)
    columns = torch.zeros(3, backbone.fingerprint.layers, panel.projection.weight.shape[-1])
    connector = object.__new__(ProbeConnector)
    connector._served, connector._identity = served[0], old.identity
    connector._judge = RequestJudge(panel)

    def judged_after(loaded):
        connector.tracking = Tracking(reads_responses=False)
        connector.tracking.enter("r", request_params(prompt), prompt.token_ids)
        shares = [Share(r, 0, columns) for r in connector.tracking.plan([Step("r", 3, True, [0])])]
        connector.take(done(Outcome(shares=shares, probes=loaded)))
        report = connector.tracking.report("r")[KEY]
        assert report["identity"] == loaded.identity
        return {name for name, said in report["verdicts"].items() if "error" not in said}

    assert judged_after(old) == {"old"}
    assert judged_after(new) == {"new"}
    # Stages that differ, a folder that is gone, and one that holds something else by now.
    assert judged_after(Loaded()) == set()
    assert judged_after(replace(old, folders=(str(tmp_path / "gone"),))) == set()
    assert judged_after(replace(old, folders=new.folders)) == set()
    assert judged_after(old) == {"old"}
