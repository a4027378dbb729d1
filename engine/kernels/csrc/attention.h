// Paged attention with an online softmax (Milakov and Gimelshein 2018; tiled as FlashAttention, Dao et al. 2022; keys
// split over threads as Flash-Decoding). One code path for decode, prompt chunks and mixed batches: a work item is a
// block of query tokens, all heads of one KV head, against a range of keys; tiles of keys are packed once per item.
#pragma once

#include <cmath>

#include "attention_types.h"
#include "plan.h"
#include "tile.h"

namespace pd {

// A hidden key's score, and the best score of a row that has seen no key yet. Both are finite, so that differences
// stay numbers, and so far apart that a hidden key weighs exactly nothing even where no other key is seen.
constexpr float kHidden = -1e30f;
constexpr float kNoBest = -1e20f;

// One thread's buffers, carved out of its share of step.scratch.
template <typename Tile>
struct Workspace {
    using Packed = typename Tile::Packed;
    using Stored = typename Tile::Stored;
    int dims;           // head_dim, padded
    Packed* queries;    // [block rows, query_width]
    Packed* keys;       // [dims, kTileKeys] in Packed units
    Packed* values;     // [kTileKeys, dims] in Packed units
    float* out;         // [block rows, dims]
    float* best;        // [block rows]: largest score so far, times log2(e)
    float* totals;      // [block rows, head_dim + 2]: joined sections, each row as in step.partials
    float* sums;        // [block rows, kLanes]: of exponentials so far, lane by lane
    Stored* padded;     // [2 * kTileKeys + 1, dims]: rows copied here when head_dim needs padding; the last is zero

    static int64_t bytes(int head_dim, int block_rows) {
        const int64_t dims = round_up(head_dim, Tile::kDims);
        const int64_t packed = block_rows * Tile::query_width(dims) + 2 * kTileKeys * dims;
        const int64_t floats = block_rows * (dims + kLanes + 1 + head_dim + 2);
        const int64_t stored = (2 * kTileKeys + 1) * dims;
        return round_up(packed * sizeof(Packed) + floats * sizeof(float) + stored * sizeof(Stored), 4096);
    }

