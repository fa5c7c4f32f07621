"""Rows of a table file as NumPy arrays, through the C library, with neither torch nor l3ext.

python numpy_without_torch.py libl3ext.so tables.safetensors
"""

import ctypes
import sys
from ctypes import POINTER, byref, c_int64, c_void_p

import numpy as np

if len(sys.argv) != 3:
    sys.exit(__doc__)
INT64, KEYS, VALUES = 7, 0, 1  # of l3ext.h
lib = ctypes.CDLL(sys.argv[1])
lib.l3ext_error_text.restype = ctypes.c_char_p
new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, (c_void_p, ctypes.c_char_p, c_void_p)


class View(ctypes.Structure):  # l3ext_view
    names = "keys values key_scales value_scales row_stride num_rows dtype d_in d_emb num_segments"
    _fields_ = [("struct_size", ctypes.c_size_t)]
    _fields_ += [(name, c_int64) for name in names.split()]
    _fields_ += [("tokens", POINTER(ctypes.c_int32)), ("segment_rows", POINTER(c_int64))]


class Rows:  # for np.from_dlpack of NumPy 2.1 or newer
    def __init__(self, step, layer, part):
        self.tensor = c_void_p()
        check(lib.l3ext_step_tensor(step, c_int64(layer), part, byref(self.tensor)))

    def __dlpack__(self, **_):
        return new_capsule(self.tensor, b"dltensor_versioned", None)

    def __dlpack_device__(self):
        return (1, 0)


def check(status):
    if status != 0:
        raise RuntimeError(lib.l3ext_error_text().decode())


tables, runtime, step, view = c_void_p(), c_void_p(), c_void_p(), View(ctypes.sizeof(View))
check(lib.l3ext_tables_open(sys.argv[2].encode(), 0, byref(tables)))
check(lib.l3ext_runtime_create(tables, None, byref(runtime)))
ids = np.array([3, 14, 15, 3], np.int64)
check(lib.l3ext_step_begin(runtime, c_void_p(ids.ctypes.data), INT64, c_int64(4), byref(step)))
check(lib.l3ext_step_wait(step, c_int64(0), None))
check(lib.l3ext_step_view(step, c_int64(0), byref(view)))
keys, values = (np.from_dlpack(Rows(step, 0, part)) for part in (KEYS, VALUES))
for i in range(view.num_segments):
    rows = slice(*view.segment_rows[2 * i : 2 * i + 2])
    weights = np.exp(keys[rows] @ np.ones(view.d_in))
    print(view.tokens[i], (weights / weights.sum() @ values[rows])[:4])
check(lib.l3ext_step_end(step, None))
check(lib.l3ext_runtime_close(runtime))
check(lib.l3ext_tables_close(tables))
