/* KV in 8 bits: blocks of numbers to a scale and signed bytes each, and back; int8_codec.py says how it is used.
 *
 * A block's scale is its largest finite magnitude / 127. What is not finite becomes the byte -128, and NaN on the way
 * back. Numbers are rounded to the nearest, ties to even.
 */

#include <stdint.h>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default"))) CLONES
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1 };
static const uint32_t MAGNITUDE = 0x7fffffffu, INFINITE = 0x7f800000u;

/* Masks and no branches: the compiler makes vectors of these loops only without any. */

INLINE uint32_t load(const void *restrict values, int64_t at, int type) {
    return type == BFLOAT16 ? (uint32_t)((const uint16_t *)values)[at] << 16 : ((const uint32_t *)values)[at];
}

INLINE float as_float(uint32_t bits) {
    union { uint32_t bits; float value; } both = {.bits = bits};
    return both.value;
}

INLINE uint32_t as_bits(float value) {
    union { float value; uint32_t bits; } both = {.value = value};
    return both.bits;
}

/* All ones for a finite number, else zero. */
INLINE uint32_t finite_mask(uint32_t bits) {
    return -(uint32_t)((int32_t)(bits & MAGNITUDE) < (int32_t)INFINITE);
}

INLINE void encode_block(const void *restrict values, int64_t count, int type, float *scale, int8_t *restrict codes) {
    int32_t largest = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = load(values, i, type);
        const int32_t magnitude = (int32_t)(bits & MAGNITUDE & finite_mask(bits));
        largest = magnitude > largest ? magnitude : largest;
    }
    const float most = as_float((uint32_t)largest), inverse = 127.0f / most;
    const int usable = finite_mask(as_bits(inverse)) != 0;
    const float factor = usable ? inverse : 0.0f, step = most / 127.0f;
    /* Where 127 steps, rounded, are more than the largest number there is, the next lower step. */
    const float fits = finite_mask(as_bits(step * 127.0f)) ? step : as_float(as_bits(step) - 1);
    *scale = usable ? fits : 0.0f;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = load(values, i, type), mask = finite_mask(bits);
        const float scaled = as_float(bits & mask) * factor;
        const float rounded = (scaled + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: the sum has no fraction left */
        codes[i] = (int8_t)(((int32_t)rounded & (int32_t)mask) | (-128 & (int32_t)~mask));
    }
}

INLINE void decode_block(const int8_t *restrict codes, int64_t count, int type, float scale, void *restrict values) {
    for (int64_t i = 0; i < count; i++) {
        const uint32_t mask = -(uint32_t)(codes[i] == -128);
        const uint32_t value = (as_bits((float)codes[i] * scale) & ~mask) | (0x7fc00000u & mask);
        if (type == BFLOAT16)
            ((uint16_t *)values)[i] = (uint16_t)((value + 0x7fffu + ((value >> 16) & 1)) >> 16);
        else
            ((uint32_t *)values)[i] = value;
    }
}

#define ENCODE(type, number)                                                                           \
    for (int64_t block = 0; block < blocks; block++)                                                   \
        encode_block((const number *)values + block * count, count, type, scales + block, codes + block * count)
#define DECODE(type, number)                                                                           \
    for (int64_t block = 0; block < blocks; block++)                                                   \
        decode_block(codes + block * count, count, type, scales[block], (number *)values + block * count)

/* `values` [blocks, count] to `scales` [blocks] and `codes` [blocks, count]. */
EXPORT void pd_encode_int8(
    const void *values, int64_t blocks, int64_t count, int type, float *scales, int8_t *codes) {
    if (type == BFLOAT16)
        ENCODE(BFLOAT16, uint16_t);
    else
        ENCODE(FLOAT32, uint32_t);
}

EXPORT void pd_decode_int8(
    const float *scales, const int8_t *codes, int64_t blocks, int64_t count, int type, void *values) {
    if (type == BFLOAT16)
        DECODE(BFLOAT16, uint16_t);
    else
        DECODE(FLOAT32, uint32_t);
}
