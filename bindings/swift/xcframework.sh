#!/usr/bin/env bash
# Makes mor.xcframework beside Package.swift, which then uses it: the static library for iOS, its
# simulator and macOS, with the header. On a Mac, with Xcode and rustup.
#
#   xcframework.sh
set -euo pipefail
package=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$package/../.." && pwd -P)
# As in Package.swift.
export IPHONEOS_DEPLOYMENT_TARGET=17.0 MACOSX_DEPLOYMENT_TARGET=14.0

for tool in cargo rustup xcodebuild lipo; do
    command -v "$tool" >/dev/null || { echo "xcframework.sh: $tool is missing" >&2; exit 1; }
done

target=${CARGO_TARGET_DIR:-target}
[[ $target == /* ]] || target=$root/$target
out=$target/xcframework
rm -rf "$out"

build() { # RUST_TARGET: builds libmor.a for it
    rustup target add "$1"
    (cd "$root" && cargo rustc --profile small --lib --target "$1" --target-dir "$target" \
        --no-default-features --features ffi,chat --crate-type staticlib)
}

# One library for each kind of system, with the code for all of its processors.
together() { # NAME RUST_TARGET...
    local name=$1 libraries=() rust_target
    shift
    for rust_target in "$@"; do
        build "$rust_target"
        libraries+=("$target/$rust_target/small/libmor.a")
    done
    mkdir -p "$out/$name"
    lipo -create "${libraries[@]}" -output "$out/$name/libmor.a"
}

together ios aarch64-apple-ios
together simulator aarch64-apple-ios-sim x86_64-apple-ios
together macos aarch64-apple-darwin x86_64-apple-darwin

# In a folder of the module's name, for Xcode puts the headers of all frameworks into one.
mkdir -p "$out/headers/CMor"
cp "$root/include/mor.h" "$out/headers/CMor/"
cat >"$out/headers/CMor/module.modulemap" <<'MAP'
module CMor {
    header "mor.h"
    export *
}
MAP

arguments=()
for name in ios simulator macos; do
    arguments+=(-library "$out/$name/libmor.a" -headers "$out/headers")
done
rm -rf "$package/mor.xcframework"
xcodebuild -create-xcframework "${arguments[@]}" -output "$package/mor.xcframework"
