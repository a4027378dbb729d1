// Sixteen float lanes, on any processor, and the element types that load into them and store from them.
//
// Written with the vector extensions of GCC and Clang, so that one source serves AVX-512, AVX2 and NEON; intrinsics
// stand only where the compilers' own code was measurably worse.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace pd {

constexpr int kLanes = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecInt __attribute__((vector_size(64)));
typedef uint32_t VecBits __attribute__((vector_size(64)));
typedef uint16_t VecHalf __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

inline Vec splat(float value) { return value - Vec{}; }

// ---- one element ------------------------------------------------------------------------------------------------

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline float to_float(Float16 value) {
    _Float16 half;
    std::memcpy(&half, &value, sizeof half);
    return static_cast<float>(half);
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
    return value;
}

template <>
inline BFloat16 from_float<BFloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};  // round to nearest even
}

template <>
inline Float16 from_float<Float16>(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    Float16 out;
    std::memcpy(&out, &half, sizeof out);
    return out;
}

// ---- sixteen elements -------------------------------------------------------------------------------------------

inline Vec load(const float* from) {
    Vec out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

inline Vec load(const BFloat16* from) {
    VecHalf half;
    std::memcpy(&half, from, sizeof half);
    const VecBits bits = __builtin_convertvector(half, VecBits) << 16;
    Vec out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline void store(BFloat16* to, Vec value) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(value));
    std::memcpy(to, &half, sizeof half);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = from_float<BFloat16>(value[i]);
#endif
}

inline Vec load(const Float16* from) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
    Vec out;
    for (int i = 0; i < kLanes; ++i) out[i] = to_float(from[i]);
    return out;
#endif
}

inline void store(Float16* to, Vec value) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph(reinterpret_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
#else
    for (int i = 0; i < kLanes; ++i) to[i] = from_float<Float16>(value[i]);
#endif
}

// ---- across lanes and functions ---------------------------------------------------------------------------------

inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

inline float lane_sum(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(value));
#else
    float half[8];
    for (int i = 0; i < 8; ++i) half[i] = value[i] + value[i + 8];
    return ((half[0] + half[4]) + (half[2] + half[6])) + ((half[1] + half[5]) + (half[3] + half[7]));
#endif
}

inline float lane_max(Vec value) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(value));
#else
    float best = value[0];
    for (int i = 1; i < kLanes; ++i) best = value[i] > best ? value[i] : best;
    return best;
#endif
}

// 2 to the x for x <= 127, 0 or next to it far below: x = n + r with |r| <= 1/2, a polynomial for 2^r, then n into
// the exponent. Degree 6 is good to float32's last bits, degree 4 (relative error 4e-6) where bfloat16 follows. The
// polynomials interpolate 2^r at the Chebyshev nodes of [-1/2, 1/2].
template <int Degree>
inline Vec exp2(Vec x) {
    static_assert(Degree == 4 || Degree == 6, "no such polynomial here");
#if defined(__AVX512F__)
    const Vec n = reinterpret_cast<Vec>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#else
    x = x > splat(-126.0f) ? x : splat(-126.0f);
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding and taking it away rounds to an integer
    const Vec n = (x + magic) - magic;
#endif
    const Vec r = x - n;
    Vec p;
    if constexpr (Degree == 6) {
        p = splat(0.0001546144469f);
        p = p * r + 0.001340042818f;
        p = p * r + 0.009618056679f;
        p = p * r + 0.05550327227f;
        p = p * r + 0.2402265092f;
        p = p * r + 0.6931472067f;
        p = p * r + 1.0f;
    } else {
        p = splat(0.009666368515f);
        p = p * r + 0.05592197584f;
        p = p * r + 0.2402234904f;
        p = p * r + 0.6931210452f;
        p = p * r + 1.0f;
    }
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
    const VecInt power = (__builtin_convertvector(n, VecInt) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

// e to the x for |x| < 87.
inline Vec exponential(Vec x) {
    x = x < splat(87.0f) ? x : splat(87.0f);
    return exp2<6>(x * kLog2E);
}

// x / (1 + e^-x); with Brief to about 14 bits, where the result is rounded to 8 or 11 anyway.
template <bool Brief>
inline Vec silu(Vec x) {
#if defined(__AVX512F__)
    if constexpr (Brief) {
        const Vec floor = splat(-87.0f);
        const Vec power = exp2<4>((x > floor ? x : floor) * -kLog2E);
        return x * reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(1.0f + power)));
    }
#endif
    return x / (1.0f + exponential(-x));
}

}  // namespace pd
