"""The CUDA driver, as far as a collective of one's own needs it: memory that other processes can open, and launches.

By ctypes, as the probe calls the runtime: a launch is a call of every site, and costs two microseconds this way. No
function that has to do with multicast is named here.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, Union, byref, c_char, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any

import torch

from ..errors import WorkspaceError

_LIBRARY = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS = 1
_RELAXED = 2
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class MemoryHandle(Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("reserved", c_char * 64),)


class _Value(Union):
    _fields_ = (("pad", c_char * 64), ("number", c_int))


class _Attribute(Structure):
    """``CUlaunchAttribute``: its value begins at the eighth byte."""

    _fields_ = (("id", c_int), ("pad", c_char * 4), ("value", _Value))


class LaunchConfig(Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        *((f"{of}_{axis}", c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("attribute_count", c_uint),
    )


class Driver:
    """The driver of this process. Raises :class:`WorkspaceError` where there is none, and for every call that fails."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise WorkspaceError(f"the CUDA driver cannot be loaded: {error}") from error
        attribute = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value.number = 1
        self._attribute = attribute

    def allocate(self, size: int) -> int:
        """The address of ``size`` bytes of the current device, all 0."""
        address = c_ulonglong()
        self._call("cuMemAlloc_v2", byref(address), c_size_t(size))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(0), c_size_t(size))
        self._call("cuCtxSynchronize")
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", c_ulonglong(address))

    def handle(self, address: int) -> bytes:
        """What another process opens the memory of :meth:`allocate` with."""
        found = MemoryHandle()
        self._call("cuIpcGetMemHandle", byref(found), c_ulonglong(address))
        return bytes(found)

    def open(self, handle: bytes) -> int:
        """The address, in this process, of another's memory."""
        address = c_ulonglong()
        given = MemoryHandle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", byref(address), given, c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        """Of :meth:`open`."""
        self._call("cuIpcCloseMemHandle", c_ulonglong(address))

    def load(self, cubin: bytes) -> c_void_p:
        """Instructions, in the current context. Also while a stream of this thread is captured."""
        module, mode = c_void_p(), c_int(_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        try:
            self._call("cuModuleLoadData", byref(module), cubin)
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", byref(mode))
        return module

    def unload(self, module: c_void_p) -> None:
        """Of :meth:`load`."""
        self._call("cuModuleUnload", module)

    def function(self, module: c_void_p, name: str) -> c_void_p:
        function = c_void_p()
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        if hasattr(self._library, "cuFuncLoad"):  # now, and not at a launch beside kernels that wait for a peer
            self._call("cuFuncLoad", function)
        return function

    def launch(
        self, function: c_void_p, blocks: int, threads: int, argument: Structure, stream: int, *, dependent: bool
    ) -> None:
        """Launch a kernel of one argument. dependent: it may begin before the kernel before it ends (PDL)."""
        config = LaunchConfig(blocks, 1, 1, threads, 1, 1, 0, stream)
        if dependent:
            config.attributes, config.attribute_count = ctypes.pointer(self._attribute), 1
        arguments = (c_void_p * 1)(ctypes.addressof(argument))
        self._call("cuLaunchKernelEx", byref(config), function, arguments, None)

    def _call(self, name: str, *arguments: Any) -> None:
        code = int(getattr(self._library, name)(*arguments))
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(c_int(code), byref(text))
            raise WorkspaceError(f"{name} failed: CUDA error {code}, {(text.value or b'unknown').decode()}")


def current_stream(device: int) -> int:
    """The address of the stream that torch launches on."""
    return int(torch.cuda.current_stream(device).cuda_stream)
