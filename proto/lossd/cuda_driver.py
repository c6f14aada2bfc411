"""CUDA's driver, as far as it is asked for memory that goes from one process to another; by ctypes alone."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char, c_int, c_size_t, c_ubyte, c_uint64, c_void_p
from typing import Any, ClassVar

_PINNED, _ON_DEVICE, _DESCRIPTOR, _READ_WRITE = 1, 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_LOCATION_TYPE_DEVICE, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR and
CU_MEM_ACCESS_FLAGS_PROT_READWRITE of cuda.h."""

_CAN_EXPORT = 103
"""CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED."""


class GpuMemoryError(OSError):
    """The driver is not there, or refuses."""


class _Location(ctypes.Structure):
    _fields_: ClassVar = [("type", c_int), ("id", c_int)]


class _Properties(ctypes.Structure):
    _fields_: ClassVar = [
        ("type", c_int),
        ("handle_types", c_int),
        ("location", _Location),
        ("windows_attributes", c_void_p),
        ("flags", c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    _fields_: ClassVar = [("location", _Location), ("flags", c_int)]


class Driver:
    """What is asked of CUDA's driver; every method raises `GpuMemoryError` where it refuses.

    GPUs go by their ordinal numbers, which are this process's.
    """

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise GpuMemoryError("there is no CUDA driver") from error
        self._call("cuInit", 0)
        self._contexts: dict[int, c_void_p] = {}

    def uuids(self) -> list[str]:
        """Returns the UUIDs of the GPUs whose memory can be passed on, by their ordinals; else empty ones."""
        count = c_int()
        self._call("cuDeviceGetCount", byref(count))
        return [self._uuid(ordinal) for ordinal in range(count.value)]

    def create(self, ordinal: int, size: int) -> tuple[int, int]:
        """Returns a handle to new memory, and a descriptor of it for another process."""
        properties = _Properties(
            type=_PINNED, handle_types=_DESCRIPTOR, location=_Location(_ON_DEVICE, ordinal)
        )
        handle, descriptor = c_uint64(), c_int()
        self._call("cuMemCreate", byref(handle), c_size_t(size), byref(properties), c_uint64(0))
        try:
            self._call("cuMemExportToShareableHandle", byref(descriptor), handle, _DESCRIPTOR, c_uint64(0))
        except GpuMemoryError:
            self.release(handle.value)
            raise
        return handle.value, descriptor.value

    def open(self, descriptor: int) -> int:
        """Returns a handle to the memory of a descriptor, which may be that of anything."""
        handle = c_uint64()
        self._call("cuMemImportFromShareableHandle", byref(handle), c_void_p(descriptor), _DESCRIPTOR)
        return handle.value

    def is_of(self, handle: int, ordinal: int) -> bool:
        """Returns whether a handle is to plain memory of that GPU."""
        found = _Properties()
        self._call("cuMemGetAllocationPropertiesFromHandle", byref(found), c_uint64(handle))
        return (found.type, found.location.type, found.location.id) == (_PINNED, _ON_DEVICE, ordinal)

    def map(self, handle: int, ordinal: int, size: int) -> int:
        """Returns the address of memory, all of which is mapped for a GPU to read and write."""
        address = c_uint64()
        self._call(
            "cuMemAddressReserve", byref(address), c_size_t(size), c_size_t(0), c_uint64(0), c_uint64(0)
        )
        access = _Access(location=_Location(_ON_DEVICE, ordinal), flags=_READ_WRITE)
        try:
            self._call("cuMemMap", address, c_size_t(size), c_size_t(0), c_uint64(handle), c_uint64(0))
            try:
                self._call("cuMemSetAccess", address, c_size_t(size), byref(access), c_size_t(1))
            except GpuMemoryError:
                self._call("cuMemUnmap", address, c_size_t(size))
                raise
        except GpuMemoryError:
            self._call("cuMemAddressFree", address, c_size_t(size))
            raise
        return address.value

    def unmap(self, ordinal: int, address: int, size: int) -> None:
        """Takes memory off its address once nothing uses it any more."""
        self.synchronize(ordinal)
        self._call("cuMemUnmap", c_uint64(address), c_size_t(size))
        self._call("cuMemAddressFree", c_uint64(address), c_size_t(size))

    def release(self, handle: int) -> None:
        """Lets a handle go; memory stays as long as it is mapped anywhere."""
        self._call("cuMemRelease", c_uint64(handle))

    def synchronize(self, ordinal: int) -> None:
        """Waits until a GPU has done all that this process has told it."""
        with self._context(ordinal):
            self._call("cuCtxSynchronize")

    def fetch(self, ordinal: int, address: int, to: int, size: int) -> None:
        """Copies memory of a GPU to an address of the host's."""
        with self._context(ordinal):
            self._call("cuMemcpyDtoH_v2", c_void_p(to), c_uint64(address), c_size_t(size))

    @contextmanager
    def _context(self, ordinal: int) -> Iterator[None]:
        """Makes the context current that torch and others use too."""
        if ordinal not in self._contexts:
            context = c_void_p()
            self._call("cuDevicePrimaryCtxRetain", byref(context), ordinal)
            self._contexts[ordinal] = context
        self._call("cuCtxPushCurrent_v2", self._contexts[ordinal])
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def _uuid(self, ordinal: int) -> str:
        can, uuid = c_int(), (c_char * 16)()
        self._call("cuDeviceGetAttribute", byref(can), _CAN_EXPORT, ordinal)
        self._call("cuDeviceGetUuid_v2", byref(uuid), ordinal)
        return uuid.raw.hex() if can.value else ""

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, byref(text))
            raise GpuMemoryError(code, f"{name}: {(text.value or b'unknown error').decode()}")