    Workspace(char* at, int head_dim, int block_rows) : dims(round_up(head_dim, Tile::kDims)) {
        keys = reinterpret_cast<Packed*>(at);
        values = keys + kTileKeys * dims;
        queries = values + kTileKeys * dims;
        out = reinterpret_cast<float*>(queries + block_rows * Tile::query_width(dims));
        sums = out + block_rows * dims;
        best = sums + block_rows * kLanes;
        totals = best + block_rows;
        padded = reinterpret_cast<Stored*>(totals + block_rows * (head_dim + 2));
        // What is copied into the padded rows leaves their last dimensions as they are now.
        const int64_t kept = dims == head_dim ? 2 * kTileKeys * dims : 0;
        std::memset(static_cast<void*>(padded + kept), 0, ((2 * kTileKeys + 1) * dims - kept) * sizeof(Stored));
    }
};

// Folds one tile's scores of R rows into their running softmax and their outputs. Scores are kept times log2(e), so
// that exponentials are powers of two; `factor` holds both scales.
template <typename Tile, int R>
void fold_tile(Workspace<Tile>& work, int row, const int32_t* visible, int count, float factor,
               Ahead& ahead) {
    alignas(64) typename Tile::Packed p[R][Tile::kProbabilityWidth];
    alignas(64) float fresh[kLanes] = {}, keep[kLanes];
    const int dims = work.dims;
    Vec s[R][kTileVecs];
    Tile::template scores<R>(work.queries + row * Tile::query_width(dims), work.keys, dims, s);
    for (int r = 0; r < R; ++r) {
        if (visible[r] < kTileKeys) {
            const VecInt lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            for (int j = 0; j < kTileVecs; ++j) s[r][j] = lane + j * kLanes < visible[r] ? s[r][j] : splat(kHidden);
        }
        const float top = lane_max(maximum(maximum(s[r][0], s[r][1]), maximum(s[r][2], s[r][3]))) * factor;
        fresh[r] = top > work.best[row + r] ? top : work.best[row + r];
    }
    Vec old{};
    std::memcpy(&old, work.best + row, R * sizeof(float));
    store(keep, exp2<Tile::kExpDegree>(old - load(fresh)));
    std::memcpy(work.best + row, fresh, R * sizeof(float));
    for (int r = 0; r < R; ++r) {
        for (int j = 0; j < kTileVecs; ++j) s[r][j] = exp2<Tile::kExpDegree>(s[r][j] * factor - fresh[r]);
        float* const sums = work.sums + (row + r) * kLanes;
        store(sums, load(sums) * keep[r] + ((s[r][0] + s[r][1]) + (s[r][2] + s[r][3])));
        Tile::pack_probabilities(s[r], p[r]);
    }
    const auto* const weights = &p[0][0];
    float* const out = work.out + row * dims;
    int d = 0;
    for (; d + 4 * kLanes <= dims; d += 4 * kLanes)
        Tile::template accumulate<R, 4>(weights, work.values + d, count, dims, keep, out + d, ahead);
    for (; d + 2 * kLanes <= dims; d += 2 * kLanes)
        Tile::template accumulate<R, 2>(weights, work.values + d, count, dims, keep, out + d, ahead);
    for (; d < dims; d += kLanes)
        Tile::template accumulate<R, 1>(weights, work.values + d, count, dims, keep, out + d, ahead);
}

// One KV head of a work item.
struct Unit {
    const WorkItem* item;
    int kv_head;
};

inline Unit unit_of(const AttentionStep& step, int64_t index) {
    return {step.items + index / step.num_kv_heads, static_cast<int>(index % step.num_kv_heads)};
}

// Calls f(i, keys, values, n) for each run of n neighbouring positions, i of them before it, in the tile of `unit`
// that begins at position `from`; returns how many positions the tile has.
template <typename Stored, typename F>
int for_each_run(const AttentionStep& step, const Stored* kv, const Unit& unit, int from, const F& f) {
    const int32_t* const pages = step.page_table + static_cast<int64_t>(unit.item->sequence) * step.max_pages;
    const int64_t half = static_cast<int64_t>(step.page_size) * step.head_dim;
    const Stored* const head = kv + 2 * half * unit.kv_head;
    const int count = std::min(kTileKeys, unit.item->kv_end - from);
    for (int i = 0; i < count;) {
        const int page = (from + i) / step.page_size, offset = from + i - page * step.page_size;
        const int run = std::min(count - i, step.page_size - offset);
        const Stored* const keys = head + pages[page] * step.page_stride + int64_t{offset} * step.head_dim;
        f(i, keys, keys + half, run);
        i += run;
    }
    return count;
}

// Notes the tile after the next of this thread as wanted soon, where the one at hand begins at `from`.
template <typename Stored>
void look_ahead(const AttentionStep& step, const Stored* kv, const Unit& unit, const Unit* next, int from,
                Ahead& ahead) {
    const Unit* which = &unit;
    int wanted = from + 2 * kTileKeys;
    if (wanted >= unit.item->kv_end) {
        if (next == nullptr) return;
        which = next;
        wanted = next->item->kv_begin + (from + kTileKeys < unit.item->kv_end ? 0 : kTileKeys);
        if (wanted >= next->item->kv_end) return;
    }
    for_each_run(step, kv, *which, wanted, [&](int, const Stored* keys, const Stored* values, int run) {
        ahead.add(keys, static_cast<int64_t>(run) * step.head_dim);
        ahead.add(values, static_cast<int64_t>(run) * step.head_dim);
    });
}

// Packs the tile of `unit` that begins at position `from`; returns how many keys it has.
template <typename Tile>
int load_tile(const AttentionStep& step, const typename Tile::Stored* kv, const Unit& unit, int from,
              Workspace<Tile>& work, Ahead& ahead) {
    using Stored = typename Tile::Stored;
    const int dims = work.dims, head_dim = step.head_dim;
    const Stored* keys[kTileKeys];
    const Stored* values[kTileKeys];
    const int count = for_each_run(step, kv, unit, from, [&](int i, const Stored* key, const Stored* value, int run) {
        for (const int until = i + run; i < until; ++i, key += head_dim, value += head_dim) {
            keys[i] = key;
            values[i] = value;
        }
    });
    if (dims != head_dim) {
        for (int i = 0; i < count; ++i) {
            Stored* const copy = work.padded + 2 * i * dims;
            std::memcpy(static_cast<void*>(copy), keys[i], head_dim * sizeof(Stored));
            std::memcpy(static_cast<void*>(copy + dims), values[i], head_dim * sizeof(Stored));
            keys[i] = copy;
            values[i] = copy + dims;
        }
    }
    const Stored* const zero = work.padded + 2 * kTileKeys * dims;
    for (int i = count; i < round_up(count, kLanes); ++i) keys[i] = values[i] = zero;
    Tile::pack_keys(keys, count, work.keys, dims, ahead);
    Tile::pack_values(values, count, work.values, dims, ahead);
    return count;
}

template <typename Tile>
void fold_rows(Workspace<Tile>& work, int rows, int row, const int32_t* visible, int count, float factor,
               Ahead& ahead) {
    switch (rows) {
        case 6: return fold_tile<Tile, 6>(work, row, visible, count, factor, ahead);
        case 5: return fold_tile<Tile, 5>(work, row, visible, count, factor, ahead);
        case 4: return fold_tile<Tile, 4>(work, row, visible, count, factor, ahead);
        case 3: return fold_tile<Tile, 3>(work, row, visible, count, factor, ahead);
        case 2: return fold_tile<Tile, 2>(work, row, visible, count, factor, ahead);
        default: return fold_tile<Tile, 1>(work, row, visible, count, factor, ahead);
    }
}

template <typename T>
void write_row(const float* from, float factor, T* to, int width) {
    int d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d) * factor);
    for (; d < width; ++d) to[d] = from_float<T>(from[d] * factor);
}

