"""OpenAI's API over HTTP, in front of an engine. Its packages are the extra ``serve``."""

from collections.abc import Generator
from contextlib import contextmanager

from sidelight.errors import SidelightError


@contextmanager
def needs_extra() -> Generator[None]:
    """Says what to install where an import in the block finds a package missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise SidelightError(
            f"Serving needs the package {package}. Run `pip install 'sidelight[serve]'`."
        ) from error
