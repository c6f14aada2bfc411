"""Arrays as the kernels know them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the kernels are compiled ahead where there is no numpy
    from numpy.typing import NDArray


def address_of(array: "NDArray[Any]") -> int:
    """Returns where the elements of an array begin."""
    address: int = array.__array_interface__["data"][0]  # `array.ctypes` takes four times as long
    return address