inline float* partial_row(const AttentionStep& step, int partial, int kv_head, int row) {
    const int64_t block_rows = step.block_tokens * (step.num_heads / step.num_kv_heads);
    const int64_t index = (int64_t{partial} * step.num_kv_heads + kv_head) * block_rows + row;
    return step.partials + index * (step.head_dim + 2);
}

// A row of results is [head_dim] sums of weighted values, then the largest score, then the sum of weights.
inline void clear_row(float* row, int head_dim) {
    std::memset(row, 0, head_dim * sizeof(float));
    row[head_dim] = kNoBest;
    row[head_dim + 1] = 0.0f;
}

// Joins a section's results to those of the sections before it. One function that is never inlined, so that
// rounding is the same for all its callers.
[[gnu::noinline]] inline void join_row(float* total, const float* values, float best, float sum, int head_dim) {
    const float most = std::max(total[head_dim], best);
    const float old_weight = std::exp2(total[head_dim] - most), new_weight = std::exp2(best - most);
    for (int d = 0; d < head_dim; ++d) total[d] = total[d] * old_weight + values[d] * new_weight;
    total[head_dim] = most;
    total[head_dim + 1] = total[head_dim + 1] * old_weight + sum * new_weight;
}

template <typename Tile>
void start_section(Workspace<Tile>& work, int rows) {
    std::fill_n(work.best, rows, kNoBest);
    std::memset(work.out, 0, static_cast<size_t>(rows) * work.dims * sizeof(float));
    std::memset(work.sums, 0, static_cast<size_t>(rows) * kLanes * sizeof(float));
}

// Joins the section just attended to with those before it, or puts it where run_merge will find it.
template <typename Tile>
void end_section(const AttentionStep& step, const Unit& unit, int section, int rows, Workspace<Tile>& work) {
    const int head_dim = step.head_dim;
    for (int row = 0; row < rows; ++row) {
        const float* const values = work.out + row * work.dims;
        const float sum = lane_sum(load(work.sums + row * kLanes));
        if (unit.item->partial < 0) {
            join_row(work.totals + row * (head_dim + 2), values, work.best[row], sum, head_dim);
        } else {
            float* const to = partial_row(step, unit.item->partial + section, unit.kv_head, row);
            std::memcpy(to, values, head_dim * sizeof(float));
            to[head_dim] = work.best[row];
            to[head_dim + 1] = sum;
        }
    }
}

