#!/usr/bin/env bash
# The Swift package compiled and tested with a real Swift, Debian's own (swiftlang, of Debian 13), in
# a folder of its own, for a machine that has none. About 540 MB are fetched and 3.5 GB taken.
#
#   tests/swift/run.sh [FOLDER]     as root. FOLDER: kept, so that the next run installs nothing
#
# Debian package: debootstrap; and Rust.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd -P)
suite=trixie
keep=$#
if [[ $keep -gt 0 ]]; then
    mkdir -p "$1"
    debian=$(cd "$1" && pwd -P)
else
    debian=$(mktemp -d)
fi

leave() {
    # Before anything is removed: what is mounted there is not ours to remove.
    for folder in mor proc; do
        if mountpoint -q "$debian/$folder"; then umount "$debian/$folder"; fi
    done
    [[ $keep -gt 0 ]] || rm -rf --one-file-system "$debian"
}
trap leave EXIT

# The mirror that this machine uses itself.
mirror=$(grep -hoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/* \
    2>/dev/null | head -n 1 | tr -d ' ' || true)
if [[ ! -x $debian/usr/libexec/swift/bin/swift ]]; then
    debootstrap --variant=minbase "$suite" "$debian" ${mirror:+"$mirror"} \
        >"$debian/install.log" || { tail -n 20 "$debian/install.log"; exit 1; }
    chroot "$debian" apt-get -qq update
    chroot "$debian" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
        --no-install-recommends swiftlang swiftlang-dev libstdc++-14-dev \
        >"$debian/install.log" 2>&1 ||
        { tail -n 20 "$debian/install.log"; exit 1; }
    chroot "$debian" apt-get clean
fi
mkdir -p "$debian/mor" "$debian/libraries"
mount --bind -o ro "$root" "$debian/mor"
mount --bind /proc "$debian/proc"

# Built outside, for this Rust is not in there; an older Debian's libc does for a newer one.
cd "$root"
cargo rustc --release --lib --no-default-features --features ffi,chat --crate-type cdylib
cp "${CARGO_TARGET_DIR:-target}/release/libmor.so" "$debian/libraries/"

inside() {
    chroot "$debian" env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 \
        MOR_LIB_DIR=/libraries MOR_SWIFT_BUILD=/root/build "$@"
}
smollm2=()
if [[ -n ${MOR_TEST_SMOLLM2:-} ]]; then
    cp "$MOR_TEST_SMOLLM2" "$debian/root/smollm2.gguf"
    smollm2=(MOR_TEST_SMOLLM2=/root/smollm2.gguf)
fi
inside swiftc --version
inside "${smollm2[@]}" /mor/bindings/swift/test.sh -Xswiftc -warnings-as-errors |
    tee "$debian/root/tested"
grep -q 'cycles: ' "$debian/root/tested"
grep -q 'austen.tsv: .* 2 threads: 0 wrong' "$debian/root/tested"
# Data races in what is written in Swift.
inside /mor/bindings/swift/test.sh --sanitize=thread --scratch-path /root/build-thread
# Its documentation: every public name has some, and every link in it leads somewhere.
inside PKG_CONFIG_PATH=/root/build/pkgconfig swift build --package-path /mor/bindings/swift \
    --scratch-path /root/build-docs --target Mor \
    -Xswiftc -emit-symbol-graph -Xswiftc -emit-symbol-graph-dir -Xswiftc /root/symbols
inside /usr/libexec/swift/bin/docc convert /mor/bindings/swift/Sources/Mor/Mor.docc \
    --warnings-as-errors --fallback-display-name Mor --fallback-bundle-identifier mor \
    --output-path /root/archive --additional-symbol-graph-dir /root/symbols
python3 - "$debian/root/symbols/Mor.symbols.json" <<'PYTHON'
import json, sys

symbols = json.load(open(sys.argv[1]))["symbols"]
# What the compiler makes by itself is not ours to describe.
own = [s for s in symbols if "::SYNTHESIZED" not in s["identifier"]["precise"]]
silent = [".".join(s["pathComponents"]) for s in own if "docComment" not in s]
sys.exit(f"without documentation: {silent}" if silent or len(own) < 100 else 0)
PYTHON
# docs/integrate.md: libmor as it is when installed.
mkdir -p "$debian/root/prefix/lib"
cp "$debian/libraries/libmor.so" "$debian/root/prefix/lib/"
ln -sfn ../../build/pkgconfig "$debian/root/prefix/lib/pkgconfig"
inside PREFIX=/root/prefix /mor/tests/integrate.sh SwiftPM
# The formatting, and the sample.
inside sh -c 'cd /mor/bindings/swift &&
    /usr/libexec/swift/bin/swift-format lint --strict --recursive .'
inside PKG_CONFIG_PATH=/root/build/pkgconfig swift build --package-path /mor/bindings/swift/Sample \
    --scratch-path /root/build-sample -Xswiftc -warnings-as-errors
# Each piece comes with the colour of its depth.
printf 'It is a truth\n' | inside LD_LIBRARY_PATH=/libraries /root/build-sample/debug/MorChat \
    /mor/models/austen-mor-5m-q8_0.gguf >"$debian/root/answer"
(($(grep -oE $'\x1b\\[3[3-6]m' "$debian/root/answer" | sort -u | wc -l) > 1))
