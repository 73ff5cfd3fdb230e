"""OpenAI's API over HTTP, in front of an engine. Its packages are the extra ``serve``."""
