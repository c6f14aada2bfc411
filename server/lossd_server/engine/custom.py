"""Loss modules of the operator's: found by entry point or by name, called with named tensors."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points

import structlog
import torch
from torch import Tensor, nn

from lossd_server import checks
from lossd_server.errors import ConfigurationError, CustomLossError, InvalidInputError, Reason
from lossd_server.losses import Component, Evaluation, EvaluationOptions
from lossd_server.losses.module import Arguments

ENTRY_POINT_GROUP = "lossd.losses"

_log = structlog.get_logger()


class CustomLoss:
    """A module of the operator's, evaluated by autograd.

    Its `forward` takes tensors by name and returns the loss, or a mapping of named components that
    has the loss under `loss` or `total_loss`.

    Attributes:
        name: The name to call it by.
        inputs: Names of the tensors that it takes.
        required: Those of them without a default.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module.eval()
        parameters = inspect.signature(module.forward).parameters.values()
        self.inputs = tuple(p.name for p in parameters)
        self.required = tuple(p.name for p in parameters if p.default is p.empty)

    def check(self, arguments: Arguments, gradients: Sequence[str]) -> None:
        """Raises `InvalidInputError` unless the arguments are those that the module takes."""
        for name in arguments:
            if name not in self.inputs:
                raise InvalidInputError(
                    Reason.UNEXPECTED_FIELD,
                    f"is no input of {self.name}, which takes {', '.join(self.inputs)}",
                    value=name,
                    inputs=", ".join(self.inputs),
                    field=f"tensors[{name}]",
                )
        for name in (*self.required, *gradients):
            if name not in arguments:
                raise InvalidInputError(
                    Reason.MISSING_FIELD, f"is an input of {self.name}", field=f"tensors[{name}]"
                )
        for name in gradients:
            checks.require_dtype(f"tensors[{name}]", arguments[name], checks.FLOATS)

    def to(self, device: torch.device) -> None:
        """Moves the module's own tensors to the device."""
        self._module.to(device)

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Calls the module, and asks autograd for the gradients of the loss.

        Raises:
            CustomLossError: The module raised, or returned what is no loss.
        """
        # Copies: a module may write to its inputs, and these are views of the request's bytes.
        tensors = {
            name: value.detach().clone().requires_grad_(name in options.gradients)
            for name, value in arguments.items()
        }
        try:
            with torch.set_grad_enabled(bool(options.gradients)):
                loss, components = self._read(self._module(**tensors))
                gradients = self._gradients(loss, tensors, options)
        except (CustomLossError, torch.OutOfMemoryError, MemoryError):
            raise
        except BaseException as error:  # SystemExit would leave the caller without an answer
            _log.exception("custom loss failed", loss=self.name)
            raise CustomLossError(
                Reason.CUSTOM_LOSS_FAILED,
                f"{self.name} raised {type(error).__name__}; the server's log has the details",
                loss=self.name,
                exception=type(error).__name__,
            ) from error
        return Evaluation(loss=loss.detach(), components=components, gradients=gradients)

    def _read(self, result: object) -> tuple[Tensor, tuple[Component, ...]]:
        """Returns the loss and the components in what the module returned."""
        named = result if isinstance(result, Mapping) else {"loss": result}
        total_name = next((name for name in ("loss", "total_loss") if name in named), None)
        loss = named.get(total_name)
        if not isinstance(loss, Tensor) or checks.dtype_name(loss) not in checks.FLOATS:
            raise CustomLossError(
                Reason.CUSTOM_LOSS_FAILED,
                f"{self.name} returned {type(result).__name__}, want a float tensor, "
                "or a mapping with one under loss or total_loss",
                loss=self.name,
                type=type(result).__name__,
            )
        components = tuple(
            Component(name=str(name), value=value.detach().double().sum(), weight=0.0)
            for name, value in named.items()
            if name != total_name and isinstance(value, Tensor)
        )
        return loss, components

    def _gradients(
        self, loss: Tensor, tensors: Mapping[str, Tensor], options: EvaluationOptions
    ) -> dict[str, Tensor | list[Tensor]]:
        if not options.gradients:
            return {}
        if not loss.requires_grad:
            raise CustomLossError(
                Reason.CUSTOM_LOSS_FAILED,
                f"{self.name} returned a loss that no input reaches, so it has no gradients",
                loss=self.name,
            )
        inputs = [tensors[name] for name in options.gradients]
        found = torch.autograd.grad(loss.sum(), inputs, materialize_grads=True)
        return {
            name: gradient.to(options.gradient_dtype or gradient.dtype)
            for name, gradient in zip(options.gradients, found, strict=True)
        }


def load_custom_losses(specs: Sequence[str]) -> dict[str, CustomLoss]:
    """Returns the operator's losses by name: every entry point, and what `specs` name.

    Args:
        specs: `[name=]package.module:Class`; the name is the class's unless given.

    Raises:
        ConfigurationError: A module does not import, is no `torch.nn.Module`, cannot be made without
            arguments, takes other than named tensors, or shares its name with another.
    """
    found = [(point.name, point.value) for point in entry_points(group=ENTRY_POINT_GROUP)]
    found += [_split_spec(spec) for spec in specs]
    losses: dict[str, CustomLoss] = {}
    for name, target in found:
        if name in losses:
            raise _refusal(target, f"{name} is loaded already")
        losses[name] = CustomLoss(name, _make_module(target))
        _log.info("loaded custom loss", name=name, target=target, inputs=losses[name].inputs)
    return losses


def _split_spec(spec: str) -> tuple[str, str]:
    name, separator, target = spec.rpartition("=")
    return (name if separator else target.rpartition(":")[2]), target


def _make_module(target: str) -> nn.Module:
    module_name, separator, class_name = target.partition(":")
    if not separator:
        raise _refusal(target, "want package.module:Class")
    try:
        made = getattr(importlib.import_module(module_name), class_name)()
    except (Exception, SystemExit) as error:  # a module that exits would end the start without a word
        raise _refusal(target, f"{type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise _refusal(target, "is no torch.nn.Module")
    kinds = {p.kind for p in inspect.signature(made.forward).parameters.values()}
    if kinds - {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        raise _refusal(target, "its forward takes arguments without a name")
    return made


def _refusal(target: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        Reason.CUSTOM_LOSS_FAILED, f"cannot load {target}: {why}", field="load", target=target
    )
