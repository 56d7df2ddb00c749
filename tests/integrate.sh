#!/usr/bin/env bash
# docs/integrate.md, run as it stands there: the commands of each section, in a folder of its own.
#
#   tests/integrate.sh SECTION...     such as: "A bare compiler" pkg-config CMake Cargo
#
# From outside: PREFIX, where the library is installed. MOR and MODEL, unless set, are this checkout
# and its model. What a section needs besides (a compiler, pkg-config, CMake, cargo, swift) must be there.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
page=$root/docs/integrate.md
export MOR=${MOR:-$root}
export MODEL=${MODEL:-$MOR/models/austen-mor-5m-q8_0.gguf}
(($#)) || { echo "usage: tests/integrate.sh SECTION..."; exit 2; }
: "${PREFIX:?where the library is installed}"
export PREFIX
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The fenced blocks of a language between a heading (none: what is before the first) and the next one.
blocks() { # LANGUAGE HEADING
    awk -v language="\`\`\`$1" -v heading="$2" '
        !code && /^## / {section = substr($0, 4); next}
        /^```/ {code = !code; on = code && section == heading && $0 == language; next}
        on' "$page"
}

for section; do
    echo "--- $section"
    folder=$work/section
    rm -rf "$folder"
    mkdir "$folder"
    blocks sh "$section" >"$work/commands"
    [[ -s $work/commands ]] || { echo "docs/integrate.md has no commands of '$section'"; exit 1; }
    blocks c "" >"$folder/hello.c"
    (cd "$folder" && bash -eu "$work/commands") | tee "$work/out"
    echo
    case $section in
        # Built for a GPU and another processor: here it runs on that processor, emulated, and finds no
        # driver.
        Jetson:*)
            cd "$folder"
            # No -L: see docs/development.md.
            run=(timeout 300 qemu-aarch64 ./hello "$MODEL" "It is a truth")
            "${run[@]}" >"$work/out"
            if "${run[@]}" cuda 2>"$work/refused"; then exit 1; fi
            cat "$work/refused"
            grep -q '^hello: .*driver' "$work/refused"
            cd "$root" ;;
        # As C programs: the same that a library without GPUs answers everywhere.
        "A bare compiler" | pkg-config)
            if LD_LIBRARY_PATH=$PREFIX/lib "$folder/hello" "$MODEL" Text cuda 2>"$work/refused"; then exit 1; fi
            grep "^hello: .*feature 'cuda'" "$work/refused" ;;
    esac
    # 64 tokens of English are some 40 words, beside what CMake says.
    (($(grep -vE '^(--|\[)' "$work/out" | wc -w) > 20)) || { echo "no text came of '$section'"; exit 1; }
done
