#!/usr/bin/env python3
"""Builds the device images of the CUDA kernels, or checks that they are those of the sources.

    python3 tools/cuda/build.py                      src/cuda/kernels -> src/cuda/images
    python3 tools/cuda/build.py --check              hashes and spills; needs nothing but this repository
    python3 tools/cuda/build.py --check --rebuild    compiles anew and compares to the byte

The compilers are NVIDIA's Python wheels, fetched by pip into a cache; no GPU, driver or CUDA toolkit is
needed. docs/cuda.md says which device takes which image, and why two releases of CUDA are used. Needs
Python's standard library, on Linux on x86-64 or 64-bit ARM (the latter has not been tried).
"""

import argparse
import concurrent.futures
import dataclasses
import difflib
import hashlib
import os
import pathlib
import re
import sys

from toolchain import RELEASES, Failure, Toolchain

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent
OPTIONS = ("--std=c++17",)
# What sets the conditions of graphs is a module of its own, conditional.cu: older drivers refuse it.
SOURCES = {"mor.cu": ("--define-macro=MOR_NO_CONDITIONALS",), "conditional.cu": ()}


@dataclasses.dataclass(frozen=True)
class Image:
    """One file of src/cuda/images."""

    name: str
    source: str
    release: str
    architecture: str
    # A cubin's device; for PTX, which the driver compiles, a device that stands for those it is for.
    device: str
    # Functions that the driver gives to its modules; a driver that does not know one refuses the module.
    externs: frozenset = frozenset()

    @property
    def is_ptx(self):
        return self.name.endswith(".ptx")


# What takes longest comes first.
IMAGES = (
    Image("sm_90.cubin", "mor.cu", "12.6", "compute_90a", "sm_90a"),
    Image("sm_72.cubin", "mor.cu", "11.8", "compute_72", "sm_72"),
    Image("sm_80.cubin", "mor.cu", "12.6", "compute_80", "sm_80"),
    Image("sm_87.cubin", "mor.cu", "11.8", "compute_87", "sm_87"),
    Image("compute_70.ptx", "mor.cu", "11.8", "compute_70", "sm_75"),
    Image("compute_80.ptx", "mor.cu", "11.8", "compute_80", "sm_90"),
    Image("conditional.ptx", "conditional.cu", "11.8", "compute_70", "sm_90", frozenset({"cudaGraphSetConditional"})),
)
# Assembles what drivers would: it knows the externs and takes PTX of the older release.
ASSEMBLER_OF_PTX = "12.6"


def arguments():
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the images are not right")
    parser.add_argument("--rebuild", action="store_true", help="with --check: compile anew and compare")
    parser.add_argument("--wheels", type=pathlib.Path, metavar="DIR", help="take the wheels from here, not by pip")
    parser.add_argument("--cache", type=pathlib.Path, default=target / "cuda-tools", metavar="DIR", help="[%(default)s]")
    parser.add_argument("--kernels", type=pathlib.Path, default=REPOSITORY / "src/cuda/kernels", metavar="DIR")
    parser.add_argument("--images", type=pathlib.Path, default=REPOSITORY / "src/cuda/images", metavar="DIR")
    parser.add_argument("--spills", type=pathlib.Path, default=REPOSITORY / "tools/cuda/spills.txt", metavar="FILE")
    args = parser.parse_args()
    if args.rebuild and not args.check:
        parser.error("--rebuild goes with --check")
    return args


def read_sources(folder):
    """Every file of the kernels' folder, by name."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    sources = {path.name: path.read_text() for path in files}
    for name in SOURCES:
        if name not in sources:
            raise Failure(f"{folder} has no {name}")
    return sources


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def hash_of_sources(sources):
    parts = (f"{name}\n{len(text)}\n{text}" for name, text in sorted(sources.items()))
    return sha256("".join(parts).encode())


def build(sources, args):
    """The files of the images' folder, by name, with the manifest."""
    tools = {release: Toolchain(release, args.cache, args.wheels) for release in RELEASES}
    files, rows = {}, []
    # The compilers are a library, which lets other threads run meanwhile, and a program.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda image: build_image(image, sources, tools), IMAGES))
    for image, (content, kernels) in zip(IMAGES, built):
        files[image.name] = content
        rows += [(image.name, image.device, name, kernels[name]) for name in sorted(kernels)]
    files["registers.txt"] = table(rows).encode()
    files["manifest.txt"] = manifest(sources, files).encode()
    return files


def build_image(image, sources, tools):
    headers = {name: text for name, text in sources.items() if name != image.source}
    options = (f"--gpu-architecture={image.architecture}", *OPTIONS, *SOURCES[image.source])
    ptx = tools[image.release].compile(image.source, sources[image.source], headers, options)
    refuse_externs(image, ptx)
    assembler = tools[ASSEMBLER_OF_PTX if image.is_ptx else image.release]
    cubin, kernels = assembler.assemble(ptx, image.device)
    # The driver reads PTX up to a NUL, which include_bytes! would not add.
    return (ptx.encode() + b"\0" if image.is_ptx else cubin), kernels


