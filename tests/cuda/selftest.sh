#!/bin/sh
# Builds and runs the tests of the emulation itself.
#     tests/cuda/selftest.sh OUTDIR
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
MOR_KERNELS="$here/selftest_kernels.cu" sh "$here/build.sh" "$out"
"${CXX:-g++}" -std=c++17 -O1 -g -Wall -Wextra -Wno-missing-field-initializers -I"$here" "$here/selftest.cpp" -o "$out/selftest" \
    -L"$out" -l:libcuda.so.1 -Wl,-rpath,"$out"
for order in forward reverse shuffled:1 shuffled:2; do
    echo "order $order"
    MOR_EMULATED_ORDER=$order "$out/selftest" 2>"$out/stderr" || { cat "$out/stderr"; exit 1; }
done
