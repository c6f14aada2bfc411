"""How the losses of rows become one loss."""

from enum import StrEnum

from lossd_server.errors import InvalidInputError, Reason


class Reduction(StrEnum):
    """The reductions."""

    NONE = "none"
    """One loss a row."""
    MEAN = "mean"
    """The mean over rows."""
    SUM = "sum"
    """The sum over rows."""

    @classmethod
    def of(cls, value: "Reduction | str") -> "Reduction":
        """Returns the reduction of that name; raises `InvalidInputError` when there is none."""
        try:
            return cls(value)
        except ValueError:
            names = ", ".join(cls)
            raise InvalidInputError(
                Reason.INVALID_OPTION,
                f"is {value!r}, want one of {names}",
                field="reduction",
                value=value,
                allowed=names,
            ) from None

    def divisor(self, weight: float, *, least: float, normalizer: float | None) -> float:
        """Returns what the sum over rows is divided by.

        Args:
            weight: Sum of the rows' weights, or their number.
            least: Floor of that.
            normalizer: Divisor in its place; only for `mean`.
        """
        if self is not Reduction.MEAN:
            return 1.0
        return max(weight, least) if normalizer is None else normalizer
