#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its driver, from a fresh copy of this repository: all suites on the
# GPU, then figures, beside PyTorch where there is one, then suites under compute-sanitizer where it is installed.
#
#     tests/cuda/device.sh [OUTDIR]           OUTDIR gets the logs, the figures and ratios.md
#
# The models to measure take 6 GB in OUTDIR, or in the folder that MOR_CUDA_MODELS names, until the end.
# MOR_CUDA_TESTS names a folder of test programs that were built elsewhere (tests/cuda/prebuild.sh); without
# it they are built here, which needs Rust.
set -euo pipefail
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
mkdir -p "${MOR_CUDA_MODELS:-$out}"
models=$(mktemp -d "${MOR_CUDA_MODELS:-$out}/models.XXXXXX")

# Random models are made while the suites run: NAME TYPE and options.
synths=""
synth() {
    name=$1 type=$2
    shift 2
    "$mor" synth --shape "$name" --type "$type" "$@" -o "$models/$name-$type.gguf" >"$models/$name-$type.log" 2>&1 &
    synths="$synths $!"
}
processes=""
# shellcheck disable=SC2086
trap 'kill $synths $processes 2>/dev/null || true; rm -rf "$models"' EXIT
trap 'exit 130' INT TERM
synth smollm-1.7b f16 --layers 20
synth smollm-1.7b q4_0 --layers 20
synth smollm-360m f16
# What the paper's capacities (all, ..., one Nth of the tokens) let through on average.
synth smollm-360m-mor2 f16 --mean-depth 1.5
synth smollm-360m-mor3 f16 --mean-depth 2
synth smollm-360m-mor4 f16 --mean-depth 2.5

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/device.txt"

# Several programs at once, which also shows that processes share a GPU. `started NAME COMMAND` starts one with
# its log, `ended` waits for all of them; a suite of which nothing ran has failed.
names="" failed=""
started() {
    name=$1
    shift
    "$@" >"$out/$name.log" 2>&1 &
    names="$names $name" processes="$processes $!"
}
ended() {
    before=$failed
    # shellcheck disable=SC2086
    set -- $names
    for process in $processes; do
        if wait "$process" && ! grep -q "^test result: ok. 0 passed" "$out/$1.log"; then
            echo "ok      $1: $(grep -hE "test result|allocations|SUMMARY" "$out/$1.log" | tail -n 1 || true)"
        else
            tail -n 30 "$out/$1.log"
            echo "FAILED  $1"
            failed="$failed $1"
        fi
        shift
    done
    names="" processes=""
    [ "$failed" = "$before" ] || sound
}
sound() {
    [ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
}
# What measures may fail without keeping the rest from running; the script fails at its end.
missed() { # NAME LOG
    tail -n 30 "$2"
    echo "FAILED  $1"
    failed="$failed $1"
}

echo "=== suites"
started steady_state "$programs/steady_state"
# Some tests of sessions measure the memory and the threads of the CPU.
skipped="--skip a_session_takes_its_plan --skip locked_and_prefaulted --skip the_plan_is_what"
for test in cuda reference session batch embedding; do
    # shellcheck disable=SC2086
    started "$test" "$programs/$test" --nocapture $skipped
done
started reference_again "$programs/reference"
ended

echo "=== figures"
for synth in $synths; do
    wait "$synth" || { cat "$models"/*.log; exit 1; }
done
for model in smollm-1.7b-f16 smollm-1.7b-q4_0 smollm-360m-f16; do
    "$mor" bench "$models/$model.gguf" --device cuda -p 512 -n 128 --batch 64 -r 3 --json >"$out/bench-$model.json"
    "$mor" bench "$models/$model.gguf" --device cuda -p 512 -n 0 --batch 512 -r 3 --json >"$out/prompt-$model.json"
done
# The paper's numbers of places, each beside the vanilla model's.
for case in smollm-360m:32 smollm-360m-mor2:32,42 smollm-360m-mor3:32,48 smollm-360m-mor4:32,51; do
    model=${case%:*}-f16
    "$mor" bench "$models/$model.gguf" --device cuda -b "${case#*:}" --json >"$out/batch-$model.json"
done
# When the blocks of each kernel do what, where there are kernels with marks for the device.
if [ -d "$programs/timeline" ] && nvidia-smi --query-gpu=compute_cap --format=csv,noheader | grep '^9\.0' >/dev/null; then
    timeline() {
        name=$1 model=$2
        shift 2
        python3 tests/cuda/timeline.py run "$programs/timeline" \
            "$mor" bench "$models/$model.gguf" --device cuda "$@" >"$out/timeline-$name.txt" 2>&1 ||
            missed "timeline-$name" "$out/timeline-$name.txt"
    }
    for model in smollm-1.7b-f16 smollm-1.7b-q4_0 smollm-360m-f16; do
        timeline "$model" "$model" -p 0 -n 32 -r 1
    done
    timeline many smollm-360m-mor4-f16 -b 51
fi
if python3 -c "import torch" 2>/dev/null; then
    # MOR_CUDA_PEERS: fewer parts and limits, where time is short.
    # shellcheck disable=SC2086
    python3 benches/peers_cuda.py ${MOR_CUDA_PEERS:-} --json "$out/peers.json" 2>"$out/peers.log" ||
        missed peers "$out/peers.log"
else
    echo "SKIPPED PyTorch: python3 has no torch"
fi
if command -v python3 >/dev/null; then
    python3 benches/ratios_cuda.py "$out" | tee "$out/ratios.md"
fi

sanitizer=$(command -v compute-sanitizer || echo "${MOR_COMPUTE_SANITIZER:-}")
if [ -n "$sanitizer" ]; then
    echo "=== compute-sanitizer"
    # Alone: beside five other programs under the tool it once found reads out of bounds that were none.
    started memcheck "$sanitizer" --tool memcheck --error-exitcode 1 "$programs/reference" greedy
    ended
    for tool in initcheck synccheck; do
        started "$tool" "$sanitizer" --tool "$tool" --error-exitcode 1 "$programs/reference" greedy
    done
    # racecheck (2025.3) crashes in graphs that have conditional nodes, as those of sessions, and in programs
    # with two threads. Batches run the same kernels without.
    started racecheck env RUST_TEST_THREADS=1 "$sanitizer" --tool racecheck --error-exitcode 1 \
        "$programs/batch" forks_share
    # Kernels for prompts.
    for type in f16 q4_0; do
        started "prompts_$type" "$sanitizer" --tool memcheck --error-exitcode 1 \
            "$mor" bench "$models/smollm-1.7b-$type.gguf" --device cuda -p 200 -n 0 --batch 200 -r 1
    done
    ended
else
    echo "SKIPPED compute-sanitizer: not installed (MOR_COMPUTE_SANITIZER names it)"
fi
sound
