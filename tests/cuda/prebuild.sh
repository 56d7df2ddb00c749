#!/bin/sh
# Builds the test programs, the tool and the kernels with marks for tests/cuda/device.sh, to be carried to a machine
# without Rust.
#
#     tests/cuda/prebuild.sh OUTDIR [TEST...]
set -eu
cd "$(dirname "$0")/../.."
out=$1
shift
[ $# -gt 0 ] || set -- steady_state cuda reference session batch embedding
mkdir -p "$out"
cargo build --release --features cuda
cp "${CARGO_TARGET_DIR:-target}/release/mor" "$out/mor"
for test; do
    report=$(cargo test --release --features cuda --test "$test" --no-run --message-format short 2>&1) ||
        { echo "$report"; exit 1; }
    cp "$(echo "$report" | sed -n 's/.*Executable .*(\(.*\))$/\1/p')" "$out/$test"
done
python3 tests/cuda/timeline.py build "$out/timeline"
