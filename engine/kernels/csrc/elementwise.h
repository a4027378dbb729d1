// RMS norm with the residual addition, and SiLU times the other half: one pass over memory each.
#pragma once

#include <cmath>

#include "vec.h"

namespace pd {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 32 << 10;

template <typename T>
inline float square_sum(const T* row, int64_t width) {
    Vec sum{};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) {
        const Vec value = load(row + i);
        sum += value * value;
    }
    float total = lane_sum(sum);
    for (; i < width; ++i) total += to_float(row[i]) * to_float(row[i]);
    return total;
}

template <typename From, typename T>
inline void scale_by_weight(const From* row, const T* weight, float factor, T* out, int64_t width) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(out + i, load(row + i) * factor * load(weight + i));
    for (; i < width; ++i) out[i] = from_float<T>(to_float(row[i]) * factor * to_float(weight[i]));
}

template <typename T>
inline void add_into(T* residual, const T* x, int64_t width) {
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) store(residual + i, load(residual + i) + load(x + i));
    for (; i < width; ++i) residual[i] = from_float<T>(to_float(residual[i]) + to_float(x[i]));
}

template <typename T>
void add_rms_norm(const T* x, T* residual, const T* weight, T* out, int64_t rows, int64_t width, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * width >= kParallelElements)
    for (int64_t row = 0; row < rows; ++row) {
        T* const kept = residual + row * width;
        if (x != nullptr) add_into(kept, x + row * width, width);
        const float factor = 1.0f / std::sqrt(square_sum(kept, width) / static_cast<float>(width) + eps);
        scale_by_weight(kept, weight, factor, out + row * width, width);
    }
}

template <typename T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && rows * width >= kParallelElements)
    for (int64_t row = 0; row < rows; ++row) {
        const T* const gate = gate_up + row * 2 * width;
        const T* const up = gate + width;
        T* const to = out + row * width;
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            const Vec g = load(gate + i);
            store(to + i, silu<sizeof(T) == 2>(g) * load(up + i));
        }
        for (; i < width; ++i) {
            const float g = to_float(gate[i]);
            to[i] = from_float<T>(g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    }
}

}  // namespace pd
