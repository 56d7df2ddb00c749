#!/usr/bin/env bash
# Everything about CUDA that can be shown without a GPU: the emulation's own tests, then the library's
# suites on the emulated device, in three orders of threads and on older drivers and devices.
#
#     tests/cuda/run.sh
#
# On a machine with a GPU: tests/cuda/device.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
target=$(mkdir -p "${CARGO_TARGET_DIR:-target}" && cd "${CARGO_TARGET_DIR:-target}" && pwd)
programs=$target/cuda-tests
export out=$target/cuda-run
rm -rf "$out"
mkdir "$out"

# The emulated device is one thread of one process; so jobs run side by side, each test in a process of its own.
# `job NAME COMMAND` puts one down, `run_jobs` runs all of them and stops at the first that fails.
jobs=()
job() {
    local name=$1
    shift
    jobs+=("$(printf '%q ' "$name" "$@")")
}
one() {
    local name log start=$SECONDS status=0
    eval "set -- $1"
    name=$1 log=$out/$1.log
    shift
    "$@" >"$log" 2>&1 || status=$?
    # One line or one log at a time, though several end together.
    if [[ $status == 0 ]]; then
        echo "ok  $name ($((SECONDS - start)) s)"
    else
        printf '%s\n' "$(cat "$log")" "FAILED ($status): $name"
        return 255
    fi
}
export -f one
run_jobs() {
    printf '%s\0' "${jobs[@]}" | xargs -0 -P "$(nproc)" -n 1 bash -o pipefail -c 'one "$1"' one
    jobs=()
}

job emulation tests/cuda/build.sh "$target/cuda"
job emulation-timeline tests/cuda/build.sh "$target/cuda-timeline" -DMOR_TIMELINE -O1
job selftest tests/cuda/selftest.sh "$target/cuda-selftest"
job programs tests/cuda/prebuild.sh "$programs" steady_state cuda reference session embedding out_of_memory batch
run_jobs
cat "$out/selftest.log"

export LD_LIBRARY_PATH=$target/cuda MOR_TEST_DEVICE=cuda MOR_TEST_FAKE_DRIVER=1

exactly() { # SETTINGS PROGRAM TEST: runs it, and sees that it ran
    env ${1:+"$1"} "$programs/$2" --exact "$3" --nocapture |
        awk '{print} /^test result: ok. 1 passed/ {ran = 1} END {exit !ran}'
}
export -f exactly
export programs

# on_emulated SETTINGS PROGRAM [WORDS]: a job for each test whose name has one of the words. A word that no name
# has would run nothing.
on_emulated() {
    local settings=$1 program=$2 word name
    shift 2
    for word in "${@:-}"; do
        "$programs/$program" --list | sed -n 's/: test$//p' | grep -F -e "$word" >"$out/names" ||
            { echo "tests/$program.rs has no test '$word'"; exit 1; }
        while read -r name; do
            job "$program-$name${settings:+-$settings}" exactly "$settings" "$program" "$name"
        done <"$out/names"
    done
}

# The longest first.
job steady_state env MOR_TEST_STEPS=1000 "$programs/steady_state"
on_emulated "" cuda
on_emulated "" reference
# What takes memory or threads of the CPU is for the CPU alone.
on_emulated "" session odd_shapes errors_lose_nothing a_step_without rewinding_and_going_on every_kv_type kv_memory cut_and_depth
on_emulated "" embedding a_restored_session states_that_do_not_fit a_cancel_ends a_time_budget
on_emulated "" out_of_memory on_a_gpu
on_emulated "" batch forks_ memory_follows what_goes_wrong who_ends what_can_never the_plan_answers a_tight_pool
# With one multiprocessor a block of a lone row's product takes as many tiles as it can.
on_emulated MOR_FAKE_CUDA_ATTRIBUTE="16=1" reference greedy
# A race shows when the threads of a block run in another order.
for order in reverse shuffled:7; do
    on_emulated MOR_EMULATED_ORDER=$order reference greedy
done
run_jobs
cat "$out"/cuda-*.log

# The kernels with marks, which measure where a launch's time goes (timeline.py), of which the numbers mean nothing here.
"$programs/mor" synth --shape tiny -o "$out/tiny.gguf"
MOR_CUDA_DRIVER=$target/cuda-timeline/libcuda.so.1 python3 tests/cuda/timeline.py run "$programs/timeline" \
    "$programs/mor" bench "$out/tiny.gguf" --device cuda -p 0 -n 8 -r 1 >"$out/table.txt"
cat "$out/table.txt"
grep -q "mor_lone_swiglu_f16 .*mor_lone_product_attention_f16" "$out/table.txt"
