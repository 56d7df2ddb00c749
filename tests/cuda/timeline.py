#!/usr/bin/env python3
"""Where the time of a launch goes on a GPU of compute capability 9.0: when the blocks of each kernel began, had what
they wait for, had their row ready, had multiplied and had ended. Kernels overlap, which profilers do not show.

    python3 tests/cuda/timeline.py build DIR            compiles the kernels with marks; needs no GPU
    python3 tests/cuda/timeline.py run DIR COMMAND...   runs a command that uses the GPU, and prints the table
    python3 tests/cuda/timeline.py read FILE            prints the table of records that `run` has left in DIR

DIR can be carried to the machine with the GPU. The command may be the `mor` of any build with the feature cuda of
these sources: a driver of our own, before NVIDIA's, loads other kernels in place of its.
"""

import argparse
import bisect
import collections
import ctypes
import functools
import os
import pathlib
import re
import statistics
import struct
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
RECORD = struct.Struct("<4I6Q")


def build(folder):
    sys.path.insert(0, str(REPOSITORY / "tools/cuda"))
    import build as images
    from toolchain import Toolchain

    folder.mkdir(parents=True, exist_ok=True)
    sources = images.read_sources(REPOSITORY / "src/cuda/kernels")
    sources["timeline.h"] = (HERE / "timeline.h").read_text()
    image = next(image for image in images.IMAGES if image.name == "sm_90.cubin")
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    tools = Toolchain(image.release, target / "cuda-tools")
    options = (f"--gpu-architecture={image.architecture}", *images.OPTIONS, *images.SOURCES[image.source])
    headers = {name: text for name, text in sources.items() if name != image.source}
    ptx = tools.compile(image.source, sources[image.source], headers, (*options, "--define-macro=MOR_TIMELINE"))
    # NVRTC keeps variables to the module, and the driver tells of those alone that are visible.
    ptx, count = re.subn(r"^\.global (.*\bmor_records)", r".visible .global \1", ptx, flags=re.MULTILINE)
    if count != 2:
        sys.exit("timeline.py: NVRTC no longer writes the records' variables as it did")
    cubin, _ = tools.assemble(ptx, image.device)
    (folder / image.name).write_bytes(cubin)
    # The driver that stands before the other needs a library of its name when it is linked.
    compiler = os.environ.get("CC", "cc")
    real, driver = folder / "libcuda_real.so", folder / "libcuda.so.1"
    real.unlink(missing_ok=True)
    shared = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra"]
    subprocess.run([*shared, "-xc", "/dev/null", "-Wl,-soname,libcuda_real.so", "-o", real], check=True)
    linked = ["-Wl,--no-as-needed", f"-L{folder}", "-lcuda_real", "-ldl", "-Wl,-rpath,$ORIGIN"]
    subprocess.run([*shared, HERE / "timeline.c", *linked, "-o", driver], check=True)
    real.unlink()


def driver_of_this_machine():
    if named := os.environ.get("MOR_CUDA_DRIVER"):
        return pathlib.Path(named)
    # Wherever the loader finds it.
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        sys.exit(f"timeline.py: this machine has no NVIDIA driver; MOR_CUDA_DRIVER names one ({error})")
    maps = pathlib.Path("/proc/self/maps").read_text()
    return pathlib.Path(re.search(r"\S*/libcuda\.so\S*", maps)[0])


def run(folder, command):
    real, records = folder / "libcuda_real.so", folder / "records"
    real.unlink(missing_ok=True)
    real.symlink_to(driver_of_this_machine().resolve())
    records.unlink(missing_ok=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{folder.resolve()}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "MOR_TIMELINE_IMAGE": str(folder / "sm_90.cubin"),
        "MOR_TIMELINE_FILE": str(records),
    }
    subprocess.run(command, env=environment, check=True)
    read(records)


def hash_of_name(name):
    value = 2166136261
    for byte in name.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value


def names_of_kernels():
    table = (REPOSITORY / "src/cuda/images/registers.txt").read_text()
    return {hash_of_name(line.split()[2]): line.split()[2] for line in table.splitlines()[1:]}


class Record:
    """One block; times in nanoseconds, None where it has not been there."""

    __slots__ = ("kernel", "block", "blocks", "multiprocessor", "began", "waited", "ready", "multiplied", "ended")


def read_records(path):
    content = path.read_bytes()
    (written,) = struct.unpack_from("<I", content)
    capacity = (len(content) - 4) // RECORD.size
    raw = [RECORD.unpack_from(content, 4 + RECORD.size * i) for i in range(min(written, capacity))]
    if not raw:
        sys.exit(f"timeline.py: {path} has no records: did the command use a GPU of 9.0?")
    # Of the last milliseconds alone, for the clock may change its pace.
    last = max(r[4] for r in raw)
    raw = [r for r in raw if r[4] > last - 20_000_000]
    clocks = Clocks(raw)
    names = names_of_kernels()
    records = []
    for kernel, block, blocks, multiprocessor, _, began, *moments, ended in raw:
        record = Record()
        record.kernel = names.get(kernel, f"{kernel:08x}")
        record.block, record.blocks, record.multiprocessor = block, blocks, multiprocessor
        time = functools.partial(clocks.time, multiprocessor)
        record.began, record.ended = time(began), time(ended)
        record.waited, record.ready, record.multiplied = map(time, moments)
        records.append(record)
    return sorted(records, key=lambda r: r.began)


