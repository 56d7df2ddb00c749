#!/usr/bin/env python3
"""Whether every function of include/mor.h can be reached from a language: each must be named in the
sources of its binding, outside of comments.

    tools/reach.py swift      prints how many were found; fails with the names of those that are not
    tools/reach.py kotlin

A function that a language does without stands in EXCEPTIONS with the reason; one that stands there
and is named all the same is a failure too.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Language: where its binding calls C, and the names of those files.
SOURCES = {
    "cpp": [("bindings/cpp", "*.hpp")],
    "swift": [("bindings/swift/Sources/Mor", "*.swift")],
    "kotlin": [("src/jni", "*.rs"), ("bindings/kotlin", "*.kt")],
}


def functions() -> set[str]:
    """The functions that the header declares."""
    header = without_comments((ROOT / "include/mor.h").read_text())
    # A type's name has no parenthesis behind it, that of a function pointer's type has one before.
    return set(re.findall(r"\b(mor_[a-z0-9_]+)\(", header))


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] not in SOURCES:
        print(f"usage: reach.py {'|'.join(SOURCES)}", file=sys.stderr)
        return 2
    language = sys.argv[1]
    files = [
        file
        for folder, pattern in SOURCES[language]
        for file in sorted((ROOT / folder).rglob(pattern))
        if not {"Tests", "test", "build", ".build"} & set(file.relative_to(ROOT).parts)
    ]
    text = "\n".join(without_comments(file.read_text()) for file in files)
    named = set(re.findall(r"\bmor_[a-z0-9_]+\b", text))
    declared = functions()
    missing = sorted(declared - named)
    for name in missing:
        print(f"{language}: {name} cannot be reached")
    if missing:
        return 1
    print(f"{language}: {len(declared & named)} of {len(declared)} functions of mor.h are called")
    return 0


if __name__ == "__main__":
    sys.exit(main())
