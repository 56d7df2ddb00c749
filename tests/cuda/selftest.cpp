/*
 * Tests of the emulation itself. Here: the multiprocessor, and that what kernels do wrong is found.
 * selftest.sh builds and runs them under several orders and sanitizers.
 */
#include "selftest.h"

namespace {

float sum_with_barrier(unsigned barrier, unsigned threads = 256) {
    std::vector<float> values(1000);
    for (size_t i = 0; i < values.size(); i++) values[i] = float(i);
    const CUdeviceptr from = upload(values), to = upload(std::vector<float>(1));
    OK(launch("sum_rows", 1, threads, SumRows{(const float *)from, (float *)to, 1000, barrier}));
    OK(cuStreamSynchronize(stream));
    const float sum = download<float>(to, 1)[0];
    OK(cuMemFree_v2(from));
    OK(cuMemFree_v2(to));
    return sum;
}

void reduction() {
    open_device();
    for (const unsigned threads : {32u, 64u, 256u})
        CHECK(sum_with_barrier(1, threads) == 499500.0f);
    close_device();
}

void missing_barrier() {
    open_device();
    // Without the barrier thread 0 adds what is there when it comes: all of it if it comes last.
    fakeCudaSet("MOR_EMULATED_ORDER", "reverse");
    CHECK(sum_with_barrier(0) == 499500.0f);
    fakeCudaSet("MOR_EMULATED_ORDER", "forward");
    CHECK(sum_with_barrier(0) != 499500.0f);
    CHECK(sum_with_barrier(1) == 499500.0f);
    int found = 0;
    for (int seed = 0; seed < 10; seed++) {
        fakeCudaSet("MOR_EMULATED_ORDER", ("shuffled:" + std::to_string(seed)).c_str());
        found += sum_with_barrier(0) != 499500.0f;
        CHECK(sum_with_barrier(1) == 499500.0f);
    }
    CHECK(found > 5);
    fakeCudaReset();
    close_device();
}

void transposition() {
    open_device();
    const unsigned rows = 70, columns = 45;
    std::vector<float> values(rows * columns);
    for (float &v : values) v = random_float();
    const CUdeviceptr from = upload(values), to = upload(std::vector<float>(rows * columns));
    OK(launch("transpose", dim3(2, 3), dim3(32, 8),
              Transpose{(const float *)from, (float *)to, rows, columns}, 32 * 33 * 4));
    OK(cuStreamSynchronize(stream));
    const auto result = download<float>(to, rows * columns);
    for (unsigned y = 0; y < rows; y++)
        for (unsigned x = 0; x < columns; x++)
            CHECK(result[x * rows + y] == values[y * columns + x]);
    OK(cuMemFree_v2(from));
    OK(cuMemFree_v2(to));
    close_device();
}

uint16_t half_of(float value) { // exact for the values that are used here
    if (value == 0) return 0;
    int exponent;
    const float fraction = std::frexp(std::fabs(value), &exponent);
    return uint16_t((value < 0 ? 0x8000 : 0) | (exponent + 14) << 10 |
                    (int(fraction * 2048) & 0x3ff));
}

void tensor_product() {
    open_device();
    std::vector<float> a(16 * 16), b(16 * 8), d(16 * 8);
    std::vector<uint16_t> a_half, b_half;
    for (float &v : a) a_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    for (float &v : b) b_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    for (float &v : d) v = random_float();
    const CUdeviceptr da = upload(a_half), db = upload(b_half), dd = upload(d);
    OK(launch("multiply", 1, 32,
              Multiply{(const uint16_t *)da, (const uint16_t *)db, (float *)dd}));
    OK(cuStreamSynchronize(stream));
    const auto result = download<float>(dd, 16 * 8);
    for (unsigned row = 0; row < 16; row++)
        for (unsigned column = 0; column < 8; column++) {
            float sum = d[row * 8 + column];
            for (unsigned k = 0; k < 16; k++) sum += a[row * 16 + k] * b[k * 8 + column];
            CHECK(result[row * 8 + column] == sum);
        }
    for (const CUdeviceptr p : {da, db, dd}) OK(cuMemFree_v2(p));
    close_device();
}

void products_of_shared_rows() {
    open_device();
    std::vector<float> a(64 * 16), b(64 * 64);
    std::vector<uint16_t> a_half, b_half;
    for (float &v : a) a_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    for (float &v : b) b_half.push_back(half_of(v = std::round(random_float() * 1024) / 1024));
    const CUdeviceptr da = upload(a_half), db = upload(b_half);
    const CUdeviceptr dd = upload(std::vector<float>(64 * 64));
    for (unsigned step = 0; step < 4; step++)
        for (unsigned too_early = 0; too_early < 2; too_early++) {
            const MultiplyShared p{(const uint16_t *)da, (const uint16_t *)db, (float *)dd, step,
                                   too_early};
            OK(launch("multiply_shared", 1, 128, p, 64 * 128 + 1024));
            OK(cuStreamSynchronize(stream));
            const auto result = download<float>(dd, 64 * 64);
            for (unsigned row = 0; row < 64; row++)
                for (unsigned column = 0; column < 64; column++) {
                    float sum = 0;
                    for (unsigned k = 0; k < 16; k++)
                        sum += a[row * 16 + k] * b[column * 64 + 16 * step + k];
                    CHECK(result[row * 64 + column] == (too_early ? 0 : sum));
                }
        }
    for (const CUdeviceptr p : {da, db, dd}) OK(cuMemFree_v2(p));
    close_device();
}

void copies_and_gates() {
    open_device();
    constexpr unsigned rounds = 5;
    std::vector<unsigned> from(32 * rounds);
    for (unsigned i = 0; i < from.size(); i++) from[i] = 7 * i + 1;
    const CUdeviceptr in = upload(from), out = upload(std::vector<unsigned>(32 * (rounds + 1)));
    OK(launch("rounds", 1, 64, Rounds{(const unsigned *)in, (unsigned *)out, rounds}, 256));
    OK(cuStreamSynchronize(stream));
    const auto result = download<unsigned>(out, 32 * (rounds + 1));
    for (unsigned i = 0; i < from.size(); i++) CHECK(result[i] == from[i]);
    // The zeros of the copies that were waited for, not what was still on its way.
    for (unsigned lane = 0; lane < 32; lane++) CHECK(result[32 * rounds + lane] == 0);
    for (const CUdeviceptr p : {in, out}) OK(cuMemFree_v2(p));
    close_device();
}

void warp_collectives() {
    open_device();
    const CUdeviceptr out = upload(std::vector<unsigned>(12 * 32));
    OK(launch("collectives", 1, 32, Collectives{(unsigned *)out}));
    OK(cuStreamSynchronize(stream));
    const auto r = download<unsigned>(out, 12 * 32);
    for (unsigned lane = 0; lane < 32; lane++) {
        const auto at = [&](unsigned i) { return r[i * 32 + lane]; };
        CHECK(at(0) == 5);
        CHECK(at(1) == lane / 8 * 8 + 3);
        CHECK(at(2) == (lane % 16 < 3 ? lane : lane - 3));
        CHECK(at(3) == (lane % 16 + 3 > 15 ? lane : lane + 3));
        CHECK(at(4) == (lane ^ 9));
        CHECK(at(5) == 0x49249249u);
        CHECK(at(6) == 1);
        CHECK(at(7) == 496);
        CHECK(int(at(8)) == -16);
        CHECK(at(9) == (lane < 16 ? lane ^ 1 : lane ^ 2));
        CHECK(at(10) == 2);
        CHECK(at(11) == 10);
    }
    OK(cuMemFree_v2(out));
    close_device();
}

/** Runs the kernel that does wrong, and gives back what it dies with. */
std::string report(Wrong wrong, unsigned threads = 64, long long index = 0, unsigned shared = 0) {
    open_device();
    const CUdeviceptr values = upload(std::vector<float>(1024));
    const std::string text = aborted([&] {
        OK(launch("misbehave", 1, threads, Misbehave{(float *)values, wrong, index}, shared));
        OK(cuStreamSynchronize(stream));
        OK(cuMemFree_v2(values));
    });
    OK(cuMemFree_v2(values));
    close_device();
    return text;
}

void divergence() {
    CHECK(report(NOTHING) == "");
    std::string text = report(EARLY_EXIT);
    CHECK(has(
        text,
        "kernel misbehave, block (0,0,0), thread (0,0,0): waits for threads that will not come"));
    CHECK(has(text, "warp 0: lanes 3 have ended"));
    CHECK(has(text, "warp 0: lanes 0-2,4-31 wait at __syncthreads ("));
    CHECK(has(text, "warp 1: lanes 0-31 wait at __syncthreads ("));
    text = report(DIVIDED);
    CHECK(has(text, "thread (32,0,0): waits at __syncthreads (") &&
          has(text, "the block is divided"));
    text = report(ABSENT_LANES);
    CHECK(has(text, "warp 0: lanes 16-31 have ended"));
    CHECK(has(text, "warp 0: lanes 0-15 wait at __shfl_xor_sync (") &&
          has(text, "with mask ffffffff"));
    CHECK(has(report(ABSENT_LANES, 16), "the block has no threads for lanes 16-31"));
    CHECK(has(report(OTHER_MASK), "with mask"));
    CHECK(has(report(READ_OTHER_LANE), "it reads lane 20, which mask 0000ffff does not name"));
    CHECK(has(report(TRAP), "__trap()"));
    CHECK(has(report(UNFINISHED_PRODUCTS), "ends before its products"));
    CHECK(has(report(UNFINISHED_COPIES, 64, 0, 256), "ends before its copies"));
    CHECK(has(report(CLOSED_GATE, 64, 0, 256),
              "waits for opening 1 of a gate that has opened 0 times; 1 are missing"));
    CHECK(has(report(LATE_AT_GATE, 64, 0, 256), "waits for opening 1 of a gate that has opened 2 times"));
}

void out_of_bounds_in_kernels() {
    // Close to the allocation the guard bytes find it, further away the guard pages.
    CHECK(has(report(WRITE_BEYOND, 32, -1),
              "4 bytes beyond the begin of an allocation of 4096 bytes"));
    CHECK(has(report(WRITE_BEYOND, 32, -20), "80 bytes beyond the begin"));
    const std::string far = report(FAR_BEYOND, 32, 1024);
#if defined(__SANITIZE_ADDRESS__)
    CHECK(has(far, "AddressSanitizer"));
#else
    CHECK(has(far, "kernel misbehave, block (0,0,0), thread (") && has(far, "touches address"));
    CHECK(has(far, "0 bytes behind the end of an allocation of 4096 bytes"));
    CHECK(has(report(DYNAMIC_BEYOND, 32, 1024, 4096), "behind the dynamic shared memory"));
    CHECK(has(report(DEEP_STACK, 32), "the stack of a thread is full"));
#endif
    CHECK(has(report(SHARED_TOO_LARGE), "static and 0 of dynamic shared memory are more than"));
    CHECK(report(DYNAMIC_BEYOND, 32, 1023, 4096) == "");
}

void fresh_memory_is_poison() {
    open_device();
    CUdeviceptr fresh;
    OK(cuMemAlloc_v2(&fresh, 40));
    for (const float v : download<float>(fresh, 10)) CHECK(std::isnan(v));
    OK(cuMemFree_v2(fresh));
    // Shared memory, also of the blocks after the first: nothing is left of the block before.
    const CUdeviceptr found = upload(std::vector<float>(2));
    for (const unsigned writes : {0, 1, 0}) {
        OK(launch("unwritten", dim3(2, 1), dim3(1, 1),
                  Transpose{nullptr, (float *)found, writes, 0}, 4));
        OK(cuStreamSynchronize(stream));
        for (const float v : download<float>(found, 2)) CHECK(writes ? v == 1 : std::isnan(v));
    }
    OK(cuMemFree_v2(found));
    close_device();
}

void blocks_in_any_order() {
    open_device();
    std::vector<float> values(32 * 50);
    for (float &v : values) v = random_float();
    std::vector<float> first;
    for (const char *order : {"forward", "reverse", "shuffled:3", "shuffled:4"}) {
        fakeCudaSet("MOR_EMULATED_ORDER", order);
        const CUdeviceptr from = upload(values), to = upload(std::vector<float>(50));
        OK(launch("sum_rows", 50, 64, SumRows{(const float *)from, (float *)to, 32, 1}));
        OK(cuStreamSynchronize(stream));
        const auto sums = download<float>(to, 50);
        if (first.empty()) first = sums;
        CHECK(sums == first);
        OK(cuMemFree_v2(from));
        OK(cuMemFree_v2(to));
    }
    close_device();
}

} // namespace

const std::vector<Test> MULTIPROCESSOR_TESTS = {
    {"reduction", reduction},
    {"missing barrier", missing_barrier},
    {"transposition", transposition},
    {"tensor product", tensor_product},
    {"products of shared rows", products_of_shared_rows},
    {"copies and gates", copies_and_gates},
    {"warp collectives", warp_collectives},
    {"divergence", divergence},
    {"out of bounds in kernels", out_of_bounds_in_kernels},
    {"fresh memory is poison", fresh_memory_is_poison},
    {"blocks in any order", blocks_in_any_order},
};

int main() {
    for (const auto *tests : {&MULTIPROCESSOR_TESTS, &DRIVER_TESTS, &GRAPH_TESTS})
        for (const Test &test : *tests) {
            fakeCudaReset();
            test.run();
            std::printf("ok: %s\n", test.name);
            std::fflush(stdout);
        }
    return 0;
}
