// Choosing one token per row of logits: temperature, top-k, top-p, min-p, Gumbel noise, argmax.
//
// Does what engine/sampling/choose.py does with torch, row by row, so that a row's token never depends on its
// neighbours. Two things make it fast. The filters are one threshold, found among the few tokens near the maximum
// instead of by sorting the vocabulary. And the noise's logarithms are taken only for tokens that can still win:
// -log(1 - u) bounds Gumbel noise -log(-log(u)) from above, and the exponent of 1 - u bounds that in turn.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "vec.h"

namespace pd {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kScanBlock = 512;

struct DrawParams {
    float temperature;
    int32_t top_k;      // 0: every token
    float top_p;        // 1: every token
    float min_p_log;    // -inf: every token
    uint32_t key0, key1;
};

// ---- maximum --------------------------------------------------------------------------------------------------------

// First index of the maximum; -1 unless it is finite. NaN is below everything.
inline int64_t first_argmax(const float* values, int64_t size) {
    float best = -kInfinity;
    int64_t best_block = -1;
    for (int64_t start = 0; start < size; start += kScanBlock) {
        const int64_t end = std::min<int64_t>(start + kScanBlock, size);
        Vec lanes = splat(-kInfinity);
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) lanes = maximum(load(values + i), lanes);
        float block_best = lane_max(lanes);
        for (; i < end; ++i) block_best = values[i] > block_best ? values[i] : block_best;
        if (block_best > best) {
            best = block_best;
            best_block = start;
        }
    }
    if (best_block < 0 || best == kInfinity) return -1;
    int64_t index = best_block;
    while (!(values[index] == best)) ++index;
    return index;
}

struct Extremes {
    float greatest, least;
};

// scaled = logits / temperature, NaN becoming -inf. So does what a mask leaves out, which need not be read: `bits` has a
// word for each 32 tokens, the lowest bit first.
template <bool kMasked>
inline Extremes scale_row(const float* logits, const uint32_t* bits, float temperature, float* scaled, int64_t size) {
    static_assert(32 % kLanes == 0);
    VecBits lanes;
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    const auto mask_from = [bits](int64_t i) { return bits[i / 32] >> (i % 32); };
    Vec greatest = splat(-kInfinity), below = splat(-kInfinity);  // `below` is the greatest of the negatives
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        if (kMasked && (mask_from(i) & ((uint64_t{1} << kLanes) - 1)) == 0) {
            store(scaled + i, splat(-kInfinity));
            below = splat(kInfinity);
            continue;
        }
        Vec value = load(logits + i) / splat(temperature);
        value = value == value ? value : splat(-kInfinity);
        if (kMasked) value = ((mask_from(i) - VecBits{}) >> lanes & 1) != VecBits{} ? value : splat(-kInfinity);
        store(scaled + i, value);
        greatest = maximum(value, greatest);
        below = maximum(-value, below);
    }
    Extremes found{lane_max(greatest), -lane_max(below)};
    for (; i < size; ++i) {
        const float value = logits[i] / temperature;
        const bool kept = !kMasked || (mask_from(i) & 1);
        scaled[i] = kept && value == value ? value : -kInfinity;
        found = {std::max(found.greatest, scaled[i]), std::min(found.least, scaled[i])};
    }
    return found;
}

// ---- filters --------------------------------------------------------------------------------------------------------

// Copies the values at or above `cut` to `out`, which has room for kLanes more; returns how many.
inline int64_t collect(const float* values, int64_t size, float cut, float* out) {
    int64_t count = 0;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const Vec value = load(values + i);
#if defined(__AVX512F__)
        const __m512 lanes = reinterpret_cast<__m512>(value);
        const __mmask16 kept = _mm512_cmp_ps_mask(lanes, _mm512_set1_ps(cut), _CMP_GE_OQ);
        if (kept == 0) continue;
        _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(kept, lanes));
        count += __builtin_popcount(kept);
#else
        if (lane_max(value) < cut) continue;
        for (int lane = 0; lane < kLanes; ++lane) {
            out[count] = value[lane];
            count += value[lane] >= cut;
        }
#endif
    }
    for (; i < size; ++i)
        if (values[i] >= cut) out[count++] = values[i];
    return count;
}

// Sum of exp(values - best), in double between blocks.
inline double exponential_sum(const float* values, int64_t size, float best) {
    double total = 0;
    for (int64_t start = 0; start < size; start += kScanBlock) {
        const int64_t end = std::min<int64_t>(start + kScanBlock, size);
        Vec lanes = {};
        int64_t i = start;
        for (; i + kLanes <= end; i += kLanes) {
            const Vec exponent = load(values + i) - splat(best);
            const Vec mass = exponential(exponent);
            lanes += exponent > splat(-87.0f) ? mass : Vec{};  // `exponential` clamps there
        }
        total += lane_sum(lanes);
        for (; i < end; ++i) total += std::exp(static_cast<double>(values[i]) - best);
    }
    return total;
}

