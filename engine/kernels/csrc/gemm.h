// y = x w^T for a few to a few thousand rows of x, with w packed once in panels of 32 outputs.
//
// A panel holds, for each input (or pair of inputs), its 32 weights side by side: two vectors that up to twelve
// rows of x share, one output column per lane. With one row this streams the weights at the speed of memory; with
// many, each panel stays in the second-level cache while blocks of rows pass by. What happens to a finished row of
// a panel is the epilogue's business, so that sums go straight into residuals, activations or logits.
#pragma once

#include <algorithm>

#include "team.h"
#include "vec.h"

namespace pd {

constexpr int kPanel = 2 * kLanes;
constexpr int kPanelRows = 12;        // 12 rows x 2 vectors of sums leave room for operands in 32 registers
constexpr int64_t kBlockBytes = 640 << 10;  // of x that should stay in the second-level cache over all panels

// Weights are asked of memory this far ahead, by more than kStreamRows rows: fewer read them as fast as memory
// gives, and the processor's own prefetching does that better.
constexpr int kPrefetchBytes = 8192;
constexpr int kStreamRows = 4;

template <int R>
[[gnu::always_inline]] inline void prefetch_weights(const void* panel) {
    if constexpr (R > kStreamRows) {
        __builtin_prefetch(static_cast<const char*>(panel) + kPrefetchBytes, 0, 2);
        __builtin_prefetch(static_cast<const char*>(panel) + kPrefetchBytes + 64, 0, 2);
    }
}

template <int R>
[[gnu::always_inline]] inline void copy_sums(const Vec (&from)[R][2], Vec (&to)[R][2]) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        to[r][0] = from[r][0];
        to[r][1] = from[r][1];
    }
}

// Multiplies float32 by FMA.
struct FloatProduct {
    using Element = float;
    using Packed = float;
    static constexpr int kInputs = 1;  // inputs in one packed element

    static float pack(const float* weights) { return *weights; }

    template <int R>
    [[gnu::always_inline]] static void multiply(const float* x, int64_t stride, const float* panel, int64_t steps,
                                                Vec (&out)[R][2]) {
        Vec sum[R][2];  // not `out` itself, which the compiler would keep up to date in memory
        copy_sums(out, sum);
        for (int64_t k = 0; k < steps; ++k, panel += kPanel) {
            const Vec w0 = load(panel), w1 = load(panel + kLanes);
            prefetch_weights<R>(panel);
            for (int r = 0; r < R; ++r) {
                const Vec value = splat(x[r * stride + k]);
                sum[r][0] += value * w0;
                sum[r][1] += value * w1;
            }
        }
        copy_sums(sum, out);
    }
};

// Multiplies pairs of bfloat16, by VDPBF16PS where there is one.
struct PairProduct {
    using Element = BFloat16;
    using Packed = uint32_t;
    static constexpr int kInputs = 2;

    static uint32_t pack(const BFloat16* weights) {
        return weights[0].bits | static_cast<uint32_t>(weights[1].bits) << 16;
    }

    static Vec accumulate(Vec sum, uint32_t value, VecBits weights) {
#if defined(__AVX512BF16__)
        return reinterpret_cast<Vec>(_mm512_dpbf16_ps(
            reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(value))),
            reinterpret_cast<__m512bh>(weights)));
#else
        const VecBits low = weights << 16, high = weights & 0xffff0000u;
        Vec w0, w1;
        std::memcpy(&w0, &low, sizeof w0);
        std::memcpy(&w1, &high, sizeof w1);
        return sum + w0 * to_float(BFloat16{static_cast<uint16_t>(value)}) +
               w1 * to_float(BFloat16{static_cast<uint16_t>(value >> 16)});
