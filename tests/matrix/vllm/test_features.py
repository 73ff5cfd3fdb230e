"""Verdicts beside vLLM's other features, the real model, and the commands that start vLLM."""

import asyncio
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from engine_contract import TEXTS, replacement_probes, require_verdicts, user
from sidelight.engines.base import GenerationError
from sidelight.engines.transformers.backbone import load_backbone
from sidelight.probes.artifact import save_probe
from sidelight.probes.card import read_card
from sidelight_vllm import KEY
from sidelight_vllm.engine import saved
from sidelight_vllm.settings import revision_of
from worlds.models import untrained_probe
from worlds.servers import cli
from worlds.vllm import (
    TESTED,
    Model,
    architecture_model,
    expected,
    llm_of,
    mixed_prompts,
    require_equal,
    run_llm,
    sampling_of,
    verdicts,
    with_probes,
)

RANK, ALPHA = 8, 16
TINY = {
    "enforce_eager": True, "block_size": 32, "max_num_batched_tokens": 64, "max_model_len": 512,
    "num_gpu_blocks_override": 64,
}  # fmt: skip
OPTIONS = [w for k, v in TINY.items() for w in ("--engine-option", f"{k}={json.dumps(v)}")]


@pytest.fixture(scope="module")
def model(llama_model) -> Model:
    return llama_model


@pytest.fixture(scope="module")
def prompts(model):
    return mixed_prompts(model.backbone, 12, longest=300)


@pytest.fixture
def prompt_model(model) -> Model:
    """The model with the probes of the prompt alone."""
    chosen = [i for i, probe in enumerate(model.probes) if not probe.reads.includes_response]
    probes, folders = ([of[i] for i in chosen] for of in (model.probes, model.folders))
    return Model(model.backbone, model.path, probes, folders)


def adapter(model, folder):
    """A random LoRA adapter on disk, and the weights that it is merged to."""
    torch.manual_seed(3)
    merged = {name: weight.clone() for name, weight in model.backbone.model.state_dict().items()}
    added = {}
    for name in [name for name in merged if "q_proj" in name or "v_proj" in name]:
        down = 0.1 * torch.randn(RANK, merged[name].shape[1])
        up = 0.1 * torch.randn(merged[name].shape[0], RANK)
        place = f"base_model.model.{name.removesuffix('.weight')}"
        added |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
        merged[name] += ALPHA / RANK * up @ down
    save_file(added, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "v_proj"], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_lora_verdicts_match_merged_weights(model, prompts, tmp_path):
    from vllm.lora.request import LoRARequest

    base = model.backbone.model.state_dict()
    base = {name: weight.clone() for name, weight in base.items()}
    merged = adapter(model, tmp_path)
    plain = expected(model, prompts)
    model.backbone.model.load_state_dict(merged)
    adapted = expected(model, prompts)
    model.backbone.model.load_state_dict(base)
    with pytest.raises(AssertionError):
        require_equal(plain, adapted, rounding=1e-2)
    texts = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
    sampling = [sampling_of(prompt) for prompt in prompts]
    request = LoRARequest("formal", 1, str(tmp_path))
    with llm_of(model, enable_lora=True, max_lora_rank=RANK) as llm:
        # Twice each: the prefix cache must not mix them.
        for lora, wanted in ((None, plain), (request, adapted)) * 2:
            outputs = llm.generate(texts, sampling, use_tqdm=False, lora_request=lora)
            require_equal(verdicts(outputs), wanted)
            named = {output.kv_transfer_params[KEY].get("adapter") for output in outputs}
            assert named == {"formal" if lora else ""}


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_speculative_decoding_does_not_change_prompt_verdicts(prompt_model, prompts, method):
    if method == "ngram" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        pytest.skip("Triton's interpreter cannot run the kernel of ngram speculation")
    guesses = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        guesses |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        guesses["model"] = prompt_model.path
    with llm_of(prompt_model, speculative_config=guesses) as llm:
        for _ in range(2):
            outputs = run_llm(llm, prompts, max_tokens=30, ignore_eos=True)
            require_equal(verdicts(outputs), expected(prompt_model, prompts))
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_accepted_tokens"].value > 0


