"""Arrays that claim to lie on a device: what a binding says of them needs no device."""

from __future__ import annotations

import ctypes

CPU, CUDA, CUDA_HOST, OPENCL = 1, 2, 3, 4  # device types of DLPack


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int),
        ("device_id", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class Claimed:
    """An array that claims to lie on a device. To read its address would end the process."""

    def __init__(self, array, device=(CUDA, 0), data=16):
        self.device = device
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        code = {"i": 0, "u": 1, "f": 2}[array.dtype.kind]
        self.managed = _Managed(
            _Tensor(data, *device, array.ndim, code, 8 * array.itemsize, 1, self.shape, None, 0)
        )
        self.options = None

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        self.options = options
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = (
            ctypes.py_object,
            [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
        )
        return make(ctypes.addressof(self.managed), b"dltensor", None)
