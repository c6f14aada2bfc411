"""Binary cross-entropy on centerness logits."""

import numpy as np
from torch import Tensor

from lossd_server import checks
from lossd_server.losses.evaluation import (
    Component,
    Evaluation,
    EvaluationOptions,
    LossOutcome,
    Place,
)
from lossd_server.losses.formulas import RowFormula
from lossd_server.losses.gpu import load_kernels
from lossd_server.losses.gradients import gradient_buffers
from lossd_server.losses.module import Arguments, LossModule, attach_gradients
from lossd_server.losses.presets import LossPreset
from lossd_server.losses.reduction import Reduction
from lossd_server.losses.row_reduction import reduce_arrays, reduce_rows, total_weight

_LEAST_WEIGHT = 1e-7


class CenternessLoss(LossModule):
    """Binary cross-entropy between centerness logits and soft targets (Tian et al., 2019, §3.2).

    With soft targets it never reaches 0: the evaluation reports the entropy of the targets, which
    is the value of a perfect prediction, as `centerness_floor`.

    Args:
        reduction: `mean` (weighted: `Σ w·loss / max(Σ w, 1e-7)`), `sum`, or `none`.

    Raises:
        InvalidInputError: The reduction is unknown.
    """

    required = ("pred", "target")
    differentiable = ("pred",)

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction: Reduction = Reduction.of(reduction)

    def forward(self, pred: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Computes the centerness loss.

        Args:
            pred: Logits, any shape and strides, any float type; `[N]` and `[N, 1]` are usual.
            target: Targets in 0..1, in the shape of `pred` but for extents of 1, any float type.
            weights: Optional weight of each row, likewise, any float type.

        Returns:
            The loss, 0-d, or one number a row, `[rows]`, under the reduction `none`; 0-d and exactly
            0 for no rows.

        Raises:
            InvalidInputError: A wrong shape or type, or a target outside 0..1.
        """
        load_kernels()
        arguments = {"pred": pred, "target": target, "weights": weights}
        evaluation = self.evaluate_for_autograd(arguments)

        def spread(upstream: Tensor) -> Tensor:
            return upstream.reshape(pred.shape) if upstream.dim() else upstream

        return attach_gradients(evaluation.loss, arguments, evaluation, ["pred"], spread)

    def check(self, arguments: Arguments) -> None:
        """Raises `InvalidInputError` unless logits, targets and weights go together."""
        pred, target = arguments["pred"], arguments["target"]
        checks.require_dtype("pred", pred, checks.FLOATS)
        checks.require_dtype("target", target, checks.FLOATS)
        checks.require_same_rows("target", target, "pred", pred)
        weights = arguments.get("weights")
        if weights is not None:
            checks.require_dtype("weights", weights, checks.FLOATS)
            checks.require_same_rows("weights", weights, "pred", pred)

    def read(self, arguments: Arguments) -> Arguments:
        """Returns arguments with the sums of targets and weights; see `LossModule.read`."""
        target = checks.host_array(arguments["target"])
        checks.require_unit_interval("target", target)
        return {
            **arguments,
            "target_sum": float(target.sum(dtype=np.float64)),
            "weight": total_weight(arguments.get("weights"), target.size),
        }

    def evaluate_arrays(
        self, arguments: Arguments, options: EvaluationOptions, place: Place
    ) -> LossOutcome | None:
        """Evaluates prepared logits in numpy; see `LossModule.evaluate_arrays`."""
        pred, weight = arguments["pred"], arguments["weight"]
        reduced = reduce_arrays(
            RowFormula.CENTERNESS,
            pred,
            arguments["target"],
            arguments.get("weights"),
            reduction=self.reduction,
            divisor=self.reduction.divisor(weight, least=_LEAST_WEIGHT, normalizer=options.normalizer),
            options=options,
            place=place,
        )
        if reduced is None:
            return None
        return LossOutcome(
            loss=reduced.loss,
            components=(
                ("centerness_loss", float(reduced.loss), 1.0),
                ("centerness_floor", reduced.extra, 0.0),
            ),
            gradients=reduced.gradients,
            raw_sums=[
                {
                    "centerness_loss": reduced.total,
                    "centerness_target": arguments["target_sum"],
                    "weight": weight,
                    "positive_count": float(pred.size),
                }
            ],
            preset=LossPreset.AUTOTIMM,
        )

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared logits; see `LossModule.evaluate`."""
        pred: Tensor = arguments["pred"]
        weight, weights = arguments["weight"], arguments.get("weights")
        gradients = gradient_buffers(options, "pred", [pred])
        reduced = reduce_rows(
            RowFormula.CENTERNESS,
            pred.reshape(1, -1),
            arguments["target"].reshape(-1, 1),
            None if weights is None else weights.flatten(),
            reduction=self.reduction,
            divisor=self.reduction.divisor(weight, least=_LEAST_WEIGHT, normalizer=options.normalizer),
            gradient=None if gradients is None else gradients[0].view(1, -1),
        )
        return Evaluation(
            loss=reduced.loss,
            components=(
                Component(name="centerness_loss", value=reduced.loss.double().sum(), weight=1.0),
                Component(name="centerness_floor", value=reduced.extra, weight=0.0),
            ),
            gradients={} if gradients is None else {"pred": gradients[0]},
            raw_sums={
                "centerness_loss": reduced.total,
                "centerness_target": np.array([arguments["target_sum"]]),
                "weight": np.array([weight]),
                "positive_count": np.array([float(pred.numel())]),
            },
            preset=LossPreset.AUTOTIMM,
        )
