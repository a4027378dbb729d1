// The C ABI of the sampling kernel, called through ctypes by engine/sampling/kernel.py. Logits are float32
// [rows, vocab], dense; out is int64 [rows], -1 for a row without a finite logit. No state, no exceptions.

#include <omp.h>

#include "sampling.h"

// Only these are visible outside the library.
#pragma GCC visibility push(default)
extern "C" {

// Floats of scratch that each thread of the functions below needs.
int64_t pd_scratch_floats(int64_t vocab) { return 2 * (vocab + pd::kLanes); }

// The first maximum of each row.
void pd_greedy(const float* logits, int64_t rows, int64_t vocab, int64_t* out, int32_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) out[row] = pd::first_argmax(logits + row * vocab, vocab);
}

// draws [rows]; masks [rows] or null, null for a row without one; scratch [threads, pd_scratch_floats(vocab)].
void pd_draw(const float* logits, int64_t rows, int64_t vocab, const pd::DrawParams* draws,
             const uint32_t* const* masks, float* scratch, int64_t* out, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        float* const own = scratch + omp_get_thread_num() * pd_scratch_floats(vocab);
        const uint32_t* const bits = masks == nullptr ? nullptr : masks[row];
        out[row] = pd::draw_token(logits + row * vocab, bits, vocab, draws[row], own);
    }
}

// For each row its log(sum(exp)) in sums [rows], and its `count` likeliest tokens and their logits [rows, count].
// scratch [threads, pd_scratch_floats(vocab)].
void pd_likeliest(const float* logits, int64_t rows, int64_t vocab, int64_t count, float* scratch, double* sums,
                  int64_t* tokens, float* values, int32_t threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && rows > 1)
    for (int64_t row = 0; row < rows; ++row) {
        float* const own = scratch + omp_get_thread_num() * pd_scratch_floats(vocab);
        sums[row] = pd::likeliest(logits + row * vocab, vocab, count, own, tokens + row * count, values + row * count);
    }
}
}
#pragma GCC visibility pop
