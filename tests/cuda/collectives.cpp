/*
 * What the lanes of a warp do together, once all lanes of the mask have arrived.
 */
#include "fibers.h"

#include <vector>

namespace mor_emulated {

// GCC 12 has _Float16 in C++ for x86-64 only, and __fp16 for ARM.
#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

float half_to_float(uint16_t bits) {
    Half half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}

uint16_t float_to_half(float value) {
    const Half half = Half(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}

namespace {

float half_of_pair(uint32_t pair, unsigned which) {
    return half_to_float(uint16_t(pair >> 16 * which));
}

/**
 * The fragments of m16n8k16: with g = lane / 4 and t = lane % 4, the lane holds
 * A: rows g (registers 0, 2) and g + 8 (1, 3), columns 2t, 2t + 1 (0, 1) and 2t + 8, 2t + 9 (2, 3);
 * B: column g, rows 2t, 2t + 1 (register 0) and 2t + 8, 2t + 9 (1);
 * D: rows g (0, 1) and g + 8 (2, 3), columns 2t, 2t + 1.
 */
void mma_m16n8k16(Fiber *warp) {
    float a[16][16], b[16][8], d[16][8];
    for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned g = lane / 4, t = lane % 4;
        const Exchange &e = *warp[lane].exchange;
        for (unsigned i = 0; i < 2; i++) {
            for (unsigned r = 0; r < 4; r++)
                a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = half_of_pair(e.a[r], i);
            for (unsigned r = 0; r < 2; r++) b[2 * t + r * 8 + i][g] = half_of_pair(e.b[r], i);
            for (unsigned r = 0; r < 2; r++) d[g + r * 8][2 * t + i] = e.d[2 * r + i];
        }
    }
    // The product of two halves is a float without rounding.
    for (unsigned row = 0; row < 16; row++)
        for (unsigned k = 0; k < 16; k++)
            for (unsigned column = 0; column < 8; column++)
                d[row][column] += a[row][k] * b[k][column];
    for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned i = 0; i < 4; i++)
            warp[lane].exchange->d[i] = d[lane / 4 + i / 2 * 8][2 * (lane % 4) + i % 2];
}

uint32_t reduced(const Exchange &e, uint32_t x, uint32_t y) {
    const bool less = e.is_signed ? int32_t(x) < int32_t(y) : x < y;
    switch (e.operation) {
    case Operation::ReduceAdd: return x + y;
    case Operation::ReduceMin: return less ? x : y;
    case Operation::ReduceMax: return less ? y : x;
    case Operation::ReduceAnd: return x & y;
    case Operation::ReduceOr: return x | y;
    default: return x ^ y;
    }
}

/** A product that a lane has begun. */
struct Begun {
    float (*d)[4];
    unsigned count;
    uint32_t a[4];
    uint64_t b;
    bool adds;
};
/** What the threads of the block have begun; the last batch is open. */
std::vector<std::vector<Begun>> begun[MAX_THREADS];

/**
 * Four bytes of row `row` of B, `at` bytes behind its first column, of rows of columns (K-major) in 128-byte swizzle:
 * eight rows are 1 KiB, and bits 4 to 6 of an address are changed by bits 7 to 9 (PTX manual, wgmma).
 */
uint32_t word_of(uint64_t description, unsigned row, unsigned at) {
    const auto field = [&](unsigned bit) { return unsigned(description >> bit & 0x3fff) << 4; };
    if (description >> 62 != 1 || (description >> 49 & 7)) trap("wgmma: not the layout that is known here");
    unsigned place = field(0) + row / 8 * field(32) + row % 8 * 128 + at;
    place ^= (place >> 7) % 8 << 4;
    uint32_t word;
    std::memcpy(&word, dynamic_shared + (place - SHARED_BEGIN), 4);
    return word;
}

void multiply(const Begun &p) {
    const unsigned g = current->lane / 4, t = current->lane % 4;
    for (unsigned c = 0; c < p.count; c++) {
        const uint32_t b[2] = {word_of(p.b, 8 * c + g, 4 * t), word_of(p.b, 8 * c + g, 4 * t + 16)};
        if (!p.adds) std::memset(p.d[c], 0, sizeof(p.d[c]));
        mor_emulated_mma_m16n8k16(p.d[c], p.a, b);
    }
}

/** A copy that a lane has begun, and the batches that it has closed after it. */
struct Copy {
    void *to;
    const void *from;
    unsigned bytes, batch;
    bool wanted;
};
struct Copies {
    std::vector<Copy> all;
    unsigned closed = 0;
};
Copies copies[MAX_THREADS];

Copies &copies_here() { return copies[static_cast<Fiber *>(current)->index]; }

/** Carries out those of the batches before number `batch`, which are the first of all. */
void copy_before(Copies &of, unsigned batch) {
    size_t count = 0;
    while (count < of.all.size() && of.all[count].batch < batch) count++;
    for (size_t i = count; i-- > 0;) {
        const Copy &copy = of.all[i];
        if (copy.wanted)
            std::memcpy(copy.to, copy.from, copy.bytes);
        else
            std::memset(copy.to, 0, copy.bytes);
    }
    of.all.erase(of.all.begin(), of.all.begin() + count);
}

std::vector<std::vector<Begun>> &begun_here() { return begun[static_cast<Fiber *>(current)->index]; }

} // namespace

