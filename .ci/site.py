"""What the pages in ``site/`` have beyond those of ``docs/``: reference made from the code.

Hooks of mkdocs. ``openapi.md`` is made from the server's OpenAPI document and ``python.md`` from
the public names of ``sidelight``. Files of the repository that pages link to are put beside them.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import sidelight
from sidelight.server.app import create_app

ROOT = Path(__file__).parent.parent
_OUTSIDE = re.compile(r"\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
# The base classes of what others add; their page is the how-to of a mechanism.
_BASES = ("sidelight.probes.mechanisms.base.Mechanism", "sidelight.engines.base.Engine")
Schema = dict[str, Any]


def on_config(config: MkDocsConfig) -> None:
    """Takes the navigation from the sections of ``docs/README.md``."""
    sections: dict[str, list[str]] = {}
    for row in (Path(config.docs_dir) / "README.md").read_text().splitlines():
        if heading := re.match(r"## (.+)", row):
            sections[heading[1]] = []
        elif page := re.match(r"\| \[.+\]\((.+)\) \|", row):
            sections[list(sections)[-1]].append(page[1])
    sections["Reference"] += ["openapi.md", "python.md"]
    config.nav = [{"Overview": "README.md"}, *({name: sections[name]} for name in sections)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made here, and the files of the repository that pages link to."""
    document = create_app(Mock(probes=[])).openapi()
    sources = {
        "openapi.json": json.dumps(document, indent=1),
        "openapi.md": "\n".join(_openapi_page(document)),
        "python.md": "\n".join(_python_page()),
    }
    for page in sorted(Path(config.docs_dir).glob("*.md")):
        for path in _OUTSIDE.findall(page.read_text()):
            if (ROOT / path).is_file():
                sources[_source(path)] = (ROOT / path).read_text()
    for name, text in sources.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Points links to files of the repository to their copies; folders have none."""
    return re.sub(
        r"\[([^]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)",
        lambda link: f"[{link[1]}]({_source(link[2])})" if (ROOT / link[2]).is_file() else link[1],
        markdown,
    )


def _source(path: str) -> str:
    # A Markdown file would become a page, whose links are those of its own folder.
    return f"source/{path}.txt"


def _python_page() -> Iterator[str]:
    yield "# Python\n"
    yield "The names that `import sidelight` gives, and the base classes of what you add.\n"
    for name in (*(f"{sidelight._HOMES[name]}.{name}" for name in sidelight.__all__), *_BASES):
        yield f"::: {name}\n"


def _openapi_page(document: Schema) -> Iterator[str]:
    yield "# OpenAPI\n"
    yield "What each route takes and gives, as the server's [openapi.json](openapi.json) says it."
    yield "[routes.md](routes.md) says what it means.\n"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"## {method.upper()} {path}\n\n{operation.get('description', '')}\n"
            body = operation.get("requestBody", {}).get("content", {})
            if "application/json" in body:
                yield f"Takes {_kind(body['application/json']['schema'])}.\n"
            for status, answer in operation["responses"].items():
                kinds = ", ".join(
                    _kind(content["schema"]) if kind == "application/json" else f"`{kind}`"
                    for kind, content in answer.get("content", {}).items()
                )
                yield f"- {status}: {kinds or 'nothing'}"
            yield ""
    yield "## Schemas\n"
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield f"### {_title(name)}\n\n{schema.get('description', '')}\n"
        yield "| field | type | | |\n|---|---|---|---|"
        for field, properties_of_field in schema.get("properties", {}).items():
            needed = (
                "required" if field in schema.get("required", ()) else _default(properties_of_field)
            )
            text = properties_of_field.get("description", "").replace("\n", " ").replace("|", "\\|")
            yield f"| `{field}` | {_kind(properties_of_field)} | {needed} | {text} |"
        yield ""


def _default(schema: Schema) -> str:
    return f"default `{json.dumps(schema['default'])}`" if "default" in schema else ""


def _title(name: str) -> str:
    # Two models of one name are told apart by their modules.
    return " ".join(name.split("__")[-2:])


def _kind(schema: Schema) -> str:
    """The type of a value, in Markdown."""
    if "$ref" in schema:
        title = _title(schema["$ref"].rsplit("/", 1)[1])
        return f"[{title}](#{title.lower().replace(' ', '-')})"
    for several in ("anyOf", "oneOf", "allOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(map(_kind, schema[several])))
    if "const" in schema or "enum" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    if schema.get("additionalProperties"):
        values = schema["additionalProperties"]
        return f"object of {_kind(values)}" if isinstance(values, dict) else "object"
    bounds = _bounds(schema)
    return f"{schema.get('type', 'any')}{f' ({bounds})' if bounds else ''}"


def _bounds(schema: Schema) -> str:
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    return ", ".join(f"{word} {schema[key]:g}" for key, word in words.items() if key in schema)
