"""The few calls of the CUDA driver that put physical memory behind reserved addresses and take it away again."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint64, c_ushort, c_void_p
from typing import Any

_LIBRARY = "libcuda.so.1"
_OUT_OF_MEMORY = 2
_PINNED = _DEVICE = 1
_READ_WRITE = 3
_VIRTUAL_MEMORY_SUPPORTED = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED


class CudaDriverError(RuntimeError):
    """A call of the driver failed; the message holds its name and CUDA's name of the error."""


class CudaOutOfMemory(CudaDriverError):
    """There is not enough physical memory."""


class _Location(Structure):
    """CUmemLocation."""

    _fields_ = (("type", c_int), ("id", c_int))


class _Flags(Structure):
    """The last member of CUmemAllocationProp."""

    _fields_ = (
        ("compression_type", c_ubyte),
        ("gpu_direct_rdma_capable", c_ubyte),
        ("usage", c_ushort),
        ("reserved", c_ubyte * 4),
    )


class _Properties(Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", c_int),
        ("requested_handle_types", c_int),
        ("location", _Location),
        ("win32_handle_meta_data", c_void_p),
        ("flags", _Flags),
    )


class _Access(Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", c_int))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuMemGetAllocationGranularity": (POINTER(c_size_t), POINTER(_Properties), c_int),
    "cuMemAddressReserve": (POINTER(c_uint64), c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemAddressFree": (c_uint64, c_size_t),
    "cuMemCreate": (POINTER(c_uint64), c_size_t, POINTER(_Properties), c_uint64),
    "cuMemRelease": (c_uint64,),
    "cuMemMap": (c_uint64, c_size_t, c_size_t, c_uint64, c_uint64),
    "cuMemUnmap": (c_uint64, c_size_t),
    "cuMemSetAccess": (c_uint64, c_size_t, POINTER(_Access), c_size_t),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


class CudaDriver:
    """The driver of one device, whose context has to exist. Every method raises CudaDriverError when its call fails."""

    def __init__(self, device: int, library: Any = None) -> None:
        """``library``: what has the driver's functions; default: the driver. Raises OSError if there is none."""
        self._device = device
        if library is None:
            library = ctypes.CDLL(_LIBRARY)
            for name, arguments in _SIGNATURES.items():
                getattr(library, name).argtypes = arguments
        self._library = library
        location = _Location(_DEVICE, device)
        self._properties = _Properties(type=_PINNED, location=location)
        self._access = _Access(location, _READ_WRITE)

    def supports_virtual_memory(self) -> bool:
        value = c_int()
        self._call("cuDeviceGetAttribute", byref(value), _VIRTUAL_MEMORY_SUPPORTED, self._device)
        return bool(value.value)

    def granularity(self) -> int:
        """Bytes that sizes of physical memory are multiples of."""
        size = c_size_t()
        self._call("cuMemGetAllocationGranularity", byref(size), byref(self._properties), 0)
        return size.value

    def reserve(self, num_bytes: int) -> int:
        """Addresses without memory; returns the first."""
        address = c_uint64()
        self._call("cuMemAddressReserve", byref(address), num_bytes, 0, 0, 0)
        return address.value

    def unreserve(self, address: int, num_bytes: int) -> None:
        self._call("cuMemAddressFree", address, num_bytes)

    def create(self, num_bytes: int) -> int:
        """Physical memory; returns its handle. Raises CudaOutOfMemory if there is too little."""
        handle = c_uint64()
        self._call("cuMemCreate", byref(handle), num_bytes, byref(self._properties), 0)
        return handle.value

    def release(self, handle: int) -> None:
        """Gives the handle back; the memory is free once it is mapped nowhere either."""
        self._call("cuMemRelease", handle)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Puts memory behind addresses, which may not be accessed yet."""
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def unmap(self, address: int, num_bytes: int) -> None:
        self._call("cuMemUnmap", address, num_bytes)

    def allow_access(self, address: int, num_bytes: int) -> None:
        """Lets the device read and write."""
        self._call("cuMemSetAccess", address, num_bytes, byref(self._access), 1)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            error = CudaOutOfMemory if code == _OUT_OF_MEMORY else CudaDriverError
            raise error(f"{name} on cuda:{self._device} failed with {self._error_name(code)} ({code})")

    def _error_name(self, code: int) -> str:
        name = c_char_p()
        self._library.cuGetErrorName(code, byref(name))
        return name.value.decode() if name.value else "an unknown error"
