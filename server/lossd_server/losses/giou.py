"""Generalized IoU loss for matched boxes."""

import numpy as np
from torch import Tensor

from lossd_server import checks
from lossd_server.losses.evaluation import (
    Evaluation,
    EvaluationOptions,
    LossOutcome,
    Place,
    to_float64,
)
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import load_kernels
from lossd_server.losses.gradients import gradient_buffers
from lossd_server.losses.module import Arguments, LossModule, attach_gradients
from lossd_server.losses.presets import LossPreset
from lossd_server.losses.reduction import Reduction
from lossd_server.losses.row_reduction import reduce_arrays, reduce_rows, total_weight


class GIoULoss(LossModule):
    """Generalized IoU loss `1 - GIoU` (Rezatofighi et al., 2019), in 0..2 for upright boxes.

    Computed in float64 whatever the inputs, so that large half-precision boxes do not overflow.

    Args:
        reduction: `mean` (weighted: `Σ w·loss / max(Σ w, eps)`), `sum`, or `none`.
        eps: Floor of the union's and the enclosing box's area, square pixels, above 0.

    Raises:
        InvalidInputError: A parameter is out of range.
    """

    required = ("pred_boxes", "target_boxes")
    differentiable = ("pred_boxes",)

    def __init__(self, reduction: str = "mean", eps: float = 1e-7) -> None:
        super().__init__()
        self.reduction: Reduction = Reduction.of(reduction)
        self.eps = eps
        checks.require_number("eps", eps, above=0)

    def forward(self, pred_boxes: Tensor, target_boxes: Tensor, weights: Tensor | None = None) -> Tensor:
        """Computes the GIoU loss of matched boxes.

        Args:
            pred_boxes: `[N, 4]` x1 y1 x2 y2, any float type.
            target_boxes: `[N, 4]` x1 y1 x2 y2, any float or integer type, upright.
            weights: Optional weight of each box, `[N]`, any float type.

        Returns:
            The loss, 0-d, or `[N]` under the reduction `none`; 0-d and exactly 0 for no boxes.

        Raises:
            InvalidInputError: A wrong shape or type, or an inverted target box.
        """
        load_kernels()
        arguments = {"pred_boxes": pred_boxes, "target_boxes": target_boxes, "weights": weights}
        evaluation = self.evaluate_for_autograd(arguments)
        return attach_gradients(
            evaluation.loss,
            arguments,
            evaluation,
            ["pred_boxes"],
            lambda upstream: upstream.unsqueeze(-1),
        )

    def check(self, arguments: Arguments) -> None:
        """Raises `InvalidInputError` unless boxes and weights go together."""
        pred, target = arguments["pred_boxes"], arguments["target_boxes"]
        checks.require_dtype("pred_boxes", pred, checks.FLOATS)
        checks.require_shape("pred_boxes", pred, ["N", 4])
        checks.require_dtype("target_boxes", target, (*checks.FLOATS, *checks.INTEGERS))
        checks.require_shape("target_boxes", target, pred.shape)
        weights = arguments.get("weights")
        if weights is not None:
            checks.require_dtype("weights", weights, checks.FLOATS)
            checks.require_shape("weights", weights, pred.shape[:1])

    def read(self, arguments: Arguments) -> Arguments:
        """Returns arguments with the sum of the weights; see `LossModule.read`."""
        checks.require_upright_boxes("target_boxes", checks.host_array(arguments["target_boxes"]))
        return {**arguments, "weight": total_weight(arguments.get("weights"), len(arguments["pred_boxes"]))}

    def evaluate_arrays(
        self, arguments: Arguments, options: EvaluationOptions, place: Place
    ) -> LossOutcome | None:
        """Evaluates prepared boxes in numpy; see `LossModule.evaluate_arrays`."""
        pred, weight = arguments["pred_boxes"], arguments["weight"]
        reduced = reduce_arrays(
            RowFormula.GIOU,
            pred,
            arguments["target_boxes"],
            arguments.get("weights"),
            reduction=self.reduction,
            divisor=self.reduction.divisor(weight, least=self.eps, normalizer=options.normalizer),
            options=options,
            place=place,
            floor=self.eps,
        )
        if reduced is None:
            return None
        return LossOutcome(
            loss=reduced.loss,
            gradients=reduced.gradients,
            raw_sums=[
                {
                    "reg_loss": reduced.total,
                    "weight": weight,
                    "positive_count": float(len(pred)),
                }
            ],
            preset=LossPreset.AUTOTIMM,
        )

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared boxes; see `LossModule.evaluate`."""
        pred, target = arguments["pred_boxes"], arguments["target_boxes"]
        weight = arguments["weight"]
        gradients = gradient_buffers(options, "pred_boxes", [pred])
        reduced = reduce_rows(
            RowFormula.GIOU,
            pred.t(),
            target if target.is_floating_point() else to_float64(target),
            arguments.get("weights"),
            reduction=self.reduction,
            divisor=self.reduction.divisor(weight, least=self.eps, normalizer=options.normalizer),
            gradient=None if gradients is None else gradients[0].t(),
            floor=self.eps,
        )
        return Evaluation(
            loss=reduced.loss,
            gradients={} if gradients is None else {"pred_boxes": gradients[0]},
            raw_sums={
                "reg_loss": reduced.total,
                "weight": np.array([weight]),
                "positive_count": np.array([float(len(pred))]),
            },
            preset=LossPreset.AUTOTIMM,
        )
