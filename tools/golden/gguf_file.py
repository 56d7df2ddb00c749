"""A small GGUF file written by the `gguf` package of PyPI (made with gguf 0.19.0).

    python tools/golden/gguf_file.py tests/data/gguf/pypi.gguf
"""

import sys

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from gguf.quants import quantize

w = GGUFWriter(sys.argv[1], "mor")
w.add_uint8("t.u8", 200)
w.add_int8("t.i8", -100)
w.add_uint16("t.u16", 60000)
w.add_int16("t.i16", -30000)
w.add_uint32("t.u32", 4_000_000_000)
w.add_int32("t.i32", -2_000_000_000)
w.add_uint64("t.u64", 1 << 63)
w.add_int64("t.i64", -(1 << 62))
w.add_float32("t.f32", 0.5)
w.add_float64("t.f64", 0.1)
w.add_bool("t.bool", True)
w.add_string("t.string", "Grüße, 世界")
w.add_array("t.ints", [3, -1, 7])
w.add_array("t.floats", [0.5, -2.0])
w.add_array("t.bools", [True, False])
w.add_array("t.strings", ["a", "", "ß"])
w.add_custom_alignment(64)
w.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
w.add_tensor("f16", np.arange(5, dtype=np.float16))
w.add_tensor("q8", quantize(np.arange(64, dtype=np.float32).reshape(2, 32), T.Q8_0), raw_dtype=T.Q8_0)
w.add_tensor("q6k", np.zeros((1, 210), dtype=np.uint8), raw_dtype=T.Q6_K)
w.write_header_to_file()
w.write_kv_data_to_file()
w.write_tensors_to_file()
w.close()
