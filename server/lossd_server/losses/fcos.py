"""The combined loss of an FCOS head (Tian et al., "FCOS", 2019, §3.1)."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lossd_server import checks
from lossd_server.errors import InvalidInputError, Reason
from lossd_server.losses.arrays import NARROW_FLOATS, PLAIN_GRADIENTS, are_finite, are_plain
from lossd_server.losses.evaluation import (
    Component,
    Evaluation,
    EvaluationOptions,
    LossOutcome,
    Place,
    as_float32,
    as_tensor,
)
from lossd_server.losses.fcos_arguments import (
    COMPONENTS,
    DENSE_TARGETS,
    PREDICTIONS,
    arguments_by_name,
    check_dense_targets,
    check_predictions,
    component_weight,
    member_named,
    read_dense_targets,
)
from lossd_server.losses.fcos_reduction import HeadReduction
from lossd_server.losses.fcos_terms import (
    GradientRequest,
    nonzero_rows,
    term_sums,
    term_sums_of_arrays,
)
from lossd_server.losses.focal import check_focal_constants
from lossd_server.losses.focal_grid import FocalConstants
from lossd_server.losses.gpu import load_kernels
from lossd_server.losses.gradients import gradient_buffers
from lossd_server.losses.locations import from_assignment
from lossd_server.losses.module import Arguments, LossModule, attach_gradients, scalar, widest_dtype
from lossd_server.losses.presets import LossPreset
from lossd_server.targets import DEFAULT_STRIDES, BoxFormat, FCOSAssigner, GroundTruth


class FCOSLoss(LossModule):
    """Classification, box regression and centerness over all levels of a feature pyramid.

    Takes dense targets or ground truth. Without a preset, dense targets get `autotimm` (the numbers
    of AutoTimm's published source) and ground truth gets `documented` (what its documentation says).

    Args:
        num_classes: Number of classes C; must equal the channels of `cls_preds`.
        focal_alpha: Alpha of the focal loss.
        focal_gamma: Gamma of the focal loss.
        cls_weight: Weight of the classification component; also `cls_loss_weight`.
        reg_weight: Weight of the regression component; also `reg_loss_weight`.
        centerness_weight: Weight of the centerness component; also `centerness_loss_weight`.
        strides: Strides of the assigner, for ground truth; a head with fewer levels takes the first of
            the default ones.
        regress_ranges: Ranges of the assigner; None means the default ones of five strides.
        preset: `autotimm` or `documented`; None chooses by the kind of targets.
        box_format: Layout of the ground truth's boxes: `xyxy`, `xywh` or `cxcywh`.
        assigner: The whole assigner, in place of `strides`, `regress_ranges` and `box_format`.
        cls_loss_weight: The documented name of `cls_weight`.
        reg_loss_weight: The documented name of `reg_weight`.
        centerness_loss_weight: The documented name of `centerness_weight`.

    Raises:
        InvalidInputError: A parameter is out of range, or given under both of its names.
    """

    required = PREDICTIONS
    differentiable = PREDICTIONS

    def __init__(
        self,
        num_classes: int,
        focal_alpha: float | None = 0.25,
        focal_gamma: float = 2.0,
        cls_weight: float | None = None,
        reg_weight: float | None = None,
        centerness_weight: float | None = None,
        *,
        strides: Sequence[int] = DEFAULT_STRIDES,
        regress_ranges: Sequence[tuple[float, float]] | None = None,
        preset: str | None = None,
        box_format: str = "xyxy",
        assigner: FCOSAssigner | None = None,
        cls_loss_weight: float | None = None,
        reg_loss_weight: float | None = None,
        centerness_loss_weight: float | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.focal = FocalConstants(alpha=focal_alpha, gamma=focal_gamma)
        self.weights = (
            component_weight("cls_weight", cls_weight, "cls_loss_weight", cls_loss_weight),
            component_weight("reg_weight", reg_weight, "reg_loss_weight", reg_loss_weight),
            component_weight(
                "centerness_weight",
                centerness_weight,
                "centerness_loss_weight",
                centerness_loss_weight,
            ),
        )
        self.preset = None if preset is None else member_named(LossPreset, preset, "preset")
        self.assigner = assigner or FCOSAssigner(
            strides=tuple(strides),
            regress_ranges=None if regress_ranges is None else tuple(regress_ranges),
            box_format=member_named(BoxFormat, box_format, "box_format"),
        )
        checks.require_number("num_classes", num_classes, at_least=1, whole=True)
        check_focal_constants(self.focal, alpha_field="focal_alpha", gamma_field="focal_gamma")

    @property
    def has_kernels(self) -> bool:
        """Whether the compiled kernels do all of it on the host; they know some gammas alone."""
        return super().has_kernels and self.focal.has_kernel

    def forward(
        self,
        cls_preds: Sequence[Tensor],
        reg_preds: Sequence[Tensor],
        centerness_preds: Sequence[Tensor],
        cls_targets: Sequence[Tensor] | Sequence[Mapping[str, Any]] | None = None,
        reg_targets: Sequence[Tensor] | None = None,
        centerness_targets: Sequence[Tensor] | None = None,
        ignored_targets: Sequence[Tensor] | None = None,
        *,
        ground_truth: Sequence[GroundTruth | Mapping[str, Any]] | None = None,
    ) -> dict[str, Tensor]:
        """Computes the combined loss from dense targets, or from ground truth as the fourth argument.

        Args:
            cls_preds: Classification logits, one a level, `[B, C, H, W]`, any float type.
            reg_preds: Distances l, t, r, b in pixels, one a level, `[B, 4, H, W]`, any float type.
            centerness_preds: Centerness logits, one a level, `[B, 1, H, W]`, any float type.
            cls_targets: Classes, one a level, `[B, H, W]`, any integer type, -1 without an object;
                or the ground truth: for each image a mapping with `boxes` `[N, 4]` in xyxy pixels
                and `labels` `[N]`.
            reg_targets: Target distances, one a level, `[B, 4, H, W]`.
            centerness_targets: Target centerness in 0..1, one a level, `[B, H, W]`.
            ignored_targets: Optional, one a level, `[B, H, W]` bool: locations without an object that
                are no background either, such as those in crowd regions.
            ground_truth: The ground truth, by name.

        Returns:
            `cls_loss`, `reg_loss` and `centerness_loss` (after their weights under `autotimm`,
            before them under `documented`), and the weighted total as `loss` and as `total_loss`,
            all 0-d.

        Raises:
            InvalidInputError: Levels, shapes or types that do not go together, a label out of range,
                a refused box.
        """
        load_kernels()
        arguments = arguments_by_name(
            cls_preds,
            reg_preds,
            centerness_preds,
            cls_targets,
            reg_targets,
            centerness_targets,
            ignored_targets,
            ground_truth=ground_truth,
        )
        evaluation = self.evaluate_for_autograd(arguments)
        dtype = evaluation.loss.dtype
        terms = [c for c in evaluation.components if c.name in COMPONENTS]
        losses = {
            term.name: attach_gradients(
                as_tensor(term.value, evaluation.loss, dtype), arguments, evaluation, [prediction], scalar
            )
            for term, prediction in zip(terms, PREDICTIONS, strict=True)
        }
        total = torch.stack([losses[term.name] * term.weight for term in terms]).sum()
        return {**losses, "loss": total, "total_loss": total}

    def check(self, arguments: Arguments) -> None:
        """Raises `InvalidInputError` unless predictions and targets go together.

        The objects of the ground truth are checked where they are read.
        """
        sizes = check_predictions(arguments, self.num_classes)
        if arguments.get("ground_truth") is None:
            check_dense_targets(arguments, sizes)
            return
        for name in (*DENSE_TARGETS, "ignored_targets"):
            if arguments.get(name):
                raise InvalidInputError(Reason.UNEXPECTED_FIELD, "is set beside ground_truth", field=name)
        batch = sizes[0][0]
        checks.require_count("ground_truth", len(arguments["ground_truth"]), "images", batch)
        strides = self.assigner.for_levels(len(sizes)).strides
        checks.require_count("cls_preds", len(sizes), "strides of the assigner", len(strides))

    def read(self, arguments: Arguments) -> Arguments:
        """Returns the predictions and what they should be; see `LossModule.read`."""
        preds = {name: list(arguments[name]) for name in PREDICTIONS}
        ground_truth = arguments.get("ground_truth")
        if ground_truth is None:
            levels = read_dense_targets(arguments, self.num_classes)
        else:
            objects = self.assigner.read(ground_truth, num_classes=self.num_classes)
            sizes = [(pred.shape[2], pred.shape[3]) for pred in preds["cls_preds"]]
            assigner = self.assigner.for_levels(len(sizes))
            levels = from_assignment(assigner.assign_objects(objects, assigner.pyramid_of(sizes)))
        return {**preds, "targets": levels, "preset": self.preset_for(arguments)}

    def evaluate(self, arguments: Arguments, options: EvaluationOptions) -> Evaluation:
        """Evaluates prepared predictions; see `LossModule.evaluate`."""
        reduction = self._reduction(arguments, options)
        preds = [arguments[name] for name in PREDICTIONS]
        buffers = [
            gradient_buffers(options, name, kind) for name, kind in zip(PREDICTIONS, preds, strict=True)
        ]
        requests = [
            None if kind is None else GradientRequest(scales=scales, buffers=kind)
            for kind, scales in zip(buffers, reduction.scales(options), strict=True)
        ]
        levels, rules = reduction.levels, reduction.rules
        sums, finite = term_sums(preds, levels, self.focal, rules, requests)
        values = reduction.values(sums)
        components = reduction.components(values)
        dtype = widest_dtype(pred for kind in preds for pred in kind)
        return Evaluation(
            loss=as_tensor(_weighted_total(components), preds[0][0], dtype),
            components=tuple(Component(name=n, value=value, weight=w) for n, value, w in components),
            gradients={
                name: kind for name, kind in zip(PREDICTIONS, buffers, strict=True) if kind is not None
            },
            raw_sums=reduction.raw_sums(sums),
            preset=arguments["preset"],
            negative_side_count=values[3],
            finite_inputs=frozenset(f"cls_preds[{i}]" for i in range(len(levels)) if finite),
            nonzero_rows=nonzero_rows(levels, rules) if options.nonzero_rows else {},
        )

    def evaluate_arrays(
        self, arguments: Arguments, options: EvaluationOptions, place: Place
    ) -> LossOutcome | None:
        """Evaluates prepared predictions in numpy; see `LossModule.evaluate_arrays`."""
        preds = [arguments[name] for name in PREDICTIONS]
        if (
            options.gradient_dtype not in PLAIN_GRADIENTS
            or not are_plain(NARROW_FLOATS, *chain(*preds))
            or not all(logits.size for logits in preds[0])
            or not are_finite(*preds[1], *preds[2])
        ):
            return None
        reduction = self._reduction(arguments, options)
        gradients = {name: place(name) for name in options.gradients}
        requests = [
            GradientRequest(scales=scales, buffers=gradients[name]) if name in gradients else None
            for name, scales in zip(PREDICTIONS, reduction.scales(options), strict=True)
        ]
        levels, rules = reduction.levels, reduction.rules
        found = term_sums_of_arrays(preds, levels, self.focal, rules, requests)
        if found is None or not found.finite:
            return None
        values = reduction.values(found.numbers)
        components = [(name, float(value), weight) for name, value, weight in reduction.components(values)]
        loss = as_float32(float(_weighted_total(components)))
        if loss is None:
            return None
        sums = {name: numbers.tolist() for name, numbers in reduction.raw_sums(found.numbers).items()}
        return LossOutcome(
            loss=loss,
            components=components,
            gradients=gradients,
            raw_sums=[dict(zip(sums, level, strict=True)) for level in zip(*sums.values(), strict=True)],
            preset=arguments["preset"],
            negative_side_count=int(values[3]),
            nonzero_rows=nonzero_rows(levels, rules) if options.nonzero_rows else {},
        )

    def preset_for(self, arguments: Arguments) -> LossPreset:
        """Returns the preset that these arguments are evaluated under."""
        if self.preset is not None:
            return self.preset
        dense = arguments.get("ground_truth") is None
        return LossPreset.AUTOTIMM if dense else LossPreset.DOCUMENTED

    def _reduction(self, arguments: Arguments, options: EvaluationOptions) -> HeadReduction:
        return HeadReduction.of(arguments["targets"], arguments["preset"], self.weights, options.normalizer)


def _weighted_total(components: Sequence[tuple[str, float | Tensor, float]]) -> float | Tensor:
    return sum((value * weight for _, value, weight in components if weight), start=0.0)
