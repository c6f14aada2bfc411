"""What all loss modules share: checks first, then value and gradient together."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses.evaluation import Evaluation, EvaluationOptions, LossOutcome, Place
from lossd_server.losses.reduction import Reduction

Arguments = Mapping[str, Any]
"""Tensors, lists of tensors (one a level) or ground truth by the names of `forward`.

Left out or None means not given.
"""

Spread = Callable[[Tensor], Tensor]
"""Lays out the upstream gradient of each row so that it multiplies the gradient of the input."""


class LossModule(nn.Module):
    """A loss with a closed-form gradient.

    Attributes:
        required: The arguments that must be given.
        differentiable: The arguments that gradients can be asked for.
        reduction: How rows become the loss; None where the loss has a rule of its own.
    """

    required: ClassVar[tuple[str, ...]]
    differentiable: ClassVar[tuple[str, ...]]
    reduction: Reduction | None = None

    @property
    def has_kernels(self) -> bool:
        """Whether the compiled kernels do all of it on the host: one number a row is torch's to hand out."""
        return self.reduction is not Reduction.NONE

    @abstractmethod
    def check(self, arguments: Arguments) -> None:
        """Raises `InvalidInputError` unless types and shapes go together.

        Args:
            arguments: Whatever has a `dtype` and a `shape`: what they hold is not looked at.
        """

    def read(self, arguments: Arguments) -> Arguments:
        """Returns checked arguments, numpy or torch, ready to be evaluated.

        Whatever the evaluation wants to know of values is read here, on the host, so that it has
        nothing to wait for on a device.

        Raises:
            InvalidInputError: A value is refused.
        """
        return arguments

    def prepare(self, arguments: Arguments) -> Arguments:
        """Checks arguments, numpy or torch, and returns them ready to be evaluated."""
        self.check(arguments)
        return self.read(arguments)

    def check_normalizer(self, normalizer: float) -> None:
        """Raises `InvalidInputError` for a normalizer that is not above 0, or would not be used."""
        if self.reduction not in {None, Reduction.MEAN}:
            raise InvalidInputError(
                Reason.UNEXPECTED_FIELD,
                f"is {normalizer}, but the reduction {self.reduction} divides by nothing",
                field="normalizer",
                value=normalizer,
            )
        checks.require_number("normalizer", normalizer, above=0)

    @abstractmethod
    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared arguments: tensors on one device, ground truth on any."""

    def evaluate_arrays(
        self,
        arguments: Arguments,  # noqa: ARG002  # of those that do more
        options: EvaluationOptions,  # noqa: ARG002
        place: Place,  # noqa: ARG002
    ) -> LossOutcome | None:
        """Evaluates prepared numpy arrays by compiled code alone: to the bit what `evaluate` makes of them.

        To make tensors of a small input, and arrays of what comes of it, takes longer than its evaluation.

        Args:
            arguments: Prepared arguments.
            options: What is wanted; `outputs` and `allocate` are not looked at.
            place: Where gradients are written.

        Returns:
            None where that is not possible, as for float64, one loss a row and other layouts, or where it is
            not all that there is to say: an input that is not finite.
        """
        return None

    def evaluate_for_autograd(self, arguments: Arguments) -> Evaluation:
        """Checks and evaluates, with the gradients that autograd will want.

        Gradients of half-precision inputs are kept in float32 until the upstream gradient, which
        may be a loss scale, has been multiplied in.
        """
        wanted = self._inputs_that_require_gradient(arguments)
        arguments = self.prepare(arguments)
        wide = widest_dtype(tensor for tensors in wanted.values() for tensor in tensors)
        options = EvaluationOptions(
            gradients=tuple(name for name in self.differentiable if name in wanted),
            gradient_dtype=wide,
            component_gradients=True,
        )
        with torch.no_grad():
            return self.evaluate(arguments, options)

    def _inputs_that_require_gradient(self, arguments: Arguments) -> dict[str, list[Tensor]]:
        """Returns the tensors of each argument of which one requires a gradient, by name."""
        if not torch.is_grad_enabled():
            return {}
        lists = {name: v if isinstance(v, list | tuple) else [v] for name, v in arguments.items()}
        tensors = {name: [v for v in values if isinstance(v, Tensor)] for name, values in lists.items()}
        wanted = {name: found for name, found in tensors.items() if any(t.requires_grad for t in found)}
        for name in wanted:
            if name not in self.differentiable:
                raise InvalidInputError(
                    Reason.INVALID_OPTION,
                    "requires a gradient, which this loss does not give; detach it",
                    field=name,
                )
        return wanted


class _Attached(torch.autograd.Function):
    """Gives a value the gradients that were computed with it."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, spread: Spread, gradients: Sequence[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.spread = spread
        ctx.save_for_backward(*gradients)  # let go after backward, so that `.grad` may take them over
        ctx.dtypes = [tensor.dtype for tensor in inputs]
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients: tuple[Tensor, ...] = ctx.saved_tensors
        if not _is_one(upstream):
            factor = ctx.spread(upstream)
            gradients = tuple(gradient * factor for gradient in gradients)
        typed = (gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
        return None, None, None, *typed


def _is_one(upstream: Tensor) -> bool:
    """Whether there is nothing to multiply by; on a GPU nobody waits to find out."""
    return not upstream.is_cuda and upstream.dim() == 0 and upstream.item() == 1


def attach_gradients(
    value: Tensor,
    arguments: Arguments,
    evaluation: Evaluation,
    names: Sequence[str],
    spread: Spread,
) -> Tensor:
    """Returns `value` as a function of the named inputs whose gradients were evaluated."""
    pairs = [
        (tensor, gradient)
        for name in names
        if name in evaluation.gradients
        for tensor, gradient in zip(
            _as_list(arguments[name]), _as_list(evaluation.gradients[name]), strict=True
        )
    ]
    if not pairs:
        return value
    inputs, gradients = zip(*pairs, strict=True)
    attached: Tensor = _Attached.apply(value, spread, gradients, *inputs)  # type: ignore[no-untyped-call]
    return attached


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns float64 if any tensor is of it, otherwise float32: the type that losses are given in."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def scalar(upstream: Tensor) -> Tensor:
    """The `Spread` of a loss that is one number."""
    return upstream


def _as_list(value: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [value] if isinstance(value, Tensor) else value
