#!/bin/sh
# On a machine with an NVIDIA GPU and its driver, from a fresh copy of this repository: all suites on the
# GPU, then the same under compute-sanitizer where it is installed, then figures.
#
#     tests/cuda/device.sh [OUTDIR]           OUTDIR gets the logs and bench.json
#
# MOR_CUDA_TESTS names a folder of test programs that were built elsewhere (tests/cuda/prebuild.sh); without
# it they are built here, which needs Rust.
set -eu
cd "$(dirname "$0")/../.."
out=${1:-target/device}
mkdir -p "$out"
export MOR_TEST_DEVICE=cuda
# Programs that were built elsewhere know that machine's folder only.
MOR_TEST_ROOT=$(pwd)
export MOR_TEST_ROOT
programs=${MOR_CUDA_TESTS:-}
if [ -z "$programs" ]; then
    programs=target/cuda-tests
    tests/cuda/prebuild.sh "$programs"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"

"$programs/steady_state" | tee "$out/steady_state.log"
for test in cuda reference session batch embedding; do
    echo "=== $test"
    # Two tests of sessions measure the memory and the threads of the CPU.
    "$programs/$test" --nocapture --skip a_session_takes_its_plan --skip locked_and_prefaulted \
        --skip the_plan_is_what >"$out/$test.log" 2>&1 || { tail -n 30 "$out/$test.log"; exit 1; }
    grep "test result" "$out/$test.log"
done

echo "=== two processes on one GPU"
"$programs/reference" >"$out/first.log" 2>&1 &
first=$!
"$programs/reference" >"$out/second.log" 2>&1 &
second=$!
ended() { # ended PROCESS LOG
    wait "$1" || { tail -n 30 "$2"; exit 1; }
    grep "test result" "$2"
}
ended "$first" "$out/first.log"
ended "$second" "$out/second.log"

sanitizer=$(command -v compute-sanitizer || echo "${MOR_COMPUTE_SANITIZER:-}")
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck initcheck synccheck; do
        echo "=== compute-sanitizer $tool"
        "$sanitizer" --tool "$tool" --error-exitcode 1 "$programs/reference" greedy \
            >"$out/$tool.log" 2>&1 || { tail -n 30 "$out/$tool.log"; exit 1; }
        tail -n 1 "$out/$tool.log"
    done
else
    echo "SKIPPED compute-sanitizer: not installed (MOR_COMPUTE_SANITIZER names it)"
fi

echo "=== figures"
mor=$programs/mor
for shape in smollm-360m smollm-360m-mor3; do
    for type in f16 q4_0; do
        file=$out/$shape-$type.gguf
        "$mor" synth --shape "$shape" --type "$type" -o "$file"
        "$mor" bench "$file" --device cuda -p 512 -n 128 -r 5 --json | tee "$out/bench-$shape-$type.json"
        "$mor" bench "$file" --device cuda -b 32,48 --json | tee "$out/batch-$shape-$type.json"
        rm "$file"
    done
done
