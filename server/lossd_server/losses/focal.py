"""Focal loss for dense classification."""

import numpy as np
import torch
from torch import Tensor

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses.arrays import NARROW_FLOATS, PLAIN_GRADIENTS, are_plain
from lossd_server.losses.evaluation import (
    Evaluation,
    EvaluationOptions,
    LossOutcome,
    Place,
    as_float32,
    as_tensor,
)
from lossd_server.losses.focal_grid import FocalConstants, FocalGrid
from lossd_server.losses.focal_kernel import focal_sums
from lossd_server.losses.gpu import load_kernels
from lossd_server.losses.gradients import gradient_buffers
from lossd_server.losses.module import Arguments, LossModule, attach_gradients
from lossd_server.losses.native import LABEL_TYPES, count_objects_natively, focal_sum_of_arrays
from lossd_server.losses.presets import LossPreset
from lossd_server.losses.reduction import Reduction

_COUNTED = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})

_LOGITS = frozenset({"inputs"})


class FocalLoss(LossModule):
    """Sigmoid focal loss `-α_t (1 - p_t)^γ log(p_t)`, summed over classes (Lin et al., 2017, eq. 5).

    Accurate to float32 rounding for every finite logit, easy examples included. Half-precision
    logits are computed in float32.

    Args:
        alpha: Weight of a row's own class, at most 1; the other classes weigh `1 - alpha`. None or a
            negative value weighs all alike.
        gamma: Focusing parameter, at least 0.
        reduction: `mean` over the rows that are not ignored, `sum`, or `none`.

    Raises:
        InvalidInputError: A parameter is out of range.
    """

    required = ("inputs", "targets")
    differentiable = ("inputs",)

    def __init__(self, alpha: float | None = 0.25, gamma: float = 2.0, reduction: str = "mean") -> None:
        super().__init__()
        self.constants = FocalConstants(alpha=alpha, gamma=gamma)
        self.reduction: Reduction = Reduction.of(reduction)
        check_focal_constants(self.constants, alpha_field="alpha", gamma_field="gamma")

    @property
    def alpha(self) -> float | None:
        """Weight of a row's own class."""
        return self.constants.alpha

    @property
    def gamma(self) -> float:
        """Focusing parameter."""
        return self.constants.gamma

    @property
    def has_kernels(self) -> bool:
        """Whether the compiled kernels do all of it on the host; they know some gammas alone."""
        return super().has_kernels and self.constants.has_kernel

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Computes the focal loss.

        Args:
            inputs: Logits, `[N, C]` or `[N, C, H, W]`, any float type.
            targets: Class of each row, `[N]` or `[N, H, W]`, any integer type: 0..C-1, or -1 to
                ignore the row.

        Returns:
            The loss, 0-d; under the reduction `none`, `[rows]` for the rows that are not ignored,
            in order. Without any such row, 0-d and exactly 0, as in the published source.

        Raises:
            InvalidInputError: A wrong shape or type, or a label out of range.
        """
        load_kernels()
        arguments = {"inputs": inputs, "targets": targets}
        evaluation = self.evaluate_for_autograd(arguments)

        def spread(upstream: Tensor) -> Tensor:
            if upstream.dim() == 0 or evaluation.kept_rows is None:
                return upstream
            rows = upstream.new_zeros(targets.numel())
            rows[evaluation.kept_rows] = upstream
            return rows.reshape(targets.shape).unsqueeze(1)

        return attach_gradients(evaluation.loss, arguments, evaluation, ["inputs"], spread)

    def check(self, arguments: Arguments) -> None:
        """Raises `InvalidInputError` unless logits and labels go together."""
        inputs, targets = arguments["inputs"], arguments["targets"]
        checks.require_dtype("inputs", inputs, checks.FLOATS)
        checks.require_dtype("targets", targets, checks.INTEGERS)
        shape = list(inputs.shape)
        if len(shape) not in {2, 4}:
            raise InvalidInputError(
                Reason.INVALID_SHAPE,
                f"shape is {shape}, want [N, C] or [N, C, H, W]",
                field="inputs",
                shape=shape,
            )
        checks.require_shape("targets", targets, shape[:1] + shape[2:])

    def read(self, arguments: Arguments) -> Arguments:
        """Returns arguments with the number of rows that count; see `LossModule.read`."""
        labels, classes = arguments["targets"], arguments["inputs"].shape[1]
        on_gpu = isinstance(labels, Tensor) and labels.is_cuda
        count = (count_objects_on_gpu if on_gpu else count_objects_natively)(labels, classes)
        if count is None:
            labels = checks.host_array(labels)
            checks.require_labels("targets", labels, num_classes=classes)
            count = int(np.count_nonzero(labels >= 0))
        return {**arguments, "valid_count": count}

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared logits and labels; see `LossModule.evaluate`."""
        inputs: Tensor = arguments["inputs"]
        labels: Tensor = arguments["targets"]
        valid = arguments["valid_count"]
        divisor = self.reduction.divisor(valid, least=1, normalizer=options.normalizer)
        dtype = torch.float64 if inputs.dtype is torch.float64 else torch.float32
        gradients = gradient_buffers(options, "inputs", [inputs])
        rows = None
        if self.reduction is Reduction.NONE:
            rows = torch.empty(labels.shape, dtype=dtype, device=inputs.device)
        problem = FocalGrid(
            logits=inputs,
            labels=labels,
            gradient=None if gradients is None else gradients[0],
            scale=1 / divisor,
            divisor=divisor,
            rows=rows,
        )
        sums = focal_sums([problem], self.constants)
        mean = sums.losses[0] / divisor if sums.means is None else sums.means[0].detach()
        count = np.array([float(valid)])
        return Evaluation(
            loss=as_tensor(mean, inputs, dtype) if rows is None else _kept(rows, labels),
            gradients={} if gradients is None else {"inputs": gradients[0]},
            raw_sums={"cls_loss": sums.losses, "valid_count": count, "positive_count": count},
            preset=LossPreset.AUTOTIMM,
            kept_rows=None if rows is None else _have_object(labels).flatten().nonzero().flatten(),
            finite_inputs=_LOGITS if sums.finite else frozenset(),
        )

    def evaluate_arrays(
        self, arguments: Arguments, options: EvaluationOptions, place: Place
    ) -> LossOutcome | None:
        """Evaluates prepared logits and labels in numpy; see `LossModule.evaluate_arrays`."""
        logits, labels, valid = arguments["inputs"], arguments["targets"], arguments["valid_count"]
        if self.reduction is Reduction.NONE or options.gradient_dtype not in PLAIN_GRADIENTS:
            return None
        if not (are_plain(NARROW_FLOATS, logits) and are_plain(LABEL_TYPES, labels) and logits.size):
            return None
        divisor = self.reduction.divisor(valid, least=1, normalizer=options.normalizer)
        gradients = {"inputs": place("inputs")} if options.gradients else {}
        gradient = gradients["inputs"][0] if gradients else None
        sums = focal_sum_of_arrays(logits, labels, gradient, 1 / divisor, self.constants)
        if sums is None or not sums.finite:
            return None
        total = float(sums.losses[0])
        mean = as_float32(total / divisor)
        if mean is None:
            return None
        count = float(valid)
        return LossOutcome(
            loss=mean,
            gradients=gradients,
            raw_sums=[{"cls_loss": total, "valid_count": count, "positive_count": count}],
            preset=LossPreset.AUTOTIMM,
        )


def count_objects_on_gpu(labels: Tensor, num_classes: int) -> int | None:
    """Returns how many labels are of an object, with three numbers read and not all labels.

    None where that does not apply, and where a label is neither -1 nor a class.
    """
    if labels.dtype not in _COUNTED or not labels.numel():
        return None
    lowest, highest = (bound.to(torch.int64) for bound in labels.aminmax())
    least, most, count = torch.stack([lowest, highest, (labels >= 0).sum()]).tolist()
    return int(count) if least >= -1 and most < num_classes else None


def check_focal_constants(constants: FocalConstants, *, alpha_field: str, gamma_field: str) -> None:
    """Raises `InvalidInputError` for an alpha above 1 or a negative gamma, naming the field."""
    checks.require_number(gamma_field, constants.gamma, at_least=0)
    if constants.alpha is not None:
        checks.require_number(alpha_field, constants.alpha, at_most=1)


def _kept(rows: Tensor, labels: Tensor) -> Tensor:
    kept = rows[_have_object(labels)]
    return kept if len(kept) else rows.new_zeros(())


def _have_object(labels: Tensor) -> Tensor:
    """Returns which labels are of an object; torch compares no unsigned numbers of more than a byte."""
    return labels.to(torch.int64) >= 0
