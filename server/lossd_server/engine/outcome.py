"""From what a device found to an outcome on the host."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossd_server.engine.transfer import as_tensor, from_host, to_host
from lossd_server.engine.work import AnyArray, Array, LossItem
from lossd_server.errors import CustomLossError, Reason
from lossd_server.losses import Evaluation, LossOutcome, NonFinite
from lossd_server.losses.evaluation import FiniteCheck, Numbers, find_non_finite


class Launched(NamedTuple):
    """An evaluation that a GPU may still be at work on.

    Attributes:
        item: What is evaluated.
        evaluation: What will have come of it.
        check: The look for NaN and infinity in its inputs; None where there is nothing to look at.
    """

    item: LossItem
    evaluation: Evaluation
    check: FiniteCheck | None

    def numbers(self) -> list[float | Numbers]:
        """Returns what is to be read as numbers."""
        found = self.evaluation
        return [
            *(component.value for component in found.components),
            *found.raw_sums.values(),
            found.negative_side_count,
            *([] if self.check is None else [self.check.totals]),
        ]

    def tensors(self) -> list[Tensor]:
        """Returns what is to be read as arrays: all but the gradients that have a place."""
        found = self.evaluation
        return [
            found.loss,
            *([] if found.kept_rows is None else [found.kept_rows]),
            *(gradient for name in self._unplaced() for gradient in self._gradients(name)),
        ]

    def outcome(
        self, numbers: Iterator[NDArray[np.float64]], arrays: Iterator[Array], *, strict: bool
    ) -> LossOutcome:
        """Returns the outcome, with the gradients in the order in which they were asked for.

        Args:
            numbers: Begins with what was read for `numbers`.
            arrays: Begins with what was read for `tensors`.
            strict: Whether NaN and infinity are refused.

        Raises:
            CustomLossError: A loss of the operator's is NaN or infinite, and the job strict.
        """
        found = self.evaluation
        values = [float(next(numbers)[0]) for _ in found.components]
        levels = zip(*(next(numbers).tolist() for _ in found.raw_sums), strict=True)
        raw_sums: list[Mapping[str, float]] = [
            dict(zip(found.raw_sums, level, strict=True)) for level in levels
        ]
        negative_sides = int(next(numbers)[0])
        totals = [] if self.check is None else next(numbers).tolist()
        loss = next(arrays)
        kept_rows = None if found.kept_rows is None else next(arrays)
        unplaced: dict[str, list[AnyArray]] = {
            name: [next(arrays) for _ in self._gradients(name)] for name in self._unplaced()
        }
        return LossOutcome(
            loss=loss,
            components=[(c.name, v, c.weight) for c, v in zip(found.components, values, strict=True)],
            gradients={
                name: unplaced[name] if name in unplaced else self._put_in_place(name)
                for name in self.item.options.gradients
            },
            raw_sums=raw_sums,
            non_finite=self._non_finite(totals, loss, strict=strict),
            preset=found.preset,
            kept_rows=kept_rows,
            negative_side_count=negative_sides,
            nonzero_rows=found.nonzero_rows,
        )

    def _unplaced(self) -> list[str]:
        return [name for name in self.item.options.gradients if name not in self.item.outputs]

    def _gradients(self, name: str) -> Sequence[Tensor]:
        gradient = self.evaluation.gradients[name]
        return gradient if isinstance(gradient, list) else [gradient]

    def _put_in_place(self, name: str) -> list[AnyArray]:
        """Returns the arrays that a gradient is to be written to, once it is."""
        outputs = self.item.outputs[name]
        for gradient, output in zip(self._gradients(name), outputs, strict=True):
            place = as_tensor(output)
            if gradient.data_ptr() != place.data_ptr():  # on the other side of a bus, or made by autograd
                place.copy_(gradient)
                if place.is_cuda:
                    torch.cuda.current_stream(place.device).synchronize()
        return outputs

    def _non_finite(self, totals: Sequence[float], loss: Array, *, strict: bool) -> list[NonFinite]:
        found = [] if self.check is None else self.check.end(totals)
        if self.evaluation.preset is None:  # a custom loss may make NaN of finite inputs
            found += find_non_finite({"loss": from_host(loss)})
            if strict and found:
                raise CustomLossError(
                    Reason.CUSTOM_LOSS_FAILED, "the loss is NaN or infinite", value="nan or inf"
                )
        return found


Reading = tuple[Iterator[NDArray[np.float64]], Iterator[Array]]
"""The numbers and the arrays of one evaluation."""


def read(launched: Sequence[Launched]) -> list[Reading]:
    """Returns what was read for each evaluation; from a GPU with one wait for all."""
    numbers, tensors = [each.numbers() for each in launched], [each.tensors() for each in launched]
    found, arrays = map(iter, to_host(list(chain(*numbers)), list(chain(*tensors))))
    return [
        (iter([next(found) for _ in ours]), iter([next(arrays) for _ in theirs]))
        for ours, theirs in zip(numbers, tensors, strict=True)
    ]