def refuse_externs(image, ptx):
    called = set(re.findall(r"^\.extern \.func\s+(?:\(.*?\)\s*)?(\w+)", ptx, re.MULTILINE))
    for name in sorted(called - image.externs):
        raise Failure(
            f"{image.source} calls {name}, which only some drivers have: they alone could load {image.name}. "
            "What sets conditions of graphs belongs into conditional.cu or between #ifndef MOR_NO_CONDITIONALS"
        )


COLUMNS = ("registers", "stores", "loads", "stack", "shared", "constant")
TITLES = ("registers", "spill stores", "spill loads", "stack", "shared", "constant")


def table(rows):
    """What every kernel takes, a line each, as wide as it needs."""
    lines = [("image", "device", "kernel", *TITLES)]
    lines += [(image, device, name, *(str(use[key]) for key in COLUMNS)) for image, device, name, use in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ""
    for line in lines:
        cells = [cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        text += "  ".join(cells) + "\n"
    return text


def manifest(sources, files):
    """What the images were made from and with, and their hashes."""
    lines = ["# Written by tools/cuda/build.py."]
    lines.append(f"kernels {hash_of_sources(sources)}")
    lines += [f"release {release}: {' '.join(packages)}" for release, packages in RELEASES.items()]
    lines += [f"options of {source}: {' '.join(OPTIONS + more)}" for source, more in SOURCES.items()]
    for image in IMAGES:
        made = f"{image.source} {image.architecture} by {image.release}"
        lines.append(f"image {image.name}: {made}, {len(files[image.name])} bytes, sha256 {sha256(files[image.name])}")
    lines.append(f"registers.txt: sha256 {sha256(files['registers.txt'])}")
    return "\n".join(lines) + "\n"


def read_images(folder):
    """The files of the images' folder, no more and no fewer than the build writes."""
    expected = {image.name for image in IMAGES} | {"registers.txt", "manifest.txt"}
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(expected - present):
        raise Failure(f"{folder} has no {name}: run tools/cuda/build.py")
    for name in sorted(present - expected):
        raise Failure(f"{folder}/{name} is no image that tools/cuda/build.py makes")
    return {name: (folder / name).read_bytes() for name in expected}


def check_manifest(sources, files):
    expected, found = manifest(sources, files), files["manifest.txt"].decode()
    if expected != found:
        raise Failure(
            "the images are not those of the sources: run tools/cuda/build.py and commit what it writes\n"
            + difference("manifest.txt", found, expected)
        )


def difference(name, committed, actual):
    lines = difflib.unified_diff(
        committed.splitlines(), actual.splitlines(), f"{name} as committed", f"{name} as it should be", n=0, lineterm=""
    )
    return "\n".join(lines)


def check_rebuilt(files, rebuilt):
    """Compares with a new build: the table first, since it says the most."""
    check_text("registers.txt", files, rebuilt)
    check_text("manifest.txt", files, rebuilt)
    for name in sorted(rebuilt):
        if files[name] != rebuilt[name]:
            raise Failure(f"{name} is not what the sources compile to")


def check_text(name, files, rebuilt):
    if files[name] != rebuilt[name]:
        raise Failure(
            "the sources compile to something else than what is committed\n"
            + difference(name, files[name].decode(), rebuilt[name].decode())
        )


def read_spills(path):
    """Kernels that may spill: lines `IMAGE KERNEL REASON`."""
    allowed = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            raise Failure(f"{path}:{number}: give an image, a kernel and the reason why it may spill")
        allowed[words[0], words[1]] = words[2]
    return allowed


def check_spills(registers, allowed):
    spilled = set()
    for line in registers.decode().splitlines()[1:]:
        image, _, kernel, _, stores, loads, *_ = line.split()
        if int(stores) or int(loads):
            spilled.add((image, kernel))
    for image, kernel in sorted(spilled - allowed.keys()):
        raise Failure(f"{kernel} of {image} spills registers: see registers.txt; spills.txt lists those that may")
    for image, kernel in sorted(allowed.keys() - spilled):
        raise Failure(f"spills.txt lists {kernel} of {image}, which does not spill")


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".cubin", ".ptx") and path.name not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def main():
    args = arguments()
    try:
        sources = read_sources(args.kernels)
        if args.check:
            files = read_images(args.images)
            check_manifest(sources, files)
            if args.rebuild:
                check_rebuilt(files, build(sources, args))
        else:
            files = build(sources, args)
            write(args.images, files)
        check_spills(files["registers.txt"], read_spills(args.spills))
    except (Failure, OSError, UnicodeDecodeError) as error:
        sys.exit(f"tools/cuda/build.py: {error}")
    for image in IMAGES:
        print(f"{image.name:16} {len(files[image.name]):8} bytes")


if __name__ == "__main__":
    main()
