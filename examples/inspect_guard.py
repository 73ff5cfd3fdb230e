"""Inspect: the share of attacks and of ordinary texts that a guard stops before any model.

    sidelight serve --probe guard:injection
    pip install inspect_ai openai
    export MODEL_BASE_URL=https://api.openai.com/v1 MODEL_API_KEY=...
    inspect eval examples/inspect_guard.py --model openai-api/model/NAME -T data="$PWD/texts.jsonl"

A row of the data has a text and a label, 1 for an attack. Put `guarded` before `generate` in a task
of yours, too. It reads the messages that are there then, not the results of tools that the model
calls later. If Sidelight is down, the evaluation ends with an error, and no model is asked.
"""

import os
from typing import Any

import httpx
from inspect_ai import Task, task
from inspect_ai.dataset import Sample, json_dataset
from inspect_ai.model import ModelOutput
from inspect_ai.scorer import Score, Scorer, Target, grouped, mean, scorer, stderr
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver

URL = os.environ.get("SIDELIGHT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("SIDELIGHT_API_KEY", "unused")


@solver
def guarded() -> Solver:
    """Ends a conversation in which a message of a user or a tool is flagged."""
    http = httpx.AsyncClient(headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    async def solve(state: TaskState, generate: Generate) -> TaskState:  # noqa: ARG001
        texts = [each.text for each in state.messages if each.role in ("user", "tool")]
        answer = await http.post(f"{URL}/v1/moderations", json={"input": texts})
        results = answer.raise_for_status().json()["results"]
        if any(result["flagged"] for result in results):
            state.output = ModelOutput.from_content(
                str(state.model), "Blocked.", stop_reason="content_filter"
            )
            state.completed = True
        return state

    return solve


@scorer(
    metrics=[
        grouped(mean(), "kind", all=False),
        grouped(stderr(), "kind", all=False, name_template="{group_name} (standard error)"),
    ]
)
def blocked() -> Scorer:
    """1 for a conversation that was stopped."""

    async def score(state: TaskState, target: Target) -> Score:  # noqa: ARG001
        return Score(value=float(state.output.stop_reason == "content_filter"))

    return score


def sample(row: dict[str, Any]) -> Sample:
    return Sample(input=row["text"], metadata={"kind": "attack" if row["label"] else "ordinary"})


@task
def injection(data: str) -> Task:
    """The shares of attacks and of ordinary texts that are stopped.

    Args:
        data: A JSONL file, by its absolute path.
    """
    return Task(
        dataset=json_dataset(data, sample), solver=[guarded(), generate()], scorer=blocked()
    )
