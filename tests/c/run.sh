#!/usr/bin/env bash
# The C and C++ interface, seen from outside: built, installed, used, abused. Each part prints a line
# that says what it showed; anything missing on the machine is a failure.
#
#   tests/c/run.sh [BUILD_DIR]      BUILD_DIR: kept, so that the next run builds less
#
# Debian packages: cmake gcc g++ make pkg-config valgrind; and Rust.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
tests=$root/tests/c
examples=$root/examples
model=$root/models/austen-mor-5m-q8_0.gguf
if [[ $# -gt 0 ]]; then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
prefix=$work/prefix
out=$work/out
mkdir -p "$out"
# The library is told where to be built; a target folder of the caller's would only be in the way.
unset CARGO_TARGET_DIR CARGO_BUILD_TARGET_DIR
export CARGO_TERM_COLOR=never
results=()
failed=0
exec 3>&1

say() { echo "$*" >&3; }

# Succeeds when a command ends with this status: a crash is no refusal, and `!` alone would not end a part.
fails() { # STATUS COMMAND
    local wanted=$1 status=0
    shift
    "$@" || status=$?
    [[ $status == "$wanted" ]]
}

part() { # part NAME FUNCTION: its output is shown when it fails
    local start=$SECONDS code
    (set -e; "$2") >"$work/log" 2>&1
    code=$?
    if [[ $code == 0 ]]; then
        results+=("ok      $1 ($((SECONDS - start)) s)")
    else
        results+=("FAILED  $1 ($((SECONDS - start)) s)")
        failed=1
        tail -n 60 "$work/log"
        echo "FAILED: $1"
    fi
}

tools() {
    local tool
    for tool in cargo rustc cmake gcc g++ make pkg-config valgrind nm readelf; do
        command -v "$tool" || { echo "$tool is missing"; return 1; }
    done
    [[ -s $model ]]
}

# --- What the examples print. ---------------------------------------------------------------------

expect_generate() { # FILE
    grep -q '^It is a truth' "$1"
    grep -q '^finish: length, after [0-9]* tokens' "$1"
    grep -q '^tokens by depth:  0: [0-9]*  1: [0-9]*  2: [0-9]*  3: [0-9]*$' "$1"
    grep -q '^plan: [0-9]* bytes' "$1"
}
expect_generate_cpp() { # FILE
    grep -q '^It is a truth' "$1"
    grep -q '^tokens by depth:  0: [0-9]*  1: [0-9]*' "$1"
}
expect_batch() { # FILE
    grep -q '^It is a truth' "$1"
    grep -q '^She was' "$1"
    (($(grep -c '^\[[1-9][0-9]* tokens, mean depth [0-3]\.[0-9]*\]$' "$1") == 2))
    grep -q '^[1-9][0-9]* passes over the weights for [1-9][0-9]* tokens' "$1"
}
expect_chat() { # FILE OF ANSWERS, FILE OF WHAT WAS RUN: the second turn runs what is new
    (($(wc -l <"$1") >= 2))
    grep -q '^\[5 of 5 tokens run\]$' "$2"
    (($(sed -nE 's/^\[([0-9]*) of [0-9]*[0-9][0-9] tokens run\]$/\1/p' "$2") < 20))
}
expect_embedded() { # FILE
    grep -q '^plan: [0-9]* bytes aligned to [0-9]*' "$1"
    grep -q '^It is a truth' "$1"
    grep -q '^worst step of 64: [0-9]* us' "$1"
}
expect_cancel() { # FILE
    grep -q '^prefill: cancelled .* 0 tokens kept$' "$1"
    grep -qE '^generate: (cancelled|ended by itself)' "$1"
    grep -q '^reset: ' "$1"
}

run_examples() { # FOLDER SUFFIX [COMMAND...]: all three, under a command
    local folder=$1 suffix=$2 threads
    shift 2
    for threads in 1 2; do
        "$@" "$folder/generate$suffix" "$model" "It is a truth" $threads 12 >"$out/generate"
        expect_generate "$out/generate"
        "$@" "$folder/cancel$suffix" "$model" $threads >"$out/cancel"
        expect_cancel "$out/cancel"
    done
    "$@" "$folder/embedded$suffix" "$model" >"$out/embedded"
    expect_embedded "$out/embedded"
}

c_flags=(-std=c99 -pedantic -Wall -Wextra -Werror -D_POSIX_C_SOURCE=200809L)
cpp_flags=(-Wall -Wextra -Wpedantic -Werror)

# --- The parts. -----------------------------------------------------------------------------------

# The commands of docs/install.md, as they stand there.
install_it() {
    rm -rf "$prefix"
    cd "$root"
    awk '/^```sh$/ {on = 1; next} /^```$/ {if (on) exit} on' docs/install.md >"$work/install.sh"
    grep -q 'cmake --install' "$work/install.sh"
    sed -i -E "s#-B build#-B '$work/build'#; s#cmake --(build|install) build#cmake --\1 '$work/build'#" \
        "$work/install.sh"
    PREFIX=$prefix bash -e "$work/install.sh"
    # Found from where it lies: so it may be elsewhere afterwards.
    rm -rf "$work/moved"
    mv "$prefix" "$work/moved"
    prefix=$work/moved
    local file
    for file in include/mor.h include/mor.hpp lib/libmor.a lib/libmor.so lib/libmor.so.0.1 \
        lib/pkgconfig/mor.pc lib/cmake/mor/morConfig.cmake; do
        [[ -e $prefix/$file ]]
    done
    cmp include/mor.h "$prefix/include/mor.h"
    readelf -d "$prefix/lib/libmor.so" | grep 'soname: \[libmor.so.0.1\]'
    readelf -d "$prefix/lib/libmor.so" | fails 1 grep -E 'RPATH|RUNPATH'
    fails 1 grep -rIl "$work" "$prefix" # no text file has a path of the machine that built it
    # What the static library is linked with is what the compiler says.
    local wanted
    wanted=$(: | rustc --crate-type staticlib --print native-static-libs -o "$out/empty.a" - 2>&1 |
        sed -n 's/.*native-static-libs: //p')
    grep -q "^Libs.private: $wanted\$" "$prefix/lib/pkgconfig/mor.pc"
    say "installed into an empty prefix by the documented commands, then moved: complete, no path of this machine in its text files"
}

library_size() {
    local bytes
    bytes=$(stat -c %s "$(readlink -f "$prefix/lib/libmor.so")")
    echo "libmor.so has $bytes bytes"
    ((bytes < 2 * 1024 * 1024))
    say "libmor.so, stripped, with chat templates: $bytes bytes, below 2 MiB"
}

header_alone() {
    local standard
    for standard in c99 c11 c17; do
        gcc -std=$standard -pedantic -Wall -Wextra -Werror -Wstrict-prototypes -Wconversion \
            -fsyntax-only -x c "$prefix/include/mor.h"
    done
    for standard in c++17 c++20; do
        g++ -std=$standard "${cpp_flags[@]}" -Wconversion -fsyntax-only -x c++ "$prefix/include/mor.h"
        g++ -std=$standard "${cpp_flags[@]}" -Wconversion -Wshadow -fsyntax-only -x c++ \
            "$prefix/include/mor.hpp"
    done
    say "mor.h compiles alone as C99, C11, C17, C++17 and C++20, mor.hpp as C++17 and C++20, without a warning"
}

symbols() {
    grep -vE '^typedef|^ ?\*|^/\*' "$root/include/mor.h" | grep -oE '\bmor_[a-z0-9_]+\(' | tr -d '(' |
        sort -u >"$out/declared"
    nm -D --defined-only "$prefix/lib/libmor.so" | awk '{print $3}' | sort -u >"$out/exported"
    diff "$out/declared" "$out/exported"
    fails 1 grep -v '^mor_' "$out/exported"
    # Nothing was forgotten in the test of abuse.
    local name
    while read -r name; do
        grep -q "\\b${name}\\b" "$tests/abuse.c" || [[ $name == *_params_init ]] ||
            { echo "abuse.c leaves out $name"; return 1; }
    done <"$out/exported"
    say "the shared library exports exactly the $(wc -l <"$out/exported") functions of mor.h"
}

with_pkg_config() {
    export PKG_CONFIG_PATH=$prefix/lib/pkgconfig
    local example kind standard mode
    for kind in shared static; do
        mkdir -p "$out/$kind"
        local package=mor
        [[ $kind == shared ]] || package=mor-static
        for example in generate embedded cancel; do
            gcc "${c_flags[@]}" -O2 -g "$examples/c/$example.c" $(pkg-config --cflags --libs $package) \
                -lpthread -o "$out/$kind/$example"
        done
    done
    readelf -d "$out/static/generate" | fails 1 grep libmor
    export LD_LIBRARY_PATH=$prefix/lib
    run_examples "$out/shared" ""
    local delay
    delay=$(sed -n 's/.*back \([0-9]* us\) later, .*/\1/p' "$out/cancel")
    unset LD_LIBRARY_PATH
    run_examples "$out/static" ""
    say "C examples, by pkg-config, shared and static: run, 1 and 2 threads; prefill back $delay after a cancel"

    export LD_LIBRARY_PATH=$prefix/lib
    for standard in c++17 c++20; do
        for mode in "" -fno-exceptions -DMOR_NO_EXCEPTIONS; do
            g++ -std=$standard $mode "${cpp_flags[@]}" "$examples/cpp/generate.cpp" \
                $(pkg-config --cflags --libs mor) -o "$out/generate_cpp"
            "$out/generate_cpp" "$model" "It is a truth" >"$out/generate"
            expect_generate_cpp "$out/generate"
            fails 1 "$out/generate_cpp" /nowhere "It is a truth"
            g++ -std=$standard $mode "${cpp_flags[@]}" "$tests/bindings.cpp" \
                $(pkg-config --cflags --libs mor) -o "$out/bindings"
            "$out/bindings" "$model"
        done
        g++ -std=$standard "${cpp_flags[@]}" "$examples/cpp/batch.cpp" \
            $(pkg-config --cflags --libs mor) -o "$out/batch_cpp"
        "$out/batch_cpp" "$model" "It is a truth" "She was" >"$out/batch"
        expect_batch "$out/batch"
        fails 1 "$out/batch_cpp" /nowhere "It is a truth"
        g++ -std=$standard "${cpp_flags[@]}" "$examples/cpp/chat.cpp" \
            $(pkg-config --cflags --libs mor) -o "$out/chat_cpp"
        printf 'It is a truth\n She was\n' | "$out/chat_cpp" "$model" >"$out/chat" 2>"$out/chat_run"
        expect_chat "$out/chat" "$out/chat_run"
        fails 1 "$out/chat_cpp" /nowhere </dev/null
    done
    say "mor.hpp: its examples and its test, C++17 and C++20, with exceptions and without: run"
}

with_cmake() {
    rm -rf "$out/package" "$out/part"
    cmake -S "$tests/package" -B "$out/package" -DCMAKE_PREFIX_PATH="$prefix" -DEXAMPLES="$examples"
    cmake --build "$out/package"
    run_examples "$out/package" _mor
    run_examples "$out/package" _mor_static
    # As a part of another project; what cargo has built already is taken from there.
    mkdir -p "$out/part/mor"
    cp -a "$work/build/cargo" "$out/part/mor/cargo"
    cmake -S "$tests/package" -B "$out/part" -DMOR_SOURCE="$root" -DEXAMPLES="$examples"
    cmake --build "$out/part"
    run_examples "$out/part" _mor
    "$out/part/generate_cpp_mor_static" "$model" "It is a truth" >"$out/generate"
    expect_generate_cpp "$out/generate"
    "$out/part/batch_cpp_mor" "$model" "It is a truth" "She was" >"$out/batch"
    expect_batch "$out/batch"
    rm -rf "$out/part"
    say "a project with find_package(mor), and one with add_subdirectory: shared and static, C and C++: run"
}

# The tables of tests/calls, which other languages run too.
calls() {
    local flags=(-I"$prefix/include" -L"$prefix/lib" -Wl,-rpath,"$prefix/lib" -g -O1) runner threads
    gcc "${c_flags[@]}" "$tests/calls.c" "${flags[@]}" -lmor -o "$out/calls"
    g++ -std=c++17 "${cpp_flags[@]}" "$tests/calls.cpp" "${flags[@]}" -lmor -o "$out/calls_cpp"
    local tables=("$root/tests/calls/austen.tsv $model")
    [[ -z ${MOR_TEST_SMOLLM2:-} ]] || tables+=("$root/tests/calls/smollm2.tsv $MOR_TEST_SMOLLM2")
    for runner in calls calls_cpp; do
        for threads in 1 2; do
            local table
            for table in "${tables[@]}"; do
                # shellcheck disable=SC2086 # a table and its model
                "$out/$runner" $table "$root" $threads | tee -a "$out/called"
            done
        done
    done
    # A runner that finds nothing wrong anywhere would be worth nothing.
    sed 's/which I am/which I was/' "$root/tests/calls/austen.tsv" >"$out/false.tsv"
    for runner in calls calls_cpp; do
        fails 1 "$out/$runner" "$out/false.tsv" "$model" "$root" 1
    done
    say "tests/calls in C and C++, 1 and 2 threads, ${#tables[@]} of 2 tables: $(tail -n 1 "$out/called")"
}

build_tests() {
    gcc -std=c11 -g -O1 -Wall -Wextra -Werror -D_POSIX_C_SOURCE=200809L -I"$prefix/include" "$tests/abuse.c" \
        -L"$prefix/lib" -Wl,-rpath,"$prefix/lib" -lmor -lm -lpthread -o "$out/abuse"
    gcc -std=c11 -g -O1 -Wall -Wextra -Werror -D_POSIX_C_SOURCE=200809L -I"$prefix/include" \
        "$tests/cycles.c" -L"$prefix/lib" -Wl,-rpath,"$prefix/lib" -lmor -lpthread -o "$out/cycles"
    local name
    for name in malloc_counter fail_nth; do
        gcc -shared -fPIC -O1 -D_GNU_SOURCE -Wall -Wextra -Werror -I"$prefix/include" \
            "$tests/$name.c" -ldl -o "$out/$name.so"
    done
    gcc -std=c11 -D_GNU_SOURCE -Wall -Wextra -Werror -I"$prefix/include" "$tests/out_of_memory.c" \
        "$out/fail_nth.so" -L"$prefix/lib" -lmor -Wl,-rpath,"$prefix/lib" -Wl,-rpath,"$out" \
        -o "$out/out_of_memory"
    gcc -O1 -Wall -Wextra -Werror "$tests/peak.c" -o "$out/peak"
}

no_allocation() {
    export LD_LIBRARY_PATH=$prefix/lib
    local command
    for command in "generate $model Hello 1 200" "generate $model Hello 2 200" "embedded $model" \
        "cancel $model 1" "cancel $model 2"; do
        # A preloaded library that cannot be loaded is passed over: so its line must be there.
        LD_PRELOAD=$out/malloc_counter.so "$out/shared/"$command 2>"$out/counted" >"$out/printed"
        cat "$out/counted"
        grep -q 'malloc_counter: [1-9][0-9]* taken before, 0 taken and 0 given back during' "$out/counted"
    done
    say "no memory taken or given back while a session lives: generate (1, 2 threads), embedded, cancel (1, 2 threads)"
}

out_of_memory() {
    RUST_BACKTRACE=0 LD_PRELOAD=$out/fail_nth.so "$out/out_of_memory" "$model" | tee "$out/refused"
    say "$(awk '/requests refused/ {for (i = 1; i < NF; i++) if ($(i + 1) == "requests") sum += $i} END {print sum}' \
        "$out/refused") requests for memory and threads refused one by one: each MOR_ERROR_OUT_OF_MEMORY, no leak, and the next attempt works"
}

abuse() {
    "$out/abuse" "$model" | tee "$out/abused"
    say "$(tail -n 1 "$out/abused")"
}

# What the process needs besides: the C library and this program (about 2 MiB), the pages of
# libmor.so that ran, and the tables of the model and its tokenizer on the heap.
peak_constant=$((6 * 1024 * 1024))
peak_memory() {
    export LD_LIBRARY_PATH=$prefix/lib
    "$out/peak" "$out/shared/embedded" "$model" >"$out/embedded"
    local peak plan file
    peak=$(tail -n 1 "$out/embedded")
    plan=$(sed -n 's/^plan: \([0-9]*\) bytes.*/\1/p' "$out/embedded")
    file=$(stat -c %s "$model")
    echo "peak $peak, plan $plan, file $file"
    ((peak <= plan + file + peak_constant))
    say "embedded: peak resident memory $peak = plan $plan + file $file + $((peak - plan - file)), of $peak_constant allowed"
}

# The library built with a sanitizer too. Compilers of Rust have it as an unstable option, which the
# variable allows; the standard library itself is not instrumented.
sanitized_library() { # NAME RUSTFLAGS
    (cd "$root" && RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=$1 -Cunsafe-allow-abi-mismatch=sanitizer $2" \
        cargo rustc --release --lib --no-default-features --features ffi,chat --crate-type staticlib \
        --target x86_64-unknown-linux-gnu --target-dir "$work/$1")
    library=$work/$1/x86_64-unknown-linux-gnu/release/libmor.a
}
system_libraries=(-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc)

address_sanitizer() {
    export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
    local flags=(-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer)
    local library name kind
    # Checks of the language's own contracts and of overflow come with it.
    sanitized_library address "-Cdebug-assertions=on -Coverflow-checks=on"
    nm "$library" 2>/dev/null | grep __asan_report_load >/dev/null
    for kind in address installed; do
        mkdir -p "$out/$kind"
        [[ $kind == address ]] || library=$prefix/lib/libmor.a
        for name in generate embedded cancel; do
            gcc "${c_flags[@]}" "${flags[@]}" -I"$prefix/include" "$examples/c/$name.c" "$library" \
                "${system_libraries[@]}" -o "$out/$kind/$name"
        done
        gcc -std=c11 -D_POSIX_C_SOURCE=200809L "${flags[@]}" -I"$prefix/include" "$tests/abuse.c" "$library" \
            "${system_libraries[@]}" -o "$out/$kind/abuse"
        gcc -std=c11 -D_POSIX_C_SOURCE=200809L "${flags[@]}" -I"$prefix/include" "$tests/cycles.c" \
            "$library" "${system_libraries[@]}" -o "$out/$kind/cycles"
        g++ -std=c++17 "${flags[@]}" -I"$prefix/include" "$tests/bindings.cpp" "$library" \
            "${system_libraries[@]}" -o "$out/$kind/bindings"
        g++ -std=c++17 "${flags[@]}" -I"$prefix/include" "$examples/cpp/batch.cpp" "$library" \
            "${system_libraries[@]}" -o "$out/$kind/batch_cpp"
        run_examples "$out/$kind" ""
        "$out/$kind/batch_cpp" "$model" "It is a truth" "She was" >"$out/batch"
        expect_batch "$out/batch"
        "$out/$kind/bindings" "$model"
        "$out/$kind/abuse" "$model"
        "$out/$kind/cycles" "$model" 1000
    done
    say "AddressSanitizer and UndefinedBehaviorSanitizer, examples, abuse, bindings and 1,000 cycles, library instrumented and as installed: no report, no leak"
}

thread_sanitizer() {
    export TSAN_OPTIONS=halt_on_error=0:exitcode=66
    local library runtime name
    sanitized_library thread ""
    nm "$library" 2>/dev/null | grep __tsan_read >/dev/null
    # Rust's runtime knows the calls of both compilers, GCC's only its own.
    runtime=$(echo "$(rustc --print target-libdir)"/librustc-*_rt.tsan.a)
    [[ -e $runtime ]]
    mkdir -p "$out/thread"
    build() { # SOURCE OUTPUT LIBRARY...
        local source=$1 output=$2
        shift 2
        gcc -std=c11 -g -O1 -D_POSIX_C_SOURCE=200809L -fsanitize=thread -I"$prefix/include" -c "$source" \
            -o "$output.o"
        gcc "$output.o" "$@" -Wl,--whole-archive "$runtime" -Wl,--no-whole-archive \
            "${system_libraries[@]}" -o "$output"
    }
    build "$tests/racy.c" "$out/thread/racy"
    fails 66 "$out/thread/racy"
    for name in generate embedded cancel; do
        build "$examples/c/$name.c" "$out/thread/$name" "$library"
    done
    build "$tests/abuse.c" "$out/thread/abuse" "$library"
    build "$tests/cycles.c" "$out/thread/cycles" "$library"
    run_examples "$out/thread" ""
    "$out/thread/abuse" "$model"
    "$out/thread/cycles" "$model" 200
    say "ThreadSanitizer, examples, abuse and cycles, library instrumented: no report (and one where there is a race)"
}

with_valgrind() {
    export LD_LIBRARY_PATH=$prefix/lib
    local valgrind=(valgrind --quiet --error-exitcode=99 --leak-check=full --show-leak-kinds=definite,indirect,possible
        --errors-for-leak-kinds=definite,indirect,possible --fair-sched=yes)
    run_examples "$out/shared" "" "${valgrind[@]}"
    "${valgrind[@]}" "$out/abuse" "$model"
    "${valgrind[@]}" "$out/cycles" "$model" 1000
    say "valgrind, examples, abuse and 1,000 cycles: no error, no leak, nothing suppressed"
}

part tools tools
part install install_it
[[ $failed == 0 ]] || exit 1
prefix=$work/moved # where that part has put it
part size library_size
part header header_alone
part symbols symbols
part pkg-config with_pkg_config
part calls calls
part cmake with_cmake
part "building the tests" build_tests
part "no allocation" no_allocation
part "out of memory" out_of_memory
part abuse abuse
part "peak memory" peak_memory
part "address sanitizer" address_sanitizer
part "thread sanitizer" thread_sanitizer
part valgrind with_valgrind

printf '\n=== tests/c\n'
printf '%s\n' "${results[@]}"
exit $failed
