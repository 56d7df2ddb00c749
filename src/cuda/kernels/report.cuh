#pragma once
#include "device.cuh"

// What a pass has to tell; zeroed by the first kernel.
struct Report {
    // Rows: now in the recursions; that left them and are not done; that are done in this pass; whose
    // logits were computed.
    u32 flying;
    u32 waiting;
    u32 ready;
    u32 wanted;
    // Rows of the recursion that runs.
    u32 running;
    // 0, or what went wrong (src/cuda/mod.rs), and the slot of the row that did it.
    u32 error;
    u32 culprit;
    u32 entering;
};
