"""The filter of examples/open-webui, run by Open WebUI's own ``utils/filter.py``.

``SIDELIGHT_OPEN_WEBUI`` names the folder of Open WebUI's wheel. Only that file is run, without the
package's dependencies: a stand-in for its database holds the filter and its valves.
"""

import asyncio
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import wordings
from test_examples import EXAMPLES
from worlds.applications import ATTACK

SOURCE = EXAMPLES / "open-webui/sidelight_filter.py"
HARMLESS = "Where is my refund?"
ID = "sidelight"


@dataclass
class Chat:
    """What becomes of a body, and the events that its reader is sent."""

    messages: list[dict[str, Any]]
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        assert all(event["type"] == "status" for event in self.events)
        return [event["data"]["description"] for event in self.events]


Run = Callable[..., Chat]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs the filter as Open WebUI does, with the valves that an administrator has set."""
    folder = Path(os.environ.get("SIDELIGHT_OPEN_WEBUI") or "nowhere")
    wheels = sorted(folder.glob("open_webui-*.whl"))
    if not wheels:
        pytest.skip("SIDELIGHT_OPEN_WEBUI names no folder with a wheel of open-webui")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        code = wheel.read("open_webui/utils/filter.py").decode()
    function = ModuleType("function_sidelight")
    exec(compile(SOURCE.read_text(), SOURCE, "exec"), vars(function))
    instance, valves = vars(function)["Filter"](), {}

    class Functions:
        @staticmethod
        async def get_function_valves_by_ids(ids: list[str]) -> dict[str, dict[str, Any]]:
            return {ID: valves}

    async def load(*_: Any, **__: Any) -> tuple[Any, str, dict[str, Any]]:
        return instance, "filter", {}

    stand_ins = {
        "open_webui": {},
        "open_webui.env": {"ENABLE_FUNCTIONS": True},
        "open_webui.models": {},
        "open_webui.models.functions": {"Functions": Functions},
        "open_webui.utils": {},
        "open_webui.utils.plugin": {"get_function_module_from_cache": load},
    }
    for name, values in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    theirs = ModuleType("open_webui.utils.filter")
    exec(compile(code, "filter.py", "exec"), vars(theirs))

    def go(kind: str, messages: list[dict[str, Any]], **settings: Any) -> Chat:
        valves.clear()
        valves.update(settings)
        chat = Chat([])

        async def emit(event: dict[str, Any]) -> None:
            chat.events.append(event)

        extra = {"__event_emitter__": emit, "__user__": {"id": "1"}, "__metadata__": {}}
        process = vars(theirs)["process_filter_functions"]
        body = {"model": "m", "messages": messages}
        functions = [SimpleNamespace(id=ID)]
        body, _ = asyncio.run(process(None, None, functions, kind, body, extra))
        chat.messages = body["messages"]
        return chat

    return go


def asked(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def answered(content: str) -> list[dict[str, Any]]:
    return [*asked(HARMLESS), {"role": "assistant", "content": content}]


def test_harmless_message_passes_unchanged_and_attack_is_blocked(run, guard):
    assert run("inlet", asked(HARMLESS), url=guard) == Chat(asked(HARMLESS))
    for content in (ATTACK, [{"type": "text", "text": ATTACK}, {"type": "image_url"}]):
        with pytest.raises(Exception, match=rf"^{wordings.MESSAGE_BLOCKED}: injection\.$"):
            run("inlet", asked(content), url=guard)


def test_filter_checks_only_messages_after_the_last_response(run, guard):
    later = [*asked(ATTACK), {"role": "assistant", "content": "No."}, *asked(HARMLESS)]
    assert run("inlet", later, url=guard).messages == later
    with pytest.raises(Exception, match=wordings.MESSAGE_BLOCKED):
        run("inlet", [*answered("Yes."), *asked(HARMLESS), *asked(ATTACK)], url=guard)


def test_annotate_mode_flags_attacks_without_blocking(run, guard):
    chat = run("inlet", asked(ATTACK), url=guard, mode="annotate")
    assert (chat.messages, chat.notes) == (asked(ATTACK), ["Your message was flagged: injection."])
    chat = run("outlet", answered(ATTACK), url=guard, mode="annotate", check_answers=True)
    assert (chat.messages[-1]["content"], chat.notes) == (
        ATTACK, ["The answer was flagged: injection."]
    )  # fmt: skip


def test_flagged_responses_are_replaced_only_if_responses_are_checked(run, guard):
    assert run("outlet", answered(ATTACK), url=guard).messages == answered(ATTACK)
    chat = run("outlet", answered(ATTACK), url=guard, check_answers=True)
    assert chat.messages[-1]["content"] == "The answer was withheld: injection."
    chat = run("outlet", answered("It is on its way."), url=guard, check_answers=True)
    assert chat == Chat(answered("It is on its way."))


def test_unavailable_server_blocks_unchecked_texts(run, down):
    with pytest.raises(Exception, match=wordings.CHECK_UNAVAILABLE):
        run("inlet", asked(HARMLESS), url=down)
    chat = run("outlet", answered("Fine."), url=down, check_answers=True)
    assert "unavailable" in chat.messages[-1]["content"]


def test_on_error_pass_lets_unchecked_texts_through(run, down):
    chat = run("inlet", asked(HARMLESS), url=down, on_error="pass")
    assert (chat.messages, chat.notes) == (asked(HARMLESS), ["Your message was not checked."])
    chat = run("outlet", answered("Fine."), url=down, on_error="pass", check_answers=True)
    assert (chat.messages, chat.notes) == (answered("Fine."), ["The answer was not checked."])


def test_unserved_probe_counts_as_unchecked(run, guard):
    with pytest.raises(Exception, match=wordings.CHECK_UNAVAILABLE):
        run("inlet", asked(HARMLESS), url=guard, probes="injection, other")
    assert run("inlet", asked(HARMLESS), url=guard, probes=" injection ").messages