class Clocks:
    """The multiprocessors' clocks against the device's time. That moves in steps, so what was read of it is late by up to
    one: of what a multiprocessor has read of both at about a time, the greatest difference is the one to go by. Not of
    all that it has read, for clocks change their pace."""

    # Nanoseconds around a moment.
    NEAR = 50_000

    def __init__(self, raw):
        by = collections.defaultdict(list)
        for r in raw:
            by[r[3]].append((r[5], r[4]))
        rates = []
        for pairs in by.values():
            pairs.sort()
            (c0, t0), (c1, t1) = pairs[0], pairs[-1]
            if c1 > c0 and t1 > t0:
                rates.append((t1 - t0) / (c1 - c0))
        self.rate = statistics.median(rates) if rates else 1.0
        self.origin = min(r[4] for r in raw)
        self.clocks = {multiprocessor: [c for c, _ in pairs] for multiprocessor, pairs in by.items()}
        self.offsets = {multiprocessor: self.offsets_of(pairs) for multiprocessor, pairs in by.items()}

    def offsets_of(self, pairs):
        """Of each reading: by what the time is ahead of the clock, counted from its first reading."""
        # In whole nanoseconds first: a double does not hold the device's time.
        ahead = [(t - self.origin) - (c - pairs[0][0]) * self.rate for c, t in pairs]
        begin, end, offsets = 0, 0, []
        for c, _ in pairs:
            while (c - pairs[begin][0]) * self.rate > self.NEAR:
                begin += 1
            while end < len(pairs) and (pairs[end][0] - c) * self.rate <= self.NEAR:
                end += 1
            offsets.append(max(ahead[begin:end]))
        return offsets

    def time(self, multiprocessor, clock):
        """None for a moment that has not been."""
        if clock == 0:
            return None
        clocks = self.clocks[multiprocessor]
        reading = max(bisect.bisect_right(clocks, clock) - 1, 0)
        return (clock - clocks[0]) * self.rate + self.offsets[multiprocessor][reading]


class Launch:
    """A kernel's blocks: the first and the last that began, the last that ended, and of those that did work the median of
    what lies between."""

    def __init__(self, blocks):
        self.kernel, self.blocks = blocks[0].kernel, len(blocks)
        self.began, self.all_began = min(b.began for b in blocks), max(b.began for b in blocks)
        self.ended = max(b.ended for b in blocks)
        # Of a product those that multiplied: the others had no tile or no rows.
        at_work = [b for b in blocks if b.multiplied is not None] or blocks
        of_multiprocessor = collections.Counter(b.multiprocessor for b in at_work)
        self.most, self.busy = max(of_multiprocessor.values()), len(of_multiprocessor)
        moments = ([getattr(b, name) for b in at_work] for name in ("waited", "ready", "multiplied", "ended"))
        self.moments = [None if None in times else statistics.median(times) for times in moments]


def launches(records):
    """Those of which every block is there, in order of their ends."""
    of_block = collections.defaultdict(list)
    for record in records:
        of_block[record.kernel, record.blocks, record.block].append(record)
    shapes = {(kernel, blocks) for kernel, blocks, _ in of_block}
    found = []
    for kernel, blocks in shapes:
        lists = [of_block.get((kernel, blocks, block), []) for block in range(blocks)]
        # The oldest records may be gone, for some blocks more than for others.
        for back in range(1, min(map(len, lists)) + 1):
            found.append(Launch([records[-back] for records in lists]))
    return sorted(found, key=lambda launch: launch.ended)


COLUMNS = ("whole", "began", "all", "waited", "ready", "multiplied", "ended")


def read(path):
    """A line for each kernel and what stands before it."""
    found = launches(read_records(path))
    rows = collections.defaultdict(list)
    for before, launch in zip(found, found[1:]):
        times = (launch.ended, launch.began, launch.all_began, *launch.moments)
        times = [None if time is None else (time - before.ended) / 1000 for time in times]
        rows[before.kernel, launch.kernel, launch.blocks].append((launch.most, launch.busy, times))
    print("Medians, in microseconds. whole: from the end of the kernel before to this one's. Then, counted from there, when")
    print("its first block and all had begun; when the median block had waited, was ready, had multiplied, had ended.")
    print("busy: multiprocessors that had work; most: blocks with work that one had.")
    print(f"{'kernel':36} {'after':36} {'launches':>8} {'blocks':>6} {'busy':>4} {'most':>4}" + "".join(f"{c:>11}" for c in COLUMNS))
    order = sorted(rows.items(), key=lambda row: -sum(times[0] for *_, times in row[1]))
    for (before, kernel, blocks), seen in order:
        cells = []
        for column in range(len(COLUMNS)):
            values = [times[column] for *_, times in seen if times[column] is not None]
            cells.append(f"{statistics.median(values):11.2f}" if values else " " * 10 + "-")
        most, busy = (statistics.median(launch[i] for launch in seen) for i in range(2))
        print(f"{kernel:36} {before:36} {len(seen):8} {blocks:6} {busy:4.0f} {most:4.0f}" + "".join(cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("build", "run", "read"):
        commands.add_parser(name).add_argument("path", type=pathlib.Path)
    commands.choices["run"].add_argument("program", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.command == "build":
        build(args.path)
    elif args.command == "run":
        run(args.path, args.program)
    else:
        read(args.path)


if __name__ == "__main__":
    main()
