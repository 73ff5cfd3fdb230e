"""Verdicts beside vLLM's other features: adapters, speculative decoding, and a full memory."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from architectures import TESTED, architecture_model
from safetensors.torch import save_file

from sidelight.bank import Panel
from sidelight.errors import SidelightError
from sidelight.vllm.columns import Tracking
from sidelight.vllm.settings import KEY
from sidelight.vllm.worker import RequestJudge
from stock_requests import parts_of, post
from stock_server import stock_server
from vllm_served import (
    Model,
    expected,
    llm_of,
    mixed_prompts,
    reported,
    require_equal,
    run,
    sampling_of,
    tiny_model,
)

RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts(model):
    return mixed_prompts(model.backbone, 12, longest=300)


@pytest.fixture
def early(model) -> Model:
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


def test_an_adapter_is_judged_as_its_merged_weights_are(model, prompts, tmp_path):
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
            require_equal([reported(output) for output in outputs], wanted)
            named = {output.kv_transfer_params[KEY].get("adapter") for output in outputs}
            assert named == {lora and "formal"}


def test_answers_of_a_server_name_the_adapter_that_wrote_them(early, tmp_path):
    adapter(early, tmp_path)
    words = ("--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"formal={tmp_path}")
    asked = {"max_tokens": 3, "messages": [{"role": "user", "content": "hello"}]}
    with stock_server(early.path, early.folders, tmp_path, *words) as server:
        for model, wanted in (("tiny", None), ("formal", "formal")):
            for path in ("/v1/chat/completions", "/v1/messages"):
                answer = post(server.address, path, {"model": model, **asked}).json()
                assert answer["sidelight"].get("adapter") == wanted, path
            streamed = {"model": model, "stream": True, **asked}
            parts = parts_of(post(server.address, "/v1/chat/completions", streamed))
            said = [part["sidelight"] for part in parts if "sidelight" in part]
            assert {each.get("adapter") for each in said} == {wanted}


@pytest.mark.parametrize("method", ["ngram", "draft_model"])
def test_guessed_tokens_change_no_verdict_on_the_prompt(early, prompts, method):
    if method == "ngram" and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        pytest.skip("Triton's interpreter cannot run the kernel of ngram speculation")
    guesses = {"method": method, "num_speculative_tokens": 3}
    if method == "ngram":
        guesses |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    else:
        guesses["model"] = early.path
    with llm_of(early, speculative_config=guesses) as llm:
        for _ in range(2):
            outputs = run(llm, prompts, max_tokens=30, ignore_eos=True)
            require_equal([reported(output) for output in outputs], expected(early, prompts))
        metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:spec_decode_num_accepted_tokens"].value > 0


@pytest.mark.parametrize("name", ["DecodeBenchConnector", "ExampleConnector"])
def test_keys_and_values_from_elsewhere_are_not_taken(model, prompts, tmp_path, name):
    """The first claims to have all of a prompt but its last token, and loads noise."""
    theirs = {
        "kv_connector": name,
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    with llm_of(model, kv_transfer_config=theirs) as llm:
        for _ in range(2):
            outputs = run(llm, prompts)
            require_equal([reported(output) for output in outputs], expected(model, prompts))
    if name == "ExampleConnector":
        assert any(tmp_path.iterdir())


def test_whoever_ends_a_request_its_block_table_goes():
    """Beside a connector without groups, vLLM ends requests by another method."""
    from sidelight.vllm.connector import BlockTables, ProbeConnector

    new = SimpleNamespace(req_id="r", block_ids=([0, 1],), num_computed_tokens=0)
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[])
    output = SimpleNamespace(
        num_scheduled_tokens={"r": 5}, scheduled_new_reqs=[new], scheduled_cached_reqs=cached
    )
    for end, blocks in (("request_finished", [0, 1]), ("request_finished_all_groups", ([0, 1],))):
        tables, tracking = BlockTables(0), Tracking(reads_responses=False)
        (step,) = tables.steps(output)
        assert (step.blocks, step.computed) == ([0, 1], 5)
        connector = object.__new__(ProbeConnector)
        connector._tables, connector.tracking = tables, tracking
        connector._judge = RequestJudge(Panel([]))
        getattr(connector, end)(SimpleNamespace(request_id="r"), blocks)
        assert not tables._blocks


def test_a_pipeline_stage_that_lacks_a_kind_of_attention_is_refused():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from sidelight.vllm.connector import full_group

    sizes = {"block_size": 16, "num_kv_heads": 1, "head_size": 32, "dtype": torch.float32}
    full, window = FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=8)

    def config(*groups):
        made = [SimpleNamespace(kv_cache_spec=spec, layer_names=own) for spec, own in groups]
        return SimpleNamespace(kv_cache_groups=made)

    assert full_group(config((window, ["a"]), (full, ["b"]), (full, ["c"]))) == 1
    with pytest.raises(SidelightError, match="pipeline stage"):
        full_group(config((window, ["a"]), (full, []), (full, ["c"])))
    with pytest.raises(SidelightError, match="all layers forget some"):
        full_group(config((window, ["a"])))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_columns_are_taken_out_of_the_memory_for_keys_and_values(name, tmp_path):
    """As much memory as without probes, with room for fewer tokens."""
    config = TESTED[name].config()
    if hasattr(config, "sliding_window"):
        # The full layers are in three groups, and a block belongs to one of them.
        config.layer_types = [*["full_attention"] * 3, "sliding_attention"]
    model = architecture_model(replace(TESTED[name], config=lambda: config), tmp_path)
    sizes = []
    for folders in ([], model.folders):
        with llm_of(replace(model, folders=folders)) as llm:
            cache_config = llm.llm_engine.vllm_config.cache_config
            columns, cache = llm.collective_rpc("sidelight_bytes")[0]
            sizes.append((cache_config.num_gpu_blocks, columns, cache))
    (most, _, whole), (blocks, columns, cache) = sizes
    assert blocks < most
    assert 0.97 * whole < cache + columns <= 1.01 * whole
