// Rotary embedding of queries (in place) and keys, with an optional RMS norm of each head before it, and the write of
// keys and values into their pages.
#pragma once

#include "attention_types.h"
#include "elementwise.h"

namespace pd {

// out may be in. table: head_dim / 2 cosines, then as many sines, or null for no rotation. norm: weights or null.
template <typename T>
inline void rotate_head(const T* in, T* out, const float* table, int head_dim, const T* norm, float eps) {
    if (table == nullptr) {
        if (out != in) std::memcpy(static_cast<void*>(out), in, head_dim * sizeof(T));
        return;
    }
    const int half = head_dim / 2;
    const float factor =
        norm == nullptr ? 1.0f : 1.0f / std::sqrt(square_sum(in, head_dim) / static_cast<float>(head_dim) + eps);
    int i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Vec cosine = load(table + i), sine = load(table + half + i);
        Vec low = load(in + i), high = load(in + half + i);
        if (norm != nullptr) {
            low = low * factor * load(norm + i);
            high = high * factor * load(norm + half + i);
        }
        store(out + i, low * cosine - high * sine);
        store(out + half + i, high * cosine + low * sine);
    }
    for (; i < half; ++i) {
        const float cosine = table[i], sine = table[half + i];
        float low = to_float(in[i]), high = to_float(in[half + i]);
        if (norm != nullptr) {
            low *= factor * to_float(norm[i]);
            high *= factor * to_float(norm[half + i]);
        }
        out[i] = from_float<T>(low * cosine - high * sine);
        out[half + i] = from_float<T>(high * cosine + low * sine);
    }
}

// One token's row of qkv: queries rotated in place, keys and values to their slot in kv (one layer's pages).
template <typename T>
inline void rotate_and_write(const AttentionStep& step, int64_t token, T* qkv, T* kv, const T* q_norm,
                             const T* k_norm) {
    const int head_dim = step.head_dim;
    const int64_t width = static_cast<int64_t>(step.num_heads + 2 * step.num_kv_heads) * head_dim;
    const float* const table = step.rope == nullptr ? nullptr : step.rope + step.positions[token] * head_dim;
    T* at = qkv + token * width;
    for (int h = 0; h < step.num_heads; ++h, at += head_dim)
        rotate_head(at, at, table, head_dim, q_norm, step.norm_eps);
    const int64_t slot = step.slots[token], page = slot / step.page_size;
    const int64_t key_to_value = static_cast<int64_t>(step.page_size) * head_dim;
    T* to = kv + page * step.page_stride + (slot - page * step.page_size) * head_dim;
    for (int h = 0; h < step.num_kv_heads; ++h, at += head_dim, to += 2 * key_to_value) {
        rotate_head(at, to, table, head_dim, k_norm, step.norm_eps);
        std::memcpy(static_cast<void*>(to + key_to_value), at + step.num_kv_heads * head_dim, head_dim * sizeof(T));
    }
}

}  // namespace pd
