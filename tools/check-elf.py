#!/usr/bin/env python3
"""Looks whether shared libraries can be loaded where they are meant to be.

    tools/check-elf.py LIBRARY...

Two rules, for each library:

- The pieces that are loaded (LOAD segments) are aligned to 16 KiB when the machine has 64 bits: Android
  devices with pages of that size load no other. With 32 bits, 4 KiB do.
- What it needs of other libraries is what the system has: the C library's parts and nothing else.

Reads the file itself, so that it runs anywhere and no tool's wording matters.
"""

import struct
import sys

LOAD, DYNAMIC = 1, 2
NEEDED, STRING_TABLE, END = 1, 5, 0

# Public libraries of Android that Rust's runtime and this library may need.
ANDROID = {"libc.so", "libm.so", "libdl.so", "liblog.so"}
LINUX = {
    "libc.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    # Parts of libc.so.6 since glibc 2.34; older ones have them apart.
    "libdl.so.2",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
    "ld-linux-armhf.so.3",
}
MACHINES = {3: "x86", 40: "ARM", 62: "x86-64", 183: "64-bit ARM"}


class Elf:
    """A little-endian ELF file: its machine, LOAD segments and needed libraries."""

    def __init__(self, data):
        if data[:4] != b"\x7fELF" or data[5] != 1:
            raise ValueError("not a little-endian ELF file")
        self.data = data
        self.wide = data[4] == 2
        (self.machine,) = struct.unpack_from("<H", data, 18)
        at, size, count = self.read("<32xQ14xHH", "<28xI10xHH")
        self.segments = [self.segment(at + i * size) for i in range(count)]

    def read(self, wide, narrow, at=0):
        return struct.unpack_from(wide if self.wide else narrow, self.data, at)

    def segment(self, at):
        """(type, offset, address, bytes in the file, alignment)"""
        if self.wide:
            kind, offset, address, size, alignment = struct.unpack_from("<I4xQQ8xQ8xQ", self.data, at)
        else:
            kind, offset, address, size, alignment = struct.unpack_from("<III4xI8xI", self.data, at)
        return kind, offset, address, size, alignment

    def loads(self):
        return [s for s in self.segments if s[0] == LOAD]

    def offset(self, address):
        for _, offset, start, size, _ in self.loads():
            if start <= address < start + size:
                return offset + address - start
        raise ValueError(f"no segment has the address {address:#x}")

    def needed(self):
        entries = []
        for _, start, _, size, _ in (s for s in self.segments if s[0] == DYNAMIC):
            step = 16 if self.wide else 8
            for at in range(start, start + size, step):
                tag, value = self.read("<QQ", "<II", at)
                if tag == END:
                    break
                entries.append((tag, value))
        tables = [value for tag, value in entries if tag == STRING_TABLE]
        names = [self.offset(tables[0]) + value for tag, value in entries if tag == NEEDED]
        return [self.data[at : self.data.index(0, at)].decode() for at in names]


def faults(elf):
    least = 16384 if elf.wide else 4096
    loads = elf.loads()
    if not loads:
        yield "nothing is loaded"
    for _, offset, address, _, alignment in loads:
        where = f"the LOAD segment at {address:#x}"
        if alignment < least:
            yield f"{where} is aligned to {alignment}, not to {least}: link with -z max-page-size={least}"
        elif (address - offset) % alignment:
            yield f"{where} and its place in the file differ by no multiple of {alignment}"
    needed = elf.needed()
    # Android's names have no version.
    allowed = LINUX if any(name.startswith("libc.so.") for name in needed) else ANDROID
    for name in needed:
        if name not in allowed:
            yield f"it needs {name}, which is not one of {', '.join(sorted(allowed))}"


def main(paths):
    if not paths:
        sys.exit(__doc__)
    failed = False
    for path in paths:
        with open(path, "rb") as file:
            elf = Elf(file.read())
        found = list(faults(elf))
        for fault in found:
            print(f"{path}: {fault}")
        failed |= bool(found)
        if not found:
            machine = MACHINES.get(elf.machine, elf.machine)
            alignments = sorted({s[4] for s in elf.loads()})
            print(f"{path}: {machine}, LOAD segments aligned to {alignments}, needs {' '.join(elf.needed())}")
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1:])
