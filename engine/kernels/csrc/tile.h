// A tile: up to 64 keys and values of one KV head, gathered from their pages and packed for the inner loops, and
// those loops: scores = queries x keys, outputs += probabilities x values, for up to six query rows at a time.
//
// Keys are packed with one key per vector lane, so that scores need no sum across lanes; values with one dimension
// per lane. `FloatTile` computes in float32 whatever is stored; `PairTile` multiplies pairs of bfloat16
// (VDPBF16PS), so its packed elements are 32-bit pairs: of neighbouring dimensions in queries and keys, of
// neighbouring keys in values.
#pragma once

#include <algorithm>

#include "vec.h"

namespace pd {

constexpr int kTileKeys = 64;
constexpr int kTileVecs = kTileKeys / kLanes;
constexpr int kGroupRows = 6;  // 6 rows x 4 vectors of accumulators leave room for operands in 32 registers

// The memory wanted next, asked for a little at a time while tiles are computed: KV pages lie scattered, so the
// processor's own prefetching finds few of their lines. A little at a time, because only so many requests can be
// under way; and into the second-level cache, because the first has still fewer of them.
struct Ahead {
    struct Span {
        const char* begin;
        const char* end;
    };
    static constexpr int kCapacity = 6 * kTileKeys;
    Span spans[kCapacity];
    int count = 0;
    int now = 0;

    template <typename T>
    void add(const T* begin, int64_t elements) {
        if (now == count || count == kCapacity) now = count = 0;  // a full queue is too far behind to be of use
        spans[count++] = {reinterpret_cast<const char*>(begin), reinterpret_cast<const char*>(begin + elements)};
    }

    // The next four cache lines.
    [[gnu::always_inline]] void fetch() {
        if (now == count) return;
        const char* const at = spans[now].begin;
        for (int line = 0; line < 4; ++line) __builtin_prefetch(at + 64 * line, 0, 2);
        spans[now].begin = at + 256;
        now += at + 256 >= spans[now].end;
    }
};

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Sixteen vectors of sixteen 32-bit lanes, rows to columns.
inline void transpose(Vec (&rows)[kLanes]) {
#if defined(__AVX512F__)
    __m512 a[kLanes], b[kLanes];
    for (int i = 0; i < kLanes; ++i) a[i] = reinterpret_cast<__m512>(rows[i]);
    for (int i = 0; i < kLanes; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
        for (int j = 0; j < 2; ++j) {
            const __m512d low = _mm512_castps_pd(b[i + j]), high = _mm512_castps_pd(b[i + j + 2]);
            a[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            a[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for (int j = 0; j < 4; ++j) {  // now a[4 q + j] holds column j of each 4 x 4 block of rows 4 q .. 4 q + 3
        const __m512 t0 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0x88), t1 = _mm512_shuffle_f32x4(a[j], a[4 + j], 0xdd);
        const __m512 t2 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0x88);
        const __m512 t3 = _mm512_shuffle_f32x4(a[8 + j], a[12 + j], 0xdd);
        rows[j] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(t0, t2, 0x88));
        rows[4 + j] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(t1, t3, 0x88));
        rows[8 + j] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(t0, t2, 0xdd));
        rows[12 + j] = reinterpret_cast<Vec>(_mm512_shuffle_f32x4(t1, t3, 0xdd));
    }
#else
    float in[kLanes][kLanes], out[kLanes][kLanes];
    std::memcpy(in, rows, sizeof in);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) out[j][i] = in[i][j];
    std::memcpy(rows, out, sizeof out);
#endif
}

template <typename T>
struct FloatTile {
    using Stored = T;
    using Packed = float;
    static constexpr int kExpDegree = 6;
    static constexpr int kDims = kLanes;  // head dimensions are padded to a multiple of this

    // Packed elements of one query row, and of one row of probabilities.
    static int query_width(int dims) { return dims; }
    static constexpr int kProbabilityWidth = kTileKeys;

    static void pack_query(const T* row, float* out, int dims) {
        for (int d = 0; d < dims; d += kLanes) store(out + d, load(row + d));
    }

    static void pack_keys(const T* const* rows, int count, float* out, int dims, Ahead& ahead) {
        for (int first = 0; first < count; first += kLanes) {
            for (int d = 0; d < dims; d += kLanes) {
                ahead.fetch();
                ahead.fetch();
                Vec block[kLanes];
                for (int i = 0; i < kLanes; ++i) block[i] = load(rows[first + i] + d);
                transpose(block);
                for (int i = 0; i < kLanes; ++i) store(out + (d + i) * kTileKeys + first, block[i]);
            }
        }
    }

    static void pack_values(const T* const* rows, int count, float* out, int dims, Ahead& ahead) {
        for (int i = 0; i < count; ++i) {
            ahead.fetch();
            for (int d = 0; d < dims; d += kLanes) store(out + i * dims + d, load(rows[i] + d));
        }
    }

    static void pack_probabilities(const Vec (&p)[kTileVecs], float* out) {
        for (int j = 0; j < kTileVecs; ++j) store(out + j * kLanes, p[j]);
    }

