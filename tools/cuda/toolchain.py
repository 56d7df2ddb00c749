"""NVIDIA's compilers out of Python wheels: NVRTC (CUDA C++ -> PTX) and ptxas (PTX -> cubin)."""

import ctypes
import pathlib
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile

# Of each CUDA release: the compiler, the assembler, the headers.
RELEASES = {
    "11.8": (
        "nvidia-cuda-nvrtc-cu11==11.8.89",
        "nvidia-cuda-nvcc-cu11==11.8.89",
        "nvidia-cuda-runtime-cu11==11.8.89",
    ),
    "12.6": (
        "nvidia-cuda-nvrtc-cu12==12.6.85",
        "nvidia-cuda-nvcc-cu12==12.6.85",
        "nvidia-cuda-runtime-cu12==12.6.77",
    ),
}


class Failure(Exception):
    """What stops the build, as a sentence."""


class Toolchain:
    """One CUDA release, unpacked in a folder of the cache."""

    def __init__(self, release, cache, wheels=None):
        self.release = release
        folder = cache / f"cuda-{release}"
        if not (folder / "complete").exists():
            unpack(RELEASES[release], folder, wheels)
        self.include = folder / "nvidia/cuda_runtime/include"
        self.ptxas = folder / "nvidia/cuda_nvcc/bin/ptxas"
        self.nvrtc = load_nvrtc(folder / "nvidia/cuda_nvrtc/lib")

    def compile(self, name, source, headers, options):
        """PTX of a CUDA C++ source. Sources are handed over in memory, so no path can reach the output."""
        options = [*options, f"--include-path={self.include}"]
        program = ctypes.c_void_p()
        self._call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            source.encode(),
            name.encode(),
            len(headers),
            strings(headers.values()),
            strings(headers.keys()),
        )
        try:
            if self.nvrtc.nvrtcCompileProgram(program, len(options), strings(options)) != 0:
                raise Failure(f"{name}, CUDA {self.release}, {options[0]}:\n{self._text(program, 'ProgramLog')}")
            return self._text(program, "PTX")
        finally:
            self.nvrtc.nvrtcDestroyProgram(ctypes.byref(program))

    def assemble(self, ptx, device):
        """The cubin of a PTX text, and what its kernels take: a dictionary by kernel."""
        with tempfile.TemporaryDirectory() as folder:
            text, cubin = pathlib.Path(folder, "mor.ptx"), pathlib.Path(folder, "mor.cubin")
            text.write_text(ptx)
            command = [self.ptxas, "-v", f"-arch={device}", text, "-o", cubin]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise Failure(f"ptxas {self.release} for {device}:\n{done.stderr.strip()}")
            image = cubin.read_bytes()
        # Where it cannot follow products of warpgroups (wgmma) it waits for each.
        if loss := re.search(r"Potential Performance Loss: (.*)", done.stderr):
            raise Failure(f"ptxas {self.release} for {device}: {loss[1]}")
        return image, usage(done.stderr, constants(image))

    def _text(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def _call(self, function, *args):
        code = getattr(self.nvrtc, function)(*args)
        if code != 0:
            raise Failure(f"{function} of CUDA {self.release} failed with code {code}")


def strings(values):
    values = [value.encode() for value in values]
    return (ctypes.c_char_p * len(values))(*values)


def unpack(packages, folder, wheels):
    """Fetches the packages' wheels, unless a folder has them, and unpacks them."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as downloads:
        for package in packages:
            wheel = found(package, wheels) if wheels else fetched(package, pathlib.Path(downloads))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    (folder / "nvidia/cuda_nvcc/bin/ptxas").chmod(0o755)
    (folder / "complete").touch()


def fetched(package, folder):
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), package], capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(
            f"pip could not fetch {package}; check the network or pass --wheels DIR\n{done.stderr.strip()}"
        )
    return found(package, folder)


def found(package, folder):
    name, version = package.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*{platform.machine()}.whl"
    wheels = sorted(pathlib.Path(folder).glob(pattern))
    if not wheels:
        raise Failure(f"{folder} has no {pattern}")
    return wheels[0]


def load_nvrtc(folder):
    libraries = sorted(folder.glob("libnvrtc.so.*"))
    if not libraries:
        raise Failure(f"no NVRTC in {folder}: remove that folder and run again")
    try:
        return ctypes.CDLL(str(libraries[0]))
    except OSError as error:
        raise Failure(f"cannot load NVRTC: {error}") from error


KERNEL = re.compile(r"Compiling entry function '(\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def usage(report, constant):
    """What `ptxas -v` reports, by kernel."""
    kernels, name = {}, None
    for line in report.splitlines():
        if match := KERNEL.search(line):
            name = match[1]
            kernels[name] = dict(shared=0, constant=constant.get(name, 0))
        elif name and (match := STACK.search(line)):
            kernels[name].update(zip(("stack", "stores", "loads"), map(int, match.groups())))
        elif name and (match := REGISTERS.search(line)):
            kernels[name]["registers"] = int(match[1])
            if match := SHARED.search(line):
                kernels[name]["shared"] = int(match[1])
            name = None
    if not all(len(row) == 6 for row in kernels.values()):
        raise Failure(f"ptxas reports in a form that is not known:\n{report}")
    return kernels


def constants(cubin):
    """Bytes of constant bank 0 (launch parameters) by kernel, from the cubin's section table (ELF64):
    ptxas does not report them for every device."""
    table, _, _, _, _, size, count, names = struct.unpack_from("<QIHHHHHH", cubin, 0x28)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + index * size) for index in range(count)]
    start = sections[names][4]
    found = {}
    for offset, _, _, _, _, length in sections:
        name = cubin[start + offset : cubin.index(b"\0", start + offset)].decode()
        if name.startswith(".nv.constant0."):
            found[name.removeprefix(".nv.constant0.")] = length
    return found