// The lowest value that top-p keeps: the values above it have less mass than `needed`, it and they have that much.
// Returns +inf when all values together have less, so that the answer lies below them. The values lie within `span` of
// `best`. Their mass is summed by bins of value, and only the bin in which the sum crosses is sorted, at its start.
inline float nucleus_edge(float* values, int64_t count, float best, float span, double needed) {
    constexpr int kBins = 1024;
    double mass[kBins] = {};
    const Vec per_bin = splat(kBins / std::max(span, 1e-6f));
    const auto bin_of = [&](Vec value) {
        const Vec bin = (splat(best) - value) * per_bin;
        return __builtin_convertvector(bin < splat(kBins - 1) ? bin : splat(kBins - 1), VecInt);
    };
    for (int64_t i = 0; i < count; i += kLanes) {
        for (int64_t pad = count; pad < i + kLanes; ++pad) values[pad] = -kInfinity;
        const Vec value = load(values + i);
        const Vec exponent = value - splat(best);
        const Vec weight = exponent > splat(-87.0f) ? exponential(exponent) : Vec{};  // it clamps there
        const VecInt bin = bin_of(value);
        for (int lane = 0; lane < kLanes; ++lane) mass[bin[lane]] += weight[lane];
    }
    double above = 0;
    int crossing = 0;
    while (crossing < kBins && above + mass[crossing] < needed) above += mass[crossing++];
    if (crossing == kBins) return kInfinity;
    int64_t inside = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
        const Vec value = load(values + i);
        const VecInt bin = bin_of(value);
        for (int lane = 0; lane < kLanes; ++lane) {
            values[inside] = value[lane];
            inside += bin[lane] == crossing && i + lane < count;
        }
    }
    std::sort(values, values + inside, std::greater<float>());
    for (int64_t i = 0; i < inside; ++i) {
        above += std::exp(static_cast<double>(values[i]) - best);
        if (above >= needed) return values[i];
    }
    return values[inside - 1];  // the sum by bins had crossed: rounding alone is between
}

// The lowest scaled logit that all filters keep. `found` is scratch of `size + kLanes` floats. The search begins with what
// lies within `reach` of the maximum and reaches further only when that was not enough.
inline float threshold_of(const float* scaled, int64_t size, float best, const DrawParams& draw, float* found) {
    float threshold = best + draw.min_p_log;
    const bool by_rank = draw.top_k > 0 && draw.top_k < size;
    const bool by_mass = draw.top_p < 1.0f;
    if (!by_rank && !by_mass) return threshold;
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    double mass = by_rank ? 0 : exponential_sum(scaled, size, best);
    for (float reach = 6.0f;; reach *= 2) {
        const bool everything = reach > 1000.0f;
        int64_t count = collect(scaled, size, everything ? kLowest : best - reach, found);
        if (by_rank) {
            if (count < draw.top_k && !everything) continue;
            const int64_t rank = std::min<int64_t>(draw.top_k, count) - 1;
            std::nth_element(found, found + rank, found + count, std::greater<float>());
            const float edge = found[rank];
            threshold = std::max(threshold, edge);
            if (!by_mass) return threshold;
            count = std::partition(found, found + count, [edge](float value) { return value >= edge; }) - found;
            mass = exponential_sum(found, count, best);
        }
        const float span = best - *std::min_element(found, found + count);
        const float edge = nucleus_edge(found, count, best, span, draw.top_p * mass);
        if (edge < kInfinity) return std::max(threshold, edge);
        if (by_rank || everything) return threshold;  // rounding left the sum of all a little under top_p
    }
}

// ---- noise ----------------------------------------------------------------------------------------------------------

// The 32 random bits of a token; see engine/sampling/noise.py. For VecBits and uint32_t alike.
template <typename Bits>
inline Bits noise_bits(Bits token, uint32_t key0, uint32_t key1) {
    Bits bits = token ^ key0;
    bits = (bits ^ (bits >> 17)) * 0xED5AD4BBu;
    bits = (bits ^ (bits >> 11)) + key1;
    bits = bits * 0xAC4C1B51u;
    bits = (bits ^ (bits >> 15)) * 0x31848BABu;
    return bits ^ (bits >> 14);
}

inline bool any_lane(VecInt flags) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(flags), reinterpret_cast<__m512i>(flags)) != 0;
#else
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= flags[lane];
    return any != 0;
#endif
}

inline double gumbel(uint32_t bits) { return -std::log(-std::log((bits + 0.5) * 0x1p-32)); }

