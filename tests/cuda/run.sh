#!/bin/sh
# Everything about CUDA that can be shown without a GPU: the emulation's own tests, then the library's
# suites on the emulated device, in two orders of threads and on older drivers and devices.
#
#     tests/cuda/run.sh
#
# On a machine with a GPU: tests/cuda/device.sh.
set -eu
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
tests/cuda/selftest.sh "$target/cuda-selftest"
tests/cuda/build.sh "$target/cuda"
libraries=$(cd "$target/cuda" && pwd)

on_emulated() { # on_emulated TEST [ARGUMENTS]
    test=$1
    shift
    # A name that nothing has would run nothing.
    for name; do
        case $name in --*) continue ;; esac
        cargo test --quiet --release --features cuda --test "$test" -- --list "$name" | grep ': test$' >/dev/null ||
            { echo "tests/$test.rs has no test '$name'"; exit 1; }
    done
    LD_LIBRARY_PATH=$libraries MOR_TEST_DEVICE=cuda MOR_TEST_FAKE_DRIVER=1 \
        cargo test --release --features cuda --test "$test" -- "$@"
}

on_emulated cuda --nocapture
on_emulated reference
# What takes memory or threads of the CPU is for the CPU alone.
on_emulated session errors_lose_nothing a_step_without rewinding_and_going_on every_kv_type kv_memory cut_and_depth
on_emulated embedding a_restored_session states_that_do_not_fit a_cancel_ends a_time_budget
on_emulated out_of_memory on_a_gpu
on_emulated batch forks_ memory_follows what_goes_wrong who_ends what_can_never the_plan_answers a_tight_pool
MOR_TEST_STEPS=1000 on_emulated steady_state
# With one multiprocessor a block of a lone row's product takes as many tiles as it can.
MOR_FAKE_CUDA_ATTRIBUTE="16=1" on_emulated reference greedy
# A race shows when the threads of a block run in another order.
for order in reverse shuffled:7; do
    MOR_EMULATED_ORDER=$order on_emulated reference greedy
done
# The kernels with marks, which measure where a launch's time goes (timeline.py), of which the numbers mean nothing here.
tests/cuda/build.sh "$target/cuda-timeline" -DMOR_TIMELINE
python3 tests/cuda/timeline.py build "$target/timeline"
cargo run --release --features cuda -- synth --shape tiny -o "$target/timeline/tiny.gguf"
MOR_CUDA_DRIVER=$target/cuda-timeline/libcuda.so.1 python3 tests/cuda/timeline.py run "$target/timeline" \
    "$target/release/mor" bench "$target/timeline/tiny.gguf" --device cuda -p 0 -n 8 -r 1 >"$target/timeline/table.txt"
cat "$target/timeline/table.txt"
grep -q "mor_lone_swiglu_f16 .*mor_lone_product_attention_f16" "$target/timeline/table.txt"
