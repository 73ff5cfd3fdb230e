"""An OpenAI-compatible server whose answers carry the probes' verdicts."""
