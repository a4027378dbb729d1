// The C ABI of the CPU kernels. Called through ctypes by engine/kernels/library.py; every pointer is the caller's, no
// state is kept between calls, and nothing throws across the boundary.
//
// dtype: 0 float32, 1 bfloat16, 2 float16. Arrays are dense and row-major unless said otherwise.

#include <omp.h>

#include <type_traits>

#include "attention.h"
#include "elementwise.h"
#include "rope.h"

namespace pd {
namespace {

template <typename Tile>
void attend(const AttentionStep& step, typename Tile::Stored* qkv, typename Tile::Stored* kv,
            const typename Tile::Stored* q_norm, const typename Tile::Stored* k_norm, typename Tile::Stored* out) {
    const int block_rows = step.block_tokens * (step.num_heads / step.num_kv_heads);
    const int64_t workspace_bytes = Workspace<Tile>::bytes(step.head_dim, block_rows);
#pragma omp parallel num_threads(step.num_threads) if (step.num_threads > 1)
    {
        char* const scratch = step.scratch + omp_get_thread_num() * workspace_bytes;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < step.num_tokens; ++token)
            rotate_and_write(step, token, qkv, kv, q_norm, k_norm);

        Workspace<Tile> work(scratch, step.head_dim, block_rows);
#pragma omp for schedule(dynamic, 1)
        for (int unit = 0; unit < step.num_items * step.num_kv_heads; ++unit)
            run_item<Tile>(step, step.items[unit / step.num_kv_heads], unit % step.num_kv_heads, qkv, kv, out, work);

        if (step.num_merges > 0) {
#pragma omp for schedule(static)
            for (int unit = 0; unit < step.num_merges * step.num_kv_heads; ++unit)
                run_merge(step, step.merges[unit / step.num_kv_heads], unit % step.num_kv_heads, out, work.out);
        }
    }
}

// Calls f with a null pointer of the element type, to choose its instance.
template <typename F>
void with_type(int32_t dtype, F f) {
    if (dtype == 0) {
        f(static_cast<float*>(nullptr));
    } else if (dtype == 1) {
        f(static_cast<BFloat16*>(nullptr));
    } else {
        f(static_cast<Float16*>(nullptr));
    }
}

template <typename T>
struct TileFor {
    using Type = FloatTile<T>;
};
template <>
struct TileFor<BFloat16> {
    using Type = BFloat16Tile;
};

}  // namespace
}  // namespace pd

extern "C" {

// residual [rows, width] += x [rows, width] (unless null); out = residual / rms(residual) * weight [width].
void pd_add_rms_norm(int32_t dtype, const void* x, void* residual, const void* weight, void* out, int64_t rows,
                     int64_t width, float eps, int32_t threads) {
    pd::with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pd::add_rms_norm(static_cast<const T*>(x), static_cast<T*>(residual), static_cast<const T*>(weight),
                         static_cast<T*>(out), rows, width, eps, threads);
    });
}

// gate_up [rows, 2 * width]; out [rows, width] = silu(gate) * up.
void pd_silu_mul(int32_t dtype, const void* gate_up, void* out, int64_t rows, int64_t width, int32_t threads) {
    pd::with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pd::silu_mul(static_cast<const T*>(gate_up), static_cast<T*>(out), rows, width, threads);
    });
}

// The size of AttentionStep, so that a caller can see that it has the same one.
int64_t pd_step_bytes() { return sizeof(pd::AttentionStep); }

// Query tokens in one block of attention, for `group` query heads to a KV head.
int32_t pd_block_tokens(int32_t group) { return std::max(1, pd::kBlockRows / group); }

// Bytes of scratch that each thread of pd_attend needs.
int64_t pd_scratch_bytes(int32_t dtype, int32_t head_dim, int32_t group) {
    const int block_rows = pd_block_tokens(group) * group;
    int64_t bytes = 0;
    pd::with_type(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        bytes = pd::Workspace<typename pd::TileFor<T>::Type>::bytes(head_dim, block_rows);
    });
    return bytes;
}

// Fills items, merges and their counts from the batch; 0, or the item capacity needed when it is too small.
int32_t pd_plan(pd::AttentionStep* step) { return pd::plan(*step); }

// qkv [tokens, (heads + 2 kv_heads) * head_dim] (its queries are rotated in place), kv one layer's pages, the norms
// [head_dim] or null, out [tokens, heads * head_dim].
void pd_attend(const pd::AttentionStep* step, void* qkv, void* kv, const void* q_norm, const void* k_norm, void* out) {
    pd::with_type(step->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        pd::attend<typename pd::TileFor<T>::Type>(*step, static_cast<T*>(qkv), static_cast<T*>(kv),
                                                  static_cast<const T*>(q_norm), static_cast<const T*>(k_norm),
                                                  static_cast<T*>(out));
    });
}
}
