#!/bin/sh
# On a machine with an NVIDIA GPU and its driver, from a fresh copy of this repository: all suites on the
# GPU, then the same under compute-sanitizer where it is installed, then figures, beside PyTorch where there is
# one.
#
#     tests/cuda/device.sh [OUTDIR]           OUTDIR gets the logs, the figures and ratios.md
#
# The models to measure take 6 GB in OUTDIR (MOR_CUDA_MODELS names another folder) until the end.
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
mor=$programs/mor
models=${MOR_CUDA_MODELS:-$out/models}
mkdir -p "$models"

# Random models are made while the suites run: NAME TYPE and options.
synths=""
synth() {
    name=$1 type=$2
    shift 2
    "$mor" synth --shape "$name" --type "$type" "$@" -o "$models/$name-$type.gguf" >"$models/$name-$type.log" 2>&1 &
    synths="$synths $!"
}
trap 'kill $synths 2>/dev/null || true; rm -rf "$models"' EXIT
synth smollm-1.7b f16 --layers 20
synth smollm-1.7b q4_0 --layers 20
synth smollm-360m f16
# What the paper's capacities (all, ..., one Nth of the tokens) let through in mean.
synth smollm-360m-mor2 f16 --mean-depth 1.5
synth smollm-360m-mor3 f16 --mean-depth 2
synth smollm-360m-mor4 f16 --mean-depth 2.5

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
for synth in $synths; do
    wait "$synth" || { cat "$models"/*.log; exit 1; }
done
for model in smollm-1.7b-f16 smollm-1.7b-q4_0 smollm-360m-f16; do
    "$mor" bench "$models/$model.gguf" --device cuda -p 512 -n 128 -r 5 --json >"$out/bench-$model.json"
    "$mor" bench "$models/$model.gguf" --device cuda -p 512 -n 0 --batch 512 -r 5 --json >"$out/prompt-$model.json"
done
# The paper's numbers of places, each beside the vanilla model's.
for case in smollm-360m:32 smollm-360m-mor2:32,42 smollm-360m-mor3:32,48 smollm-360m-mor4:32,51; do
    model=${case%:*}-f16
    "$mor" bench "$models/$model.gguf" --device cuda -b "${case#*:}" --json >"$out/batch-$model.json"
done
if python3 -c "import torch" 2>/dev/null; then
    python3 benches/peers_cuda.py --json "$out/peers.json" 2>"$out/peers.log" || tail -n 30 "$out/peers.log"
else
    echo "SKIPPED PyTorch: python3 has no torch"
fi
if command -v python3 >/dev/null; then
    python3 benches/ratios_cuda.py "$out" | tee "$out/ratios.md"
fi
