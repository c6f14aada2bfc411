"""The gradients in a result."""

from collections.abc import Iterator, Mapping
from typing import Any


class GradientArrays(Mapping[str, Any]):
    """Gradients by input name, until they are released."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays: Mapping[str, Any] | None = arrays

    def __getitem__(self, name: str) -> Any:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return "GradientArrays(released)" if self._arrays is None else f"GradientArrays({self._arrays!r})"

    def release(self) -> None:
        """Lets go of the arrays; to ask for one from now on is an error."""
        self._arrays = None

    @property
    def _held(self) -> Mapping[str, Any]:
        if self._arrays is None:
            raise RuntimeError("the result was released: its gradients are gone")
        return self._arrays
