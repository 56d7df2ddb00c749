#!/usr/bin/env bash
# The Kotlin binding on the JVM: compiled, its native methods compared with the library's, its tests run
# with JNI's own checks switched on.
#
#   tests/kotlin/run.sh [BUILD_DIR]      BUILD_DIR: kept, so that the next run builds less
#
# Needed: Rust, a JDK (17 or later), nm, and `kotlinc` on the path or npm, which brings it.
# MOR_TEST_SMOLLM2, where it names that model, adds its table and its tests.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
if [[ $# -gt 0 ]]; then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
cd "$root"
binding=bindings/kotlin

if ! command -v kotlinc >/dev/null; then
    [[ -d $work/node_modules/kotlin-compiler ]] ||
        npm install --prefix "$work" --no-audit --no-fund --silent kotlin-compiler@2.4.20
    PATH=$work/node_modules/kotlin-compiler/bin:$PATH
fi
lib=$(cd "$(dirname "$(readlink -f "$(command -v kotlinc)")")/../lib" && pwd)
coroutines=$lib/kotlinx-coroutines-core-jvm.jar

echo "--- the native library"
target=${CARGO_TARGET_DIR:-target}
cargo rustc --release --lib --no-default-features --features jni,chat --crate-type cdylib
natives=$work/natives/dev/mor/natives/linux-$(uname -m)
mkdir -p "$natives"
cp "$target/release/libmor.so" "$natives/libmor_jni.so"

echo "--- every native method that Kotlin declares is there, and no other"
nm -D --defined-only "$natives/libmor_jni.so" | sed -n 's/.* Java_dev_mor_Native_//p' | sort >"$work/exported"
sed -n 's/.*external fun \([A-Za-z]*\).*/\1/p' "$binding/mor/src/main/kotlin/dev/mor/Native.kt" |
    sort >"$work/native"
diff "$work/native" "$work/exported"
echo "$(wc -l <"$work/exported") native methods"

echo "--- the library, as Gradle compiles it: for Java 8 and Android, with Kotlin 2.2"
library() { # MODULE JAR CLASSPATH
    kotlinc -Werror -Xexplicit-api=strict -language-version 2.2 -Xjdk-release=8 -no-reflect -cp "$3" \
        -d "$work/$2" "$binding/$1/src/main/kotlin"
}
library mor mor.jar "$lib/kotlin-stdlib.jar"
library coroutines mor-coroutines.jar "$work/mor.jar:$coroutines"
# The library is found inside the jar.
jar --update --file "$work/mor.jar" -C "$work/natives" dev

echo "--- what is for Android: compiled against stand-ins for its classes, not run"
rm -rf "$work/android"
mkdir -p "$work/android"
awk -v to="$work/android/" '/^=== / {file = to $2; folder = file; sub("/[^/]*$", "", folder)
    system("mkdir -p " folder); next} file {print > file}' tests/kotlin/android-stubs.txt
find "$work/android" -name '*.java' -exec javac -d "$work/android/classes" {} +
library android mor-android.jar "$work/mor.jar:$work/android/classes"
kotlinc -Werror -Xjdk-release=8 -no-reflect \
    -cp "$work/mor.jar:$work/mor-android.jar:$work/android/classes" -d "$work/sample.jar" \
    "$binding/sample/src/main/kotlin"

echo "--- the program of the README, as it stands there"
awk '/^```kotlin$/ {on = 1; next} /^```$/ {if (on) exit} on' "$binding/README.md" >"$work/Quick.kt"
kotlinc -Werror -no-reflect -cp "$work/mor.jar" -d "$work/quick.jar" "$work/Quick.kt"
java -cp "$work/quick.jar:$work/mor.jar:$lib/kotlin-stdlib.jar" QuickKt | tee "$work/quick"
(($(wc -w <"$work/quick") > 20))
echo

echo "--- the tests"
classes=$work/mor.jar:$work/mor-coroutines.jar:$lib/kotlin-stdlib.jar:$lib/kotlin-test.jar:$coroutines
rm -rf "$work/tests"
# The compiler reads the Java file, and leaves its compilation to javac; internals are compared too.
kotlinc -Werror -Xfriend-paths="$work/mor.jar" -Xjava-package-prefix=dev.mor.tests -no-reflect \
    -cp "$classes" -d "$work/tests" tests/kotlin
javac -Xlint:all -Werror -cp "$classes:$work/tests" -d "$work/tests" tests/kotlin/JavaCaller.java
status=0
java -ea -Xcheck:jni -Xmx256m -XX:MaxDirectMemorySize=128m --add-opens java.base/java.io=ALL-UNNAMED \
    -Dmor.root="$root" -cp "$work/tests:$classes" dev.mor.tests.MainKt 2>&1 | tee "$work/log" || status=$?
# -Xcheck:jni warns and goes on, but for what would crash.
if grep -nE '^WARNING|^FATAL|FATAL ERROR in native method' "$work/log"; then
    echo "JNI's rules were broken"
    exit 1
fi
exit $status
