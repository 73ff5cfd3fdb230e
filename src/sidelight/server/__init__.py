"""An OpenAI-compatible server whose answers carry the probes' verdicts."""

from sidelight.server.app import create_app
from sidelight.server.running import serve
from sidelight.server.service import Service

__all__ = ["Service", "create_app", "serve"]
