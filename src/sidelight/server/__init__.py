"""An OpenAI-compatible server whose answers carry the probes' verdicts."""

from sidelight.server.app import create_app
from sidelight.server.running import serve

__all__ = ["create_app", "serve"]
