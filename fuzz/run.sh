#!/usr/bin/env bash
# Coverage-guided fuzzing of what comes from outside, with AddressSanitizer and overflow checks.
#
#     fuzz/run.sh TARGET SECONDS
#
# TARGET: file (a model's head), state, template, text, or a part of a checkpoint: config, yaml, safetensors, tokenizer,
# torch, pickle (the one within torch's zip). What is found lies in fuzz/artifacts; `fuzz/run.sh TARGET FILE` runs it
# again. libFuzzer comes with the crate libfuzzer-sys and is built by a C++ compiler.
set -euo pipefail
target=${1:?which target} seconds=${2:?how many seconds, or which file}
root=$(cd "$(dirname "$0")/.." && pwd)
[[ -f $seconds ]] && seconds=$(realpath "$seconds")
cd "$root/fuzz"
# What cargo-fuzz sets; unstable options, which the variable allows to every compiler.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions=on -Coverflow-checks=on -Zsanitizer=address"
host=$(rustc -vV | sed -n 's/^host: //p')
[[ -d seeds ]] || (unset RUSTFLAGS && cargo run --release --bin seeds)
program=$target most=32768
case $target in
    config) file=config.json ;;
    yaml) file=mor.yaml ;;
    safetensors) file=model.safetensors ;;
    tokenizer) file=tokenizer.json ;;
    torch) file=pytorch_model.bin ;;
    pickle) file=data.pkl ;;
    *) file= ;;
esac
[[ $target != text ]] || most=1024
if [[ -n $file ]]; then
    program=checkpoint
    checkpoint=$root/tests/cases/expert_cycle
    [[ $target != torch && $target != pickle ]] || checkpoint=$root/tests/data/convert/bin
    MOR_FUZZ_FOLDER=$(mktemp -d)
    trap 'rm -rf "$MOR_FUZZ_FOLDER"' EXIT
    cp "$checkpoint"/* "$MOR_FUZZ_FOLDER"
    export MOR_FUZZ_FILE=$file MOR_FUZZ_FOLDER
fi
cargo build --release --target "$host" --bin "$program"
mkdir -p "corpus/$target" artifacts
# Jinja and the tokenizers' data live as long as the process.
export ASAN_OPTIONS=detect_leaks=0
run=("target/$host/release/$program" -timeout=20 -rss_limit_mb=4000 -malloc_limit_mb=256 "-artifact_prefix=artifacts/$target-")
if [[ -f $seconds ]]; then
    "${run[@]}" "$seconds"
else
    "${run[@]}" "-max_len=$most" -print_final_stats=1 "-max_total_time=$seconds" "corpus/$target" "seeds/$target"
fi