#endif
    }

    template <int R>
    [[gnu::always_inline]] static void multiply(const BFloat16* x, int64_t stride, const uint32_t* panel,
                                                int64_t steps, Vec (&out)[R][2]) {
        Vec sum[R][2];
        copy_sums(out, sum);
        for (int64_t k = 0; k < steps; ++k, panel += kPanel) {
            VecBits w0, w1;
            std::memcpy(&w0, panel, sizeof w0);
            std::memcpy(&w1, panel + kLanes, sizeof w1);
            prefetch_weights<R>(panel);
            for (int r = 0; r < R; ++r) {
                uint32_t value;
                std::memcpy(&value, x + r * stride + 2 * k, sizeof value);
                sum[r][0] = accumulate(sum[r][0], value, w0);
                sum[r][1] = accumulate(sum[r][1], value, w1);
            }
        }
        copy_sums(sum, out);
    }
};

template <typename T>
struct ProductFor;
template <>
struct ProductFor<float> {
    using Type = FloatProduct;
};
template <>
struct ProductFor<BFloat16> {
    using Type = PairProduct;
};

// A packed weight and its bias. With two_halves, outputs 0 .. n/2 and n/2 .. n (gate and up) lie side by side: the
// low lanes of panel p are outputs 16 p .., its high lanes the same outputs of the second half.
template <typename T>
struct Weight {
    const void* packed;
    const T* bias;  // [outputs], or null
    int64_t outputs;
    int64_t inputs;  // even where kInputs is 2
    bool two_halves;

    int64_t panels() const {
        return two_halves ? (outputs / 2 + kLanes - 1) / kLanes : (outputs + kPanel - 1) / kPanel;
    }

    // The output in one lane of a panel, or -1 in the padding.
    int64_t output(int64_t panel, int lane) const {
        if (!two_halves) return panel * kPanel + lane < outputs ? panel * kPanel + lane : -1;
        const int64_t within = panel * kLanes + lane % kLanes;
        return within < outputs / 2 ? within + lane / kLanes * (outputs / 2) : -1;
    }
};

// weight [outputs, inputs] into panels; `packed` has room for panels() * kPanel * inputs elements of T.
template <typename T>
void pack_weight(const T* weight, const Weight<T>& shape, void* packed) {
    using Product = typename ProductFor<T>::Type;
    auto* to = static_cast<typename Product::Packed*>(packed);
    for (int64_t panel = 0; panel < shape.panels(); ++panel) {
        for (int64_t k = 0; k < shape.inputs; k += Product::kInputs) {
            for (int lane = 0; lane < kPanel; ++lane) {
                const int64_t row = shape.output(panel, lane);
                *to++ = row < 0 ? typename Product::Packed{} : Product::pack(weight + row * shape.inputs + k);
            }
        }
    }
}

template <typename T, int R, typename Epilogue>
void multiply_rows(const T* x, const Weight<T>& weight, int64_t panel, int64_t first_row, const Epilogue& epilogue) {
    using Product = typename ProductFor<T>::Type;
    const int64_t steps = weight.inputs / Product::kInputs;
    const auto* const packed = static_cast<const typename Product::Packed*>(weight.packed) + panel * steps * kPanel;
    Vec start[2] = {};
    if (weight.bias != nullptr) {
        for (int lane = 0; lane < kPanel; ++lane) {
            const int64_t output = weight.output(panel, lane);
            start[lane / kLanes][lane % kLanes] = output < 0 ? 0.0f : to_float(weight.bias[output]);
        }
    }
    Vec sum[R][2];
    for (int r = 0; r < R; ++r) {
        sum[r][0] = start[0];
        sum[r][1] = start[1];
    }
    Product::template multiply<R>(x + first_row * weight.inputs, weight.inputs, packed, steps, sum);
    for (int r = 0; r < R; ++r) epilogue(first_row + r, panel, sum[r][0], sum[r][1]);
}

