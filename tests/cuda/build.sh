#!/bin/sh
# Builds the fake libcuda.so.1, with the kernels for the emulated device in it.
#
#     tests/cuda/build.sh OUTDIR [flags of the compiler]
#
# MOR_KERNELS names the kernels' translation unit (src/cuda/kernels/mor.cu), CXX the compiler.
# -fsanitize=address,undefined works: the fibers tell the sanitizer when they switch. A program that
# loads such a library must be built with the sanitizer too, or be started with libasan preloaded.
# -DMOR_FAKE_WITHOUT=cuGraphAddNode_v2,cuGraphAddNode leaves functions out, as an older driver does.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
shift
kernels=${MOR_KERNELS:-$here/../../src/cuda/kernels/mor.cu}
cxx=${CXX:-g++}
mkdir -p "$out"

hidden=
for flag in "$@"; do
    case $flag in
    -fsanitize=*undefined*) set -- "$@" -fno-sanitize-recover=undefined ;;
    -DMOR_FAKE_WITHOUT=*) hidden="$hidden $(echo "${flag#*=}" | tr ',' ' ')" ;;
    esac
done
{
    echo "{ global: *;"
    [ -z "$hidden" ] || { echo "local:"; for name in $hidden; do echo "$name;"; done; }
    echo "};"
} >"$out/exports.map"

# No contraction: a*b + c is rounded twice on every machine, and fused where the kernel says so.
set -- -std=c++17 -O2 -g -fPIC -fvisibility=hidden -fno-gnu-unique -fno-strict-aliasing \
    -ffp-contract=off -Wall -Wextra -I"$here" "$@"
if [ "$(uname -m)" = x86_64 ] && grep -q f16c /proc/cpuinfo && grep -q fma /proc/cpuinfo; then
    set -- -mf16c -mfma "$@"
fi
objects=
jobs=
for source in fibers collectives driver driver_settings driver_memory driver_stream driver_graph; do
    "$cxx" "$@" -c "$here/$source.cpp" -o "$out/$source.o" &
    jobs="$jobs $!"
    objects="$objects $out/$source.o"
done
"$cxx" "$@" -fdata-sections -fstack-clash-protection -Wno-unknown-pragmas -DMOR_EMULATED \
    -x c++ -c "$kernels" -o "$out/kernels.o" &
jobs="$jobs $!"
for job in $jobs; do wait "$job"; done
# shellcheck disable=SC2086
"$cxx" -shared "$@" $objects "$out/kernels.o" -Wl,-soname,libcuda.so.1 -Wl,-z,defs \
    -Wl,--version-script="$out/exports.map" -Wl,-T,"$here/shared.ld" -ldl -lpthread \
    -o "$out/libcuda.so.1"
ln -sf libcuda.so.1 "$out/libcuda.so"