// Index of the maximum of scaled + noise among the values at or above `threshold`, which is finite. Where few of them
// are, `kFew` saves the others their noise.
template <bool kFew>
inline int64_t noisy_argmax(const float* scaled, int64_t size, float best, float threshold, const DrawParams& draw) {
    constexpr float kLeastNoise = -3.2f;  // gumbel(0) is -3.13
    constexpr float kLn2 = 0.69314718f;
    double winning = static_cast<double>(best) + kLeastNoise;
    int64_t winner = -1;
    const float margin = 1e-3f + 1e-6f * std::fabs(best);
    const auto weigh = [&](int64_t token, uint32_t bits) {
        const double value = scaled[token] + gumbel(bits);
        if (value > winning) {
            winning = value;
            winner = token;
        }
    };
    VecBits tokens;
    for (int lane = 0; lane < kLanes; ++lane) tokens[lane] = lane;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes, tokens += kLanes) {
        const Vec value = load(scaled + i);
        const VecInt kept = value >= splat(threshold);
        if (kFew && !any_lane(kept)) continue;
        const VecBits bits = noise_bits(tokens, draw.key0, draw.key1);
        // Half of 2^32 * (1 - u) as a float: its exponent field is the floor of its log2, plus 127.
        const Vec half = __builtin_convertvector((VecInt)(~bits >> 1), Vec);
        VecInt field;
        std::memcpy(&field, &half, sizeof field);
        const Vec halvings = __builtin_convertvector((32 - 1 + 127) - (field >> 23), Vec);
        const Vec reachable = value + halvings * kLn2 + margin;
        const Vec bar = splat(static_cast<float>(winning));
        const VecInt possible = (reachable >= bar) & kept;
        if (!any_lane(possible)) continue;
        for (int lane = 0; lane < kLanes; ++lane)
            if (possible[lane]) weigh(i + lane, bits[lane]);
    }
    for (; i < size; ++i)
        if (scaled[i] >= threshold) weigh(i, noise_bits(static_cast<uint32_t>(i), draw.key0, draw.key1));
    return winner;
}

// The token of one row, among those of its mask, if it has one; -1 where no logit is finite. `scratch` holds
// 2 * size + 2 * kLanes floats.
inline int64_t draw_token(const float* logits, const uint32_t* bits, int64_t size, const DrawParams& draw,
                          float* scratch) {
    const bool greedy = draw.temperature == 0.0f;
    if (greedy && bits == nullptr) return first_argmax(logits, size);
    const float temperature = greedy ? 1.0f : draw.temperature;
    const auto [best, least] = bits == nullptr ? scale_row<false>(logits, bits, temperature, scratch, size)
                                               : scale_row<true>(logits, bits, temperature, scratch, size);
    if (greedy) return first_argmax(scratch, size);
    if (!std::isfinite(best)) return -1;
    constexpr float kLowest = std::numeric_limits<float>::lowest();
    const float threshold = std::max(kLowest, threshold_of(scratch, size, best, draw, scratch + size + kLanes));
    if (least >= threshold) return noisy_argmax<false>(scratch, size, best, threshold, draw);
    return noisy_argmax<true>(scratch, size, best, threshold, draw);  // a filter or a mask has left something out
}

// ---- log-probabilities ----------------------------------------------------------------------------------------------

// Returns log(sum(exp(logits))) and fills the `count` likeliest tokens and their logits, best first, equal ones by
// id; places beyond the finite logits get token -1. scratch holds 2 * size + 2 * kLanes floats.
inline double likeliest(const float* logits, int64_t size, int64_t count, float* scratch, int64_t* tokens,
                        float* values) {
    float* const found = scratch + size + kLanes;
    const float best = scale_row<false>(logits, nullptr, 1.0f, scratch, size).greatest;
    std::fill(tokens, tokens + count, -1);
    std::fill(values, values + count, -kInfinity);
    if (!std::isfinite(best)) return best;
    float edge = best;
    for (float reach = 6.0f; count > 1; reach *= 2) {
        const bool everything = reach > 1000.0f;
        const float cut = everything ? std::numeric_limits<float>::lowest() : best - reach;
        const int64_t near = collect(scratch, size, cut, found);
        if (near < count && !everything) continue;
        const int64_t rank = std::min(count, near) - 1;
        std::nth_element(found, found + rank, found + near, std::greater<float>());
        edge = found[rank];
        break;
    }
    int64_t kept = 0;
    for (int64_t start = 0; count > 0 && start < size; start += kLanes) {
        const int64_t end = std::min<int64_t>(start + kLanes, size);
        if (end - start == kLanes && lane_max(load(scratch + start)) < edge) continue;
        for (int64_t i = start; i < end; ++i) {
            if (scratch[i] < edge || (kept == count && scratch[i] <= values[kept - 1])) continue;
            int64_t place = kept < count ? kept++ : count - 1;
            for (; place > 0 && values[place - 1] < scratch[i]; --place) {
                values[place] = values[place - 1];
                tokens[place] = tokens[place - 1];
            }
            values[place] = scratch[i];
            tokens[place] = i;
        }
    }
    return best + std::log(exponential_sum(scratch, size, best));
}

}  // namespace pd
