"""What a caller can ask of an evaluation, for one call, a batch and a stream alike."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

Gradients = bool | str | Sequence[str]
"""True for all, or the name or names of the inputs whose gradient is wanted."""


class LossOptions(TypedDict, total=False):
    """The keyword arguments of a method that evaluates; `Client.compute_loss` explains them."""

    gradients: Gradients
    gradient_dtype: Any
    wire_dtype: Any
    component_gradients: bool
    strict: bool


class EvaluationOptions(NamedTuple):
    """The same with its defaults, as it goes from there on."""

    gradients: Gradients = False
    gradient_dtype: Any = None
    wire_dtype: Any = None
    component_gradients: bool = False
    strict: bool = False