bool is_multiplying(const Fiber &fiber) { return !begun[fiber.index].empty(); }
bool is_copying(const Fiber &fiber) { return !copies[fiber.index].all.empty(); }

void complete(Fiber *warp, unsigned mask) {
    const auto in_mask = [mask](unsigned lane) { return mask >> lane & 1u; };
    const unsigned first = unsigned(__builtin_ctz(mask));
    const Exchange &e = *warp[first].exchange;
    switch (e.operation) {
    case Operation::Sync: return;
    case Operation::Mma: mma_m16n8k16(warp); return;
    case Operation::Shuffle:
        for (unsigned lane = first; lane < WARP; lane++) {
            if (!in_mask(lane)) continue;
            Exchange &to = *warp[lane].exchange;
            if (to.source >= WARP || !in_mask(to.source))
                fail(&warp[lane],
                     "calls %s (%s:%d): it reads lane %u, which mask %08x does not name", to.name,
                     to.file, to.line, to.source, mask);
            to.result = warp[to.source].exchange->value;
        }
        return;
    default: break;
    }
    uint32_t ballot = 0, total = e.value;
    for (unsigned lane = first; lane < WARP; lane++) {
        if (!in_mask(lane)) continue;
        if (warp[lane].exchange->value) ballot |= 1u << lane;
        if (lane != first) total = reduced(e, total, warp[lane].exchange->value);
    }
    const uint32_t result = e.operation == Operation::Ballot ? ballot
                            : e.operation == Operation::Any  ? ballot != 0
                            : e.operation == Operation::All  ? ballot == mask
                                                             : total;
    for (unsigned lane = first; lane < WARP; lane++)
        if (in_mask(lane)) warp[lane].exchange->result = result;
}

} // namespace mor_emulated

void mor_emulated_wgmma(float (*d)[4], unsigned count, const uint32_t a[4], uint64_t b, bool adds) {
    auto &batches = mor_emulated::begun_here();
    if (batches.empty()) batches.emplace_back();
    batches.back().push_back({d, count, {a[0], a[1], a[2], a[3]}, b, adds});
}

void mor_emulated_wgmma_commit() { mor_emulated::begun_here().emplace_back(); }

void mor_emulated_wgmma_wait(unsigned count) {
    auto &batches = mor_emulated::begun_here();
    while (batches.size() > count + 1) {
        const auto products = batches.front();
        batches.erase(batches.begin());
        for (const auto &product : products) mor_emulated::multiply(product);
    }
    // Only an open batch without products is left.
    if (batches.size() == 1 && batches.front().empty()) batches.clear();
}

void mor_emulated_begin_copy(void *to, const void *from, unsigned bytes, bool wanted) {
    auto &of = mor_emulated::copies_here();
    of.all.push_back({to, from, bytes, of.closed, wanted});
}

void mor_emulated_close_copies() { mor_emulated::copies_here().closed++; }

void mor_emulated_wait_for_copies(unsigned batches) {
    auto &of = mor_emulated::copies_here();
    mor_emulated::copy_before(of, of.closed < batches ? 0 : of.closed - batches);
}

void mor_emulated_finish_copies() {
    auto &of = mor_emulated::copies_here();
    mor_emulated::copy_before(of, of.closed + 1);
}
