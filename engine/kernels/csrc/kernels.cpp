// The C ABI of the CPU kernels. Called through ctypes by engine/kernels/library.py; every pointer is the caller's, no
// state is kept between calls, and nothing throws across the boundary.
//
// dtype: 0 float32, 1 bfloat16, 2 float16. Arrays are dense and row-major unless said otherwise.

#include <omp.h>

#include <type_traits>

#include "decoder.h"

namespace pd {
namespace {

// Calls f(team) in each of the threads.
template <typename F>
void in_team(int threads, const F& f) {
    Meeting meeting;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Team team(meeting, omp_get_thread_num(), omp_get_num_threads());
        f(team);
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

// Only these are visible outside the library.
#pragma GCC visibility push(default)
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

// The size of a struct, so that a caller can see that it has the same one.
int64_t pd_struct_bytes(int32_t which) {
    const int64_t sizes[] = {sizeof(pd::AttentionStep), sizeof(pd::PackedLinear), sizeof(pd::DecoderLayer),
                             sizeof(pd::Decoder), sizeof(pd::DecoderBatch)};
    return sizes[which];
}

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

// qkv [tokens, (heads + 2 kv_heads) * head_dim] (its queries are rotated in place), the norms [head_dim] or null, out
// [tokens, heads * head_dim].
void pd_attend(const pd::AttentionStep* step, int64_t layer, void* qkv, const void* q_norm, const void* k_norm,
               void* out) {
    pd::with_type(step->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Tile = typename pd::TileFor<T>::Type;
        pd::in_team(step->num_threads, [&](pd::Team& team) {
            pd::attend_in_team<Tile>(team, *step, layer, static_cast<T*>(qkv), q_norm, k_norm, static_cast<T*>(out));
        });
    });
}

// Elements of the packed form of a weight [outputs, inputs], or 0 where pd_forward has no product for it.
int64_t pd_packed_elements(int32_t dtype, int64_t outputs, int64_t inputs, int32_t two_halves) {
    if (dtype > 1 || (dtype == 1 && inputs % 2 != 0) || (two_halves && outputs % 2 != 0)) return 0;
    return pd::Weight<float>{nullptr, nullptr, outputs, inputs, two_halves != 0}.panels() * pd::kPanel * inputs;
}

void pd_pack_linear(int32_t dtype, const void* weight, int64_t outputs, int64_t inputs, int32_t two_halves,
                    void* packed) {
    if (dtype == 0) {
        const pd::Weight<float> shape{nullptr, nullptr, outputs, inputs, two_halves != 0};
        pd::pack_weight(static_cast<const float*>(weight), shape, packed);
    } else {
        const pd::Weight<pd::BFloat16> shape{nullptr, nullptr, outputs, inputs, two_halves != 0};
        pd::pack_weight(static_cast<const pd::BFloat16*>(weight), shape, packed);
    }
}

// The logits of one planned batch; step->dtype is float32 or bfloat16.
void pd_forward(const pd::Decoder* model, const pd::AttentionStep* step, const pd::DecoderBatch* batch) {
    pd::in_team(step->num_threads, [&](pd::Team& team) {
        if (step->dtype == 0) {
            pd::forward_in_team<pd::FloatTile<float>>(team, *model, *step, *batch);
        } else {
            pd::forward_in_team<pd::BFloat16Tile>(team, *model, *step, *batch);
        }
    });
}
}
#pragma GCC visibility pop