template <typename T, typename Epilogue>
void multiply_any_rows(int rows, const T* x, const Weight<T>& weight, int64_t panel, int64_t first,
                       const Epilogue& epilogue) {
    switch (rows) {
        case 12: return multiply_rows<T, 12>(x, weight, panel, first, epilogue);
        case 11: return multiply_rows<T, 11>(x, weight, panel, first, epilogue);
        case 10: return multiply_rows<T, 10>(x, weight, panel, first, epilogue);
        case 9: return multiply_rows<T, 9>(x, weight, panel, first, epilogue);
        case 8: return multiply_rows<T, 8>(x, weight, panel, first, epilogue);
        case 7: return multiply_rows<T, 7>(x, weight, panel, first, epilogue);
        case 6: return multiply_rows<T, 6>(x, weight, panel, first, epilogue);
        case 5: return multiply_rows<T, 5>(x, weight, panel, first, epilogue);
        case 4: return multiply_rows<T, 4>(x, weight, panel, first, epilogue);
        case 3: return multiply_rows<T, 3>(x, weight, panel, first, epilogue);
        case 2: return multiply_rows<T, 2>(x, weight, panel, first, epilogue);
        default: return multiply_rows<T, 1>(x, weight, panel, first, epilogue);
    }
}

// x [rows, inputs]. Called by all threads of a team; ends with a barrier.
template <typename T, typename Epilogue>
void multiply(Team& team, const T* x, int64_t rows, const Weight<T>& weight, const Epilogue& epilogue) {
    const int64_t panels = weight.panels(), row_bytes = weight.inputs * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(kPanelRows, kBlockBytes / row_bytes), blocks = (rows + most - 1) / most;
    team.share(blocks * panels, [&](int64_t unit) {
        const int64_t block = unit / panels, begin = rows * block / blocks, end = rows * (block + 1) / blocks;
        const int64_t groups = (end - begin + kPanelRows - 1) / kPanelRows;
        for (int64_t group = 0; group < groups; ++group) {  // of nearly equal size, so that none is left with one row
            const int64_t from = begin + (end - begin) * group / groups;
            const int64_t to = begin + (end - begin) * (group + 1) / groups;
            multiply_any_rows(static_cast<int>(to - from), x, weight, unit % panels, from, epilogue);
        }
    });
    team.barrier();
}

// ---- epilogues --------------------------------------------------------------------------------------------------

// Two finished vectors of one row into columns [panel * 32, ..) of a row-major array, the last panel maybe cut short.
template <typename Out, typename F>
inline void into_columns(Out* row, int64_t width, int64_t panel, Vec low, Vec high, const F& combine) {
    Out* const to = row + panel * kPanel;
    if ((panel + 1) * kPanel <= width) {
        combine(to, low);
        combine(to + kLanes, high);
        return;
    }
    Out buffer[kPanel];
    const int64_t left = width - panel * kPanel;
    std::copy(to, to + left, buffer);
    combine(buffer, low);
    combine(buffer + kLanes, high);
    std::copy(buffer, buffer + left, to);
}

template <typename Out>
struct Store {
    Out* out;
    int64_t width;

    void operator()(int64_t row, int64_t panel, Vec low, Vec high) const {
        const auto set = [](Out* to, Vec value) { store(to, value); };
        into_columns(out + row * width, width, panel, low, high, set);
    }
};

struct AddTo {
    float* out;
    int64_t width;

    void operator()(int64_t row, int64_t panel, Vec low, Vec high) const {
        const auto add = [](float* to, Vec value) { store(to, load(to) + value); };
        into_columns(out + row * width, width, panel, low, high, add);
    }
};

// For a weight of two halves, gate and up.
template <typename Out>
struct SiluMul {
    Out* out;
    int64_t width;

    void operator()(int64_t row, int64_t panel, Vec gate, Vec up) const {
        const Vec value = silu<sizeof(Out) == 2>(gate) * up;
        Out* const to = out + row * width + panel * kLanes;
        if ((panel + 1) * kLanes <= width) return store(to, value);
        Out buffer[kLanes];
        store(buffer, value);
        std::copy(buffer, buffer + (width - panel * kLanes), to);
    }
};

}  // namespace pd
