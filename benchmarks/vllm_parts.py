"""CPU time that probes add to a pass inside vLLM, part by part, measured without vLLM.

It uses the embedded model's sizes with random states and probes: one pass in which eight requests
of 256 tokens end, and one that decodes a token of each. It counts CPU time of the process, since
wall time depends on what else the machine runs. Run it with: python benchmarks/vllm_parts.py
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

import torch

from sidelight.artifact import save_probe
from sidelight.backbone import load_backbone
from sidelight.prompts import Part
from sidelight.vllm.columns import Reading
from sidelight.vllm.settings import Served
from sidelight.vllm.worker import Worker
from sidelight_lab.bench.serving import probe_sets

REQUESTS, TOKENS, BLOCK, ROUNDS = 8, 256, 32, 7


def best_ms(work: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    """The shortest of some rounds, after one that warms up; ``before`` does not count."""
    times: list[float] = []
    for _ in range(ROUNDS + 1):
        before()
        start = process_time()
        work()
        times.append(process_time() - start)
    return 1000 * min(times[1:])


def parts_of(served: Served, *, reads_responses: bool) -> dict[str, float]:
    """Milliseconds by part."""
    layers, width = served.fingerprint.layers, served.fingerprint.width
    tokens = REQUESTS * TOKENS
    worker = Worker(served, layers=range(layers), tokens=tokens, device=torch.device("cpu"))
    worker.allocate(blocks=tokens // BLOCK, block_size=BLOCK)
    order = torch.zeros(())
    per_request = TOKENS // BLOCK

    def readings(start: int, part: Part, *, ends_prompt: bool) -> list[Reading]:
        return [
            Reading(
                f"{i}",
                tuple(range(per_request * i, per_request * (i + 1))),
                start,
                bytes([part] * (TOKENS - start)),
                ends_prompt=ends_prompt,
                is_plain=False,
            )
            for i in range(REQUESTS)
        ]

    def projected(tokens: int) -> Callable[[], None]:
        hidden, residual = torch.randn(2, tokens, width).bfloat16()

        def work() -> None:
            for layer in range(layers):
                torch.ops.sidelight.project(hidden, residual, layer, order)

        return work

    def keep(tokens: int) -> Callable[[], None]:
        return lambda: worker.keep(torch.arange(tokens))

    def judge(readings: list[Reading]) -> Callable[[], object]:
        return lambda: worker.judge(readings).result()

    prompts = {"project prompts": best_ms(projected(tokens))}
    projected(tokens)()
    worker.keep(torch.arange(tokens))
    read = readings(TOKENS - 1, Part.RESPONSE, ends_prompt=False) if reads_responses else []
    return prompts | {
        "judge prompts": best_ms(judge(readings(0, Part.PROMPT, ends_prompt=True)), keep(0)),
        "keep prompts": best_ms(keep(tokens)),
        "project a token each": best_ms(projected(REQUESTS)),
        "keep a token each": best_ms(keep(REQUESTS)),
        "judge a token each": best_ms(judge(read), keep(0)),
    }


def main() -> None:
    """Prints a row for each set of probes."""
    torch.set_num_threads(1)
    backbone = load_backbone("smollm2", device="cpu")
    with torch.inference_mode(), TemporaryDirectory() as root:
        for name, probes in probe_sets(backbone).items():
            folders = [str(save_probe(probe, Path(root) / name / probe.name)) for probe in probes]
            if probes:
                late = any(probe.reads.includes_response for probe in probes)
                served = Served(tuple(folders), backbone.fingerprint)
                parts = parts_of(served, reads_responses=late)
                row = ", ".join(f"{part} {ms:.2f} ms" for part, ms in parts.items())
                print(f"{name}: {row}")


if __name__ == "__main__":
    main()
