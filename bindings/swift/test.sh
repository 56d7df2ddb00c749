#!/usr/bin/env bash
# Builds libmor and this package, and runs the package's tests. Needs Swift 6.0 or later, and Rust or
# a libmor that is built already; nothing is fetched but what cargo lacks.
#
#   test.sh [OPTION OF SWIFT TEST...]      from any folder
#
#   MOR_LIB_DIR=DIR      take libmor.so, .dylib or .a from there instead of building it
#   MOR_TEST_SMOLLM2=F   run the table of tests/calls for that model too
#   MOR_SWIFT_BUILD=DIR  where Swift builds; otherwise .build beside this file
set -euo pipefail
package=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
root=$(cd "$package/../.." && pwd -P)
scratch=${MOR_SWIFT_BUILD:-$package/.build}

library_in() { # DIR: whether there is one
    [[ -n $(compgen -G "$1/libmor.so" || compgen -G "$1/libmor.dylib" || compgen -G "$1/libmor.a") ]]
}

command -v swift >/dev/null || { echo "test.sh: swift is not on the PATH" >&2; exit 1; }

target=${CARGO_TARGET_DIR:-target}
[[ $target == /* ]] || target=$root/$target
if [[ -n ${MOR_LIB_DIR:-} ]]; then
    libraries=$(cd "$MOR_LIB_DIR" && pwd -P)
    library_in "$libraries" || { echo "test.sh: no libmor in MOR_LIB_DIR, $libraries" >&2; exit 1; }
elif command -v cargo >/dev/null && (cd "$root" && cargo rustc --release --lib --target-dir "$target" \
    --no-default-features --features ffi,chat --crate-type cdylib); then
    libraries=$(cd "$target" && pwd -P)/release
else
    libraries=
    for folder in "$target/release" "$target/small" "$root/build/lib"; do
        if library_in "$folder"; then libraries=$folder; fi
    done
    if [[ -z $libraries ]]; then
        echo "test.sh: cargo cannot build libmor here; build it elsewhere and set MOR_LIB_DIR (README.md)" >&2
        exit 1
    fi
    echo "test.sh: cargo cannot build libmor here; taking what is in $libraries" >&2
fi
echo "test.sh: libmor from $libraries"

# Package.swift asks pkg-config for libmor; this one is not installed, so it is described here.
mkdir -p "$scratch/pkgconfig"
system=
if ! compgen -G "$libraries/libmor.so" >/dev/null && [[ $(uname) == Linux ]]; then
    system="-lgcc_s -lutil -lrt -lpthread -lm -ldl -lc" # what the static library needs
fi
cat >"$scratch/pkgconfig/mor.pc" <<PC
Name: mor
Description: Runs Mixture-of-Recursions language models
Version: 0
Libs: -L${libraries// /\\ } -lmor $system
PC
export PKG_CONFIG_PATH=$scratch/pkgconfig${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export MOR_ROOT=$root
exec swift test --package-path "$package" --scratch-path "$scratch" "$@"
