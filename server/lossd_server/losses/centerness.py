"""Binary cross-entropy on centerness logits."""

import torch
from torch import Tensor

from lossd_server import checks
from lossd_server.losses.evaluation import Component, Evaluation, EvaluationOptions
from lossd_server.losses.formulas import centerness_terms, entropy
from lossd_server.losses.module import Arguments, LossModule, attach_gradients
from lossd_server.losses.presets import LossPreset
from lossd_server.losses.reduction import Reduction, reduce_rows

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
        checks.require_unit_interval("target", checks.host_array(target))
        weights = arguments.get("weights")
        if weights is not None:
            checks.require_dtype("weights", weights, checks.FLOATS)
            checks.require_same_rows("weights", weights, "pred", pred)

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared logits; see `LossModule.evaluate`."""
        pred: Tensor = arguments["pred"]
        target = arguments["target"].flatten().double()
        weights: Tensor | None = arguments.get("weights")
        weights = None if weights is None else weights.flatten()
        rows, slopes = centerness_terms(pred.flatten().double(), target)
        reduced = reduce_rows(
            rows,
            weights,
            self.reduction,
            least_weight=_LEAST_WEIGHT,
            normalizer=options.normalizer,
        )
        floor = (entropy(target) * reduced.row_factors).sum()
        gradient = (slopes * reduced.row_factors).reshape(pred.shape)
        wanted = "pred" in options.gradients
        return Evaluation(
            loss=reduced.loss.to(torch.promote_types(pred.dtype, torch.float32)),
            components=(
                Component(name="centerness_loss", value=reduced.loss.sum(), weight=1.0),
                Component(name="centerness_floor", value=floor, weight=0.0),
            ),
            gradients={"pred": gradient.to(options.gradient_dtype or pred.dtype)} if wanted else {},
            raw_sums={
                "centerness_loss": reduced.total[None],
                "centerness_target": target.sum()[None],
                "weight": reduced.weight[None],
                "positive_count": rows.new_tensor([len(rows)]),
            },
            preset=LossPreset.AUTOTIMM,
        )