@pytest.mark.parametrize("name", ["DecodeBenchConnector", "ExampleConnector"])
def test_external_kv_connectors_do_not_change_verdicts(model, prompts, tmp_path, name):
    """The first claims to have all of a prompt but its last token, and loads noise."""
    theirs = {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with llm_of(model, kv_transfer_config=theirs) as llm:
        for _ in range(2):
            outputs = run_llm(llm, prompts)
            require_equal(verdicts(outputs), expected(model, prompts))
    if name == "ExampleConnector":
        assert any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_projection_store_fits_within_kv_cache_budget(name, tmp_path, monkeypatch):
    """As much memory as without probes, with room for fewer tokens."""

    def bytes_of(worker):
        from sidelight_vllm.worker import current_worker

        # Layers may share it.
        caches = [cache.untyped_storage() for cache in worker.model_runner.kv_caches]
        memory = {cache.data_ptr(): cache.nbytes() for cache in caches}
        return current_worker()._store.rows.nbytes, sum(memory.values())

    # The full layers are in three groups, and a block belongs to one of them.
    mostly_full = {"layer_types": [*["full_attention"] * 3, "sliding_attention"]}
    fields = mostly_full if "layer_types" in TESTED[name].fields else {}
    model = architecture_model(TESTED[name], tmp_path, **fields)
    # For the function above.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    sizes = []
    for folders in ([], model.folders):
        with llm_of(replace(model, folders=folders)) as llm:
            cache_config = llm.llm_engine.vllm_config.cache_config
            probe_bytes, cache = llm.collective_rpc(bytes_of)[0]
            sizes.append((cache_config.num_gpu_blocks, probe_bytes, cache))
    (most, _, full), (blocks, probe_bytes, cache) = sizes
    assert blocks < most
    assert 0.97 * full < cache + probe_bytes <= 1.01 * full


def revision(folders):
    return revision_of(read_card(folder).version for folder in folders)


@pytest.mark.parametrize("parallel", ["pipeline_parallel_size", "tensor_parallel_size"])
def test_two_workers_match_one_and_replace_probes_in_place(
    model, prompts, parallel, tmp_path, monkeypatch
):
    def addresses(_worker):
        from sidelight_vllm.worker import current_worker

        worker = current_worker()
        staging = worker._staging
        buffers = [
            staging.rows,
            worker._store.rows,
            staging.projection.weight,
            staging.projection.shift,
        ]
        return [buffer.data_ptr() for buffer in buffers]

    wanted = expected(model, prompts)
    # For the function above.
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    # vLLM's CPU workers cannot run a pipeline without compilation.
    eager = parallel == "tensor_parallel_size"
    with llm_of(model, enforce_eager=eager, **{parallel: 2}) as engine:
        for _ in range(2):
            outputs = run_llm(engine, prompts)
            require_equal(verdicts(outputs), wanted)
        # Other probes take their place in all processes, and none if one of them cannot.
        probes = [*reversed(model.probes)]
        folders = [str(save_probe(probe, tmp_path / probe.name)) for probe in probes]
        replacement, some = replace(model, probes=probes, folders=folders), prompts[:8]
        fewer = replace(model, probes=model.probes[1:], folders=model.folders[1:])
        for chosen in (replacement, fewer, model, replacement):
            before = engine.collective_rpc(addresses)
            engine.reset_prefix_cache()
            engine.collective_rpc("sidelight_check", args=(chosen.folders,))
            engine.collective_rpc("sidelight_load", args=(revision(chosen.folders),))
            outputs = run_llm(engine, some)
            require_equal(verdicts(outputs), expected(chosen, some))
            assert engine.collective_rpc(addresses) == before
        wide = untrained_probe(model.backbone, "wide")
        too_wide = [str(save_probe(wide, tmp_path / "wide")), *replacement.folders]
        with pytest.raises(Exception, match="SIDELIGHT_PROJECTIONS="):
            engine.collective_rpc("sidelight_check", args=(too_wide,))
        engine.collective_rpc("sidelight_check", args=(replacement.folders,))
        outputs = run_llm(engine, some)
        require_equal(verdicts(outputs), expected(replacement, some))


def test_every_data_parallel_rank_classifies_and_replaces_probes(model):
    """Two engines under one client: each judges its own requests."""
    from sidelight_vllm.engine import load_vllm_engine

    replacements = replacement_probes(model)

    async def classified(engine, **options):
        asked = (engine.classify([user(text)]) for text in TEXTS)
        return await asyncio.gather(*asked, **options)

    async def ask():
        engine = await asyncio.to_thread(
            load_vllm_engine,
            model.path,
            model.probes,
            dtype="float32",
            options={**TINY, "max_num_seqs": 4, "data_parallel_size": 2},
        )
        await engine.start()
        try:
            answers = [await classified(engine) for _ in range(2)]
            await engine.replace_probes(replacements)
            answers.append(await classified(engine))
            # The first rank alone, of which the others were not told.
            with saved(model.probes) as (folders, served):
                core = engine._llm.engine_core
                for order in (("check", folders), ("load", served.revision)):
                    call = ("collective_rpc", f"sidelight_{order[0]}", None, (order[1],))
                    await core._call_utility_async(*call, engine=core.core_engines[0])
                failed = await classified(engine, return_exceptions=True)
            return answers, failed
        finally:
            await engine.close()

    answers, failed = asyncio.run(ask())
    prompts = [model.backbone.encoder.encode(user(text)) for text in TEXTS]
    for answer, probes in zip(answers, (model.probes, model.probes, replacements), strict=True):
        prompt_names = [probe.name for probe in probes if not probe.reads.includes_response]
        wanted = expected(replace(model, probes=probes), prompts)
        for (event,), row in zip(answer, wanted, strict=True):
            require_verdicts(event.verdicts, row, prompt_names)
    # Each rank has read some.
    errors = [one for one in failed if isinstance(one, GenerationError)]
    assert 0 < len(errors) < len(failed)


def test_verdicts_match_without_prefix_cache_batching_or_async_scheduling(model, prompts):
    plain_options = {"max_num_seqs": 1, "enable_prefix_caching": False, "async_scheduling": False}
    with llm_of(model, **plain_options) as llm:
        require_equal(verdicts(run_llm(llm, prompts)), expected(model, prompts))


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_embedded_model_verdicts_match_transformers(tmp_path, eager):
    backbone = load_backbone("smollm2", dtype="float32")
    real = with_probes(backbone, backbone.model.config._name_or_path, tmp_path)
    prompts = mixed_prompts(backbone, 20, longest=500)
    wanted = expected(real, prompts)
    with llm_of(real, enforce_eager=eager, max_num_batched_tokens=200) as engine:
        require_equal(verdicts(run_llm(engine, prompts)), wanted)


def test_parity_reports_only_rounding_differences(prompt_model, tmp_path, capsys):
    data, out = tmp_path / "texts.jsonl", tmp_path / "parity.json"
    rows = [{"text": f"text number {i} " * (1 + i % 5)} for i in range(12)]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["parity", *prompt_model.folders, "--data", str(data), "--model", prompt_model.path]
    assert cli(*words, "--dtype", "float32", "--out", str(out), *OPTIONS) == 0
    found = json.loads(out.read_text())
    assert "transformers - vllm" in capsys.readouterr().out
    batches = [f"{name}, batch {n} - 1" for name in ("transformers", "vllm") for n in (4, 16)]
    between = {"transformers - vllm", *batches}
    assert {row["between"] for row in found} == between
    assert [row["probe"] for row in found] == [p.name for p in prompt_model.probes] * len(between)
    assert all(row["texts"] == 12 and row["flips"] == 0 for row in found)
    assert 0 < max(row["largest"] for row in found) < 1e-4


def test_gpu_check_compares_verdicts_and_times_serving(tmp_path):
    only = ("vllm reference", "vllm parity: runner 1, eager", "vllm serving: 0", "vllm serving: 1 ")
    chosen = [word for name in only for word in ("--only", name)]
    assert cli("bench", "gpu", "--out", str(tmp_path), *chosen) == 0
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert len(sections) == len(only)
    found = sections["vllm parity: runner 1, eager"]["metrics"]
    assert 0 < found["first_pass"] < 1e-4
    assert 0 < found["second_pass"] < 1e-4
    assert "readout" in found["probes"]
    for name in ("vllm serving: 0 readouts", "vllm serving: 1 readouts"):
        assert all(ms > 0 for values in sections[name]["metrics"]["ms"].values() for ms in values)
    assert "% added" in (tmp_path / "gpu.md").read_text()