    template <int R>
    [[gnu::always_inline]] static void scores(const float* queries, const float* keys, int dims,
                                              Vec (&out)[R][kTileVecs]) {
        Vec sum[R][kTileVecs];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kTileVecs; ++j) sum[r][j] = Vec{};
        for (int d = 0; d < dims; ++d) {
            Vec key[kTileVecs];
            for (int j = 0; j < kTileVecs; ++j) key[j] = load(keys + d * kTileKeys + j * kLanes);
            for (int r = 0; r < R; ++r) {
                const Vec query = splat(queries[r * dims + d]);
                for (int j = 0; j < kTileVecs; ++j) sum[r][j] += query * key[j];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kTileVecs; ++j) out[r][j] = sum[r][j];
    }

    // out[r][d .. d + 16 V) = out * keep[r] + p[r] x values
    template <int R, int V>
    static void accumulate(const float* p, const float* values, int count, int dims, const float* keep, float* out,
                           Ahead& ahead) {
        Vec sum[R][V];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) sum[r][j] = load(out + r * dims + j * kLanes) * keep[r];
        for (int i = 0; i < count; ++i) {
            ahead.fetch();
            Vec value[V];
            for (int j = 0; j < V; ++j) value[j] = load(values + i * dims + j * kLanes);
            for (int r = 0; r < R; ++r) {
                const Vec weight = splat(p[r * kTileKeys + i]);
                for (int j = 0; j < V; ++j) sum[r][j] += weight * value[j];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) store(out + r * dims + j * kLanes, sum[r][j]);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

struct PairTile {
    using Stored = BFloat16;
    using Packed = uint32_t;
    static constexpr int kExpDegree = 4;
    static constexpr int kDims = 2 * kLanes;

    static int query_width(int dims) { return dims / 2; }
    static constexpr int kProbabilityWidth = kTileKeys / 2;

    static void pack_query(const BFloat16* row, uint32_t* out, int dims) {
        std::memcpy(out, row, dims * sizeof *row);
    }

    static void pack_keys(const BFloat16* const* rows, int count, uint32_t* out, int dims, Ahead& ahead) {
        for (int first = 0; first < count; first += kLanes) {
            for (int d = 0; d < dims; d += kDims) {
                ahead.fetch();
                ahead.fetch();
                Vec block[kLanes];
                for (int i = 0; i < kLanes; ++i) std::memcpy(&block[i], rows[first + i] + d, sizeof block[i]);
                transpose(block);
                for (int i = 0; i < kLanes; ++i)
                    std::memcpy(out + (d / 2 + i) * kTileKeys + first, &block[i], sizeof block[i]);
            }
        }
    }

    static void pack_values(const BFloat16* const* rows, int count, uint32_t* out, int dims,
                            Ahead& ahead) {
        alignas(64) static constexpr uint16_t kLow[32] = {
            0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,  //
            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(kLow);
        const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int i = 0; i < count; i += 2) {
            if (i % 4 == 0) ahead.fetch();
            for (int d = 0; d < dims; d += kDims) {
                const __m512i even = _mm512_loadu_si512(rows[i] + d), odd = _mm512_loadu_si512(rows[i + 1] + d);
                uint32_t* const to = out + i / 2 * dims + d;
                _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, low, odd));
                _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(even, high, odd));
            }
        }
    }

    static void pack_probabilities(const Vec (&p)[kTileVecs], uint32_t* out) {
        for (int j = 0; j < kTileVecs; j += 2) {
            const __m512 low = reinterpret_cast<__m512>(p[j]), high = reinterpret_cast<__m512>(p[j + 1]);
            const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
            std::memcpy(out + j * kLanes / 2, &both, sizeof both);
        }
    }

    static __m512bh pair(uint32_t bits) {
        return reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(bits)));
    }

    static __m512bh pairs(const uint32_t* from) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from)); }

    template <int R>
    [[gnu::always_inline]] static void scores(const uint32_t* queries, const uint32_t* keys, int dims,
                                              Vec (&out)[R][kTileVecs]) {
        __m512 sum[R][kTileVecs];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kTileVecs; ++j) sum[r][j] = _mm512_setzero_ps();
        const int width = dims / 2;
        for (int d = 0; d < width; ++d) {
            __m512bh key[kTileVecs];
            for (int j = 0; j < kTileVecs; ++j) key[j] = pairs(keys + d * kTileKeys + j * kLanes);
            for (int r = 0; r < R; ++r) {
                const __m512bh query = pair(queries[r * width + d]);
                for (int j = 0; j < kTileVecs; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], query, key[j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < kTileVecs; ++j) out[r][j] = reinterpret_cast<Vec>(sum[r][j]);
    }

    template <int R, int V>
    static void accumulate(const uint32_t* p, const uint32_t* values, int count, int dims, const float* keep,
                           float* out, Ahead& ahead) {
        __m512 sum[R][V];
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j)
                sum[r][j] = _mm512_mul_ps(_mm512_loadu_ps(out + r * dims + j * kLanes), _mm512_set1_ps(keep[r]));
        for (int i = 0; i < (count + 1) / 2; ++i) {
            ahead.fetch();
            __m512bh value[V];
            for (int j = 0; j < V; ++j) value[j] = pairs(values + i * dims + j * kLanes);
            for (int r = 0; r < R; ++r) {
                const __m512bh weight = pair(p[r * kProbabilityWidth + i]);
                for (int j = 0; j < V; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], weight, value[j]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) _mm512_storeu_ps(out + r * dims + j * kLanes, sum[r][j]);
    }
};

using BFloat16Tile = PairTile;

#else

using BFloat16Tile = FloatTile<BFloat16>;

#endif

}  // namespace pd