// qkv [tokens, (heads + 2 kv_heads) * head_dim], rotated queries first; kv one layer's pages; out [tokens, heads *
// head_dim]. `next` is the unit this thread is likely to do after this one, or null.
template <typename Tile>
void run_unit(const AttentionStep& step, const Unit& unit, const Unit* next, const typename Tile::Stored* qkv,
              const typename Tile::Stored* kv, typename Tile::Stored* out, Workspace<Tile>& work, Ahead& ahead) {
    const WorkItem& item = *unit.item;
    const int group = step.num_heads / step.num_kv_heads, rows = item.query_count * group;
    const int head_dim = step.head_dim, dims = work.dims, first_head = unit.kv_head * group;
    const int64_t qkv_width = static_cast<int64_t>(step.num_heads + 2 * step.num_kv_heads) * head_dim;
    for (int row = 0; row < rows; ++row) {
        const int64_t token = item.query_begin + row / group;
        const auto* query = qkv + token * qkv_width + (first_head + row % group) * head_dim;
        if (dims != head_dim) {
            std::memcpy(static_cast<void*>(work.padded), query, head_dim * sizeof *query);
            query = work.padded;
        }
        Tile::pack_query(query, work.queries + row * Tile::query_width(dims), dims);
        clear_row(work.totals + row * (head_dim + 2), head_dim);
    }

    // The first query token of this item sees this many keys; each later one sees one more.
    const int sees = step.kv_lens[item.sequence] - step.query_start[item.sequence + 1] + item.query_begin + 1;
    for (int from = item.kv_begin; from < item.kv_end; from += kTileKeys) {
        if (from % kSectionKeys == 0) start_section(work, rows);
        look_ahead(step, kv, unit, next, from, ahead);
        const int count = load_tile(step, kv, unit, from, work, ahead);
        for (int row = 0; row < rows; row += kGroupRows) {
            const int here = std::min(kGroupRows, rows - row);
            int32_t visible[kGroupRows];
            for (int r = 0; r < here; ++r) visible[r] = std::min(count, sees + (row + r) / group - from);
            if (visible[here - 1] > 0) fold_rows<Tile>(work, here, row, visible, count, step.scale * kLog2E, ahead);
        }
        if ((from + kTileKeys) % kSectionKeys == 0 || from + kTileKeys >= item.kv_end)
            end_section(step, unit, (from - item.kv_begin) / kSectionKeys, rows, work);
    }

    for (int row = 0; item.partial < 0 && row < rows; ++row) {
        const float* const total = work.totals + row * (head_dim + 2);
        const int64_t token = item.query_begin + row / group, head = first_head + row % group;
        write_row(total, 1.0f / total[head_dim + 1], out + (token * step.num_heads + head) * head_dim, head_dim);
    }
}

// Joins the sections of one block's rows, as run_unit does where it sees them all. `total` has room for one row.
template <typename T>
void run_merge(const AttentionStep& step, const Merge& merge, int kv_head, T* out, float* total) {
    const int group = step.num_heads / step.num_kv_heads, head_dim = step.head_dim;
    for (int row = 0; row < merge.query_count * group; ++row) {
        clear_row(total, head_dim);
        for (int i = 0; i < merge.num_partials; ++i) {
            const float* const from = partial_row(step, merge.first_partial + i, kv_head, row);
            join_row(total, from, from[head_dim], from[head_dim + 1], head_dim);
        }
        const int64_t token = merge.query_begin + row / group, head = kv_head * group + row % group;
        write_row(total, 1.0f / total[head_dim + 1], out + (token * step.num_heads + head) * head_dim, head_dim);
    }
}

}  // namespace pd
