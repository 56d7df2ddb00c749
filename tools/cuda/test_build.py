#!/usr/bin/env python3
"""Tests of build.py, with small kernels of their own: python3 tools/cuda/test_build.py"""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import build

SHUFFLE = """
#include "device.cuh"
extern "C" __global__ void __launch_bounds__(64) mor_shuffle(const float* x, float* y) {
    __shared__ float sums[2];
    float sum = x[threadIdx.x];
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffff, sum, mask);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    y[threadIdx.x] = sums[0] + sums[1];
#ifndef MOR_NO_CONDITIONALS
#error "conditional.cu alone sets conditions"
#endif
}
"""
DEVICE = """
#pragma once
#if __CUDA_ARCH__ >= 800
extern "C" __global__ void mor_mma(const unsigned* a, float* c) {
    float d[4] = {};
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]));
    for (int i = 0; i < 4; i++) c[4 * threadIdx.x + i] = d[i];
}
#endif
"""
CONDITIONAL = """
extern "C" __device__ void cudaGraphSetConditional(unsigned long long handle, unsigned value);
extern "C" __global__ void mor_set(unsigned long long handle, unsigned value) {
    cudaGraphSetConditional(handle, value);
}
"""
# More values alive than 1024 threads leave registers for.
SPILL = """
extern "C" __global__ void __launch_bounds__(1024) mor_spill(const float* x, float* y) {
    float v[128];
#pragma unroll
    for (int i = 0; i < 128; i++) v[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 128; i++) y[i * 1024 + threadIdx.x] = v[i] * v[127 - i];
}
"""
# Somebody else changes a sum while products are under way.
WGMMA = """
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
__device__ void multiply(float d[4], unsigned long long rows) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, %4, %4, 1, 1, 1, 0, 0;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(rows));
}
extern "C" __global__ void mor_wgmma(unsigned long long rows, float* c) {
    float d[4] = {};
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    multiply(d, rows);
    d[0] += 1;
    multiply(d, rows);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    for (int i = 0; i < 4; i++) c[4 * threadIdx.x + i] = d[i];
}
#endif
"""
CUBINS_AND_PTX = [image.name for image in build.IMAGES if image.source == "mor.cu"]


class BuildTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        self.kernels, self.images = self.folder / "kernels", self.folder / "images"
        self.spills = self.folder / "spills.txt"
        self.kernels.mkdir()
        self.spills.write_text("")
        for name, text in (("mor.cu", SHUFFLE), ("device.cuh", DEVICE), ("conditional.cu", CONDITIONAL)):
            (self.kernels / name).write_text(text)

    def run_build(self, *options, **variables):
        """Exit code and what was said."""
        places = ("--kernels", self.kernels, "--images", self.images, "--spills", self.spills)
        command = [sys.executable, build.__file__, *map(str, places), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        return done.returncode, done.stdout + done.stderr

    def passes(self, *options):
        code, said = self.run_build(*options)
        self.assertEqual(code, 0, said)

    def fails(self, sentence, *options, **variables):
        code, said = self.run_build(*options, **variables)
        self.assertEqual(code, 1, said)
        self.assertIn(sentence, said)
        self.assertNotIn("Traceback", said)

    def append(self, name, text):
        with open(self.kernels / name, "a") as file:
            file.write(text)

    def test_builds_every_image_reproducibly(self):
        self.passes()
        self.passes("--check")
        self.passes("--check", "--rebuild")
        table = (self.images / "registers.txt").read_text()
        for image in build.IMAGES:
            content = (self.images / image.name).read_bytes()
            kernels = {line.split()[2] for line in table.splitlines() if line.startswith(f"{image.name} ")}
            expected = {"mor_set"} if image.source == "conditional.cu" else {"mor_shuffle"}
            if image.source == "mor.cu" and image.architecture >= "compute_80":
                expected.add("mor_mma")
            self.assertEqual(kernels, expected, image.name)
            if image.is_ptx:
                self.assertIn(f".target {image.architecture.replace('compute', 'sm')}\n".encode(), content)
                self.assertEqual(content.index(b"\0"), len(content) - 1)
            else:
                self.assertTrue(content.startswith(b"\x7fELF"))

    def test_what_was_edited_is_found(self):
        self.passes()
        self.append("device.cuh", "// more\n")
        self.fails("the images are not those of the sources", "--check")
        self.passes()
        (self.kernels / "unused.cuh").write_text("")
        self.fails("the images are not those of the sources", "--check")

    def test_images_from_elsewhere_are_found(self):
        self.passes()
        (self.images / "sm_60.cubin").touch()
        self.fails("sm_60.cubin is no image", "--check")
        self.passes()
        self.assertFalse((self.images / "sm_60.cubin").exists())
        (self.images / "sm_72.cubin").write_bytes(b"\x7fELF")
        self.fails("+image sm_72.cubin", "--check")
        # With a manifest that agrees, a new build tells.
        sources = build.read_sources(self.kernels)
        manifest = build.manifest(sources, build.read_images(self.images))
        (self.images / "manifest.txt").write_text(manifest)
        self.passes("--check")
        self.fails("compile to something else", "--check", "--rebuild")
        (self.images / "sm_72.cubin").unlink()
        self.fails("has no sm_72.cubin", "--check")

    def test_spills_need_a_reason(self):
        self.append("mor.cu", SPILL)
        self.fails("mor_spill of compute_70.ptx spills registers")
        self.spills.write_text("# Known.\n" + "".join(f"{name} mor_spill a test\n" for name in CUBINS_AND_PTX))
        self.passes()
        self.passes("--check")
        self.spills.write_text(f"{CUBINS_AND_PTX[0]} mor_spill\n")
        self.fails("give an image, a kernel and the reason", "--check")
        self.spills.write_text("")
        self.fails("mor_spill of compute_70.ptx spills registers", "--check")

    def test_allowed_spills_must_exist(self):
        self.spills.write_text("sm_87.cubin mor_shuffle a test\n")
        self.fails("mor_shuffle of sm_87.cubin, which does not spill")

    def test_functions_of_the_driver_stay_out_of_mor_cu(self):
        self.append("mor.cu", CONDITIONAL)
        self.fails("mor.cu calls cudaGraphSetConditional")
        (self.kernels / "mor.cu").write_text('extern "C" __global__ void mor_print(int x) { printf("%d", x); }\n')
        self.fails("mor.cu calls vprintf")

    def test_products_that_wait_for_each_other_are_refused(self):
        self.append("mor.cu", WGMMA)
        self.fails("ptxas 12.6 for sm_90a: wgmma.mma_async instructions are serialized")

    def test_errors_of_the_compilers_are_passed_on(self):
        self.append("device.cuh", "int = 3;\n")
        self.fails("device.cuh(")
        (self.kernels / "device.cuh").write_text('__device__ inline void f() { asm("no.such;"); }\n')
        self.append("mor.cu", 'extern "C" __global__ void mor_asm() { f(); }\n')
        self.fails("ptxas 12.6 for sm_90a:")

    def test_what_is_missing_is_named(self):
        (self.kernels / "mor.cu").unlink()
        self.fails("kernels has no mor.cu", "--check")
        self.append("mor.cu", SHUFFLE)
        self.fails("images has no", "--check")
        fresh = ("--cache", self.folder / "cache")
        self.fails("has no nvidia_cuda_nvrtc_cu11-11.8.89-", *fresh, "--wheels", self.folder)
        self.fails("check the network or pass --wheels DIR", *fresh, PIP_NO_INDEX="1")
        self.assertFalse((self.folder / "cache/cuda-11.8/complete").exists())


if __name__ == "__main__":
    unittest.main()
