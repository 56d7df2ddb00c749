#!/bin/sh
# Builds and runs the tests of the emulation itself: under four orders, and with sanitizers.
#     tests/cuda/selftest.sh OUTDIR
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1

# build DIRECTORY [flags]
build() {
    directory=$1
    shift
    MOR_KERNELS="$here/selftest_kernels.cu" sh "$here/build.sh" "$directory" "$@"
    "${CXX:-g++}" -std=c++17 -O1 -g -Wall -Wextra "$@" -I"$here" "$here/selftest.cpp" \
        "$here/selftest_driver.cpp" "$here/selftest_graph.cpp" -L"$directory" -l:libcuda.so.1 \
        -Wl,-rpath,"$directory" -lpthread -o "$directory/selftest"
}

# run DIRECTORY ORDER
run() {
    if ! MOR_EMULATED_ORDER=$2 "$1/selftest" >"$1/stdout" 2>"$1/stderr"; then
        tail -n 40 "$1/stdout" "$1/stderr"
        exit 1
    fi
    echo "$(grep -c '^ok: ' "$1/stdout") tests, order $2, in $1"
}

build "$out"
for order in forward reverse shuffled:1 shuffled:2; do run "$out" $order; done
build "$out/sanitized" -fsanitize=address,undefined
for order in forward shuffled:3; do run "$out/sanitized" $order; done

# A function that is left out is not there for the dynamic linker, as with an older driver.
MOR_KERNELS="$here/selftest_kernels.cu" sh "$here/build.sh" "$out/without" \
    -DMOR_FAKE_WITHOUT=cuGraphAddNode_v2
if nm -D --defined-only "$out/without/libcuda.so.1" | grep -q ' cuGraphAddNode_v2$'; then
    echo "cuGraphAddNode_v2 is still there"
    exit 1
fi
nm -D --defined-only "$out/without/libcuda.so.1" | grep -q ' cuGraphAddNode$'
