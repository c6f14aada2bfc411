"""Arrays as the kernels know them."""

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the kernels are compiled ahead where there is no numpy
    from numpy.typing import NDArray

_DATA = object.__basicsize__
"""Where an array has the address of its elements: behind what every object begins with.

Compiled code finds it there (`PyArrayObject_fields` of numpy's `ndarraytypes.h`): no version moves it.
"""


def address_of(array: "NDArray[Any]") -> int:
    """Returns where the elements of an array begin, sooner than `array.ctypes` does.

    Args:
        array: One of numpy's: of anything else no address comes.
    """
    return ctypes.c_size_t.from_address(id(array) + _DATA).value
