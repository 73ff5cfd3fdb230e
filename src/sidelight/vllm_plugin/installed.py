"""What a worker process has one of, since it runs one model."""

from typing import Generic, TypeVar

from sidelight.errors import SidelightError

T = TypeVar("T")


class Installed(Generic[T]):
    """Holds the one object of its kind in this process.

    Args:
        loss: What happens without it, for the error.
    """

    def __init__(self, *, loss: str):
        self._loss = loss
        self._held: T | None = None

    def put(self, held: T | None) -> None:
        """Makes it the one of this process."""
        self._held = held

    def get(self) -> T:
        """The one of this process.

        Raises:
            SidelightError: The model was loaded in a way that the plugin does not see.
        """
        if self._held is None:
            raise SidelightError(
                f"This model loader does not tap the model, so {self._loss}. Use vLLM's default "
                "--load-format."
            )
        return self._held
