// Paged attention with an online softmax (Milakov and Gimelshein 2018; tiled as FlashAttention, Dao et al. 2022; keys
// split over threads as Flash-Decoding). One code path for decode, prompt chunks and mixed batches: a work item is a
// block of query tokens, all heads of one KV head, against a range of keys; tiles of keys are packed once per item.
#pragma once

#include <cmath>

#include "attention_types.h"
#include "plan.h"
#include "tile.h"

namespace pd {

constexpr float kNoScore = -1e30f;  // below any real score, and finite, so that differences stay numbers

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
    float* best;        // [block rows]: largest score so far
    float* sum;         // [block rows]: of exponentials so far
    Stored* padded;     // [2 * kTileKeys + 1, dims]: rows copied here when head_dim needs padding; the last is zero

    static int64_t bytes(int head_dim, int block_rows) {
        const int64_t dims = round_up(head_dim, Tile::kDims);
        const int64_t packed = block_rows * Tile::query_width(dims) + 2 * kTileKeys * dims;
        const int64_t floats = block_rows * (dims + 2);
        const int64_t stored = (2 * kTileKeys + 1) * dims;
        return round_up(packed * sizeof(Packed) + floats * sizeof(float) + stored * sizeof(Stored), 4096);
    }

    Workspace(char* at, int head_dim, int block_rows) : dims(round_up(head_dim, Tile::kDims)) {
        keys = reinterpret_cast<Packed*>(at);
        values = keys + kTileKeys * dims;
        queries = values + kTileKeys * dims;
        out = reinterpret_cast<float*>(queries + block_rows * Tile::query_width(dims));
        best = out + block_rows * dims;
        sum = best + block_rows;
        padded = reinterpret_cast<Stored*>(sum + block_rows);
        std::memset(static_cast<void*>(padded), 0, (2 * kTileKeys + 1) * dims * sizeof(Stored));
    }
};

// Folds one tile's scores of R rows into their running softmax and their outputs.
template <typename Tile, int R>
void fold_tile(Workspace<Tile>& work, int row, const int32_t* visible, int count, float scale) {
    alignas(64) float scores[R][kTileKeys];
    alignas(64) typename Tile::Packed p[R][Tile::kProbabilityWidth];
    float keep[kLanes] = {}, fresh[kLanes] = {};
    const int dims = work.dims;
    Tile::template scores<R>(work.queries + row * Tile::query_width(dims), work.keys, dims, scores);
    for (int r = 0; r < R; ++r) {
        Vec s[kTileVecs];
        for (int j = 0; j < kTileVecs; ++j) s[j] = load(scores[r] + j * kLanes) * scale;
        if (visible[r] < kTileKeys) {
            const VecInt lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
            for (int j = 0; j < kTileVecs; ++j) s[j] = lane + j * kLanes < visible[r] ? s[j] : splat(kNoScore);
        }
        const float top = lane_max(maximum(maximum(s[0], s[1]), maximum(s[2], s[3])));
        fresh[r] = top > work.best[row + r] ? top : work.best[row + r];
        Vec total{};
        for (int j = 0; j < kTileVecs; ++j) {
            // A hidden key's weight must be exactly nothing, which the clamped exponential alone would not give.
            s[j] = s[j] > splat(kNoScore) ? exponential(s[j] - fresh[r]) : Vec{};
            total += s[j];
        }
        Tile::pack_probabilities(s, p[r]);
        store(scores[r], total);
    }
    Vec old{};
    std::memcpy(&old, work.best + row, R * sizeof(float));
    store(keep, exponential(old - load(fresh)));
    for (int r = 0; r < R; ++r) {
        work.sum[row + r] = work.sum[row + r] * keep[r] + lane_sum(load(scores[r]));
        work.best[row + r] = fresh[r];
    }
    const auto* const weights = &p[0][0];
    float* const out = work.out + row * dims;
    int d = 0;
    for (; d + 4 * kLanes <= dims; d += 4 * kLanes)
        Tile::template accumulate<R, 4>(weights, work.values + d, count, dims, keep, out + d);
    for (; d + 2 * kLanes <= dims; d += 2 * kLanes)
        Tile::template accumulate<R, 2>(weights, work.values + d, count, dims, keep, out + d);
    for (; d < dims; d += kLanes) Tile::template accumulate<R, 1>(weights, work.values + d, count, dims, keep, out + d);
}

// Gathers keys [from, from + count) of one sequence and KV head from their pages and packs them.
template <typename Tile>
void load_tile(const AttentionStep& step, const typename Tile::Stored* head, const int32_t* pages, int from, int count,
               Workspace<Tile>& work) {
    using Stored = typename Tile::Stored;
    const Stored* keys[kTileKeys];
    const Stored* values[kTileKeys];
    const int64_t values_after = static_cast<int64_t>(step.page_size) * step.head_dim;
    for (int i = 0; i < count; ++i) {
        const int position = from + i, page = position / step.page_size;
        const Stored* const base = head + pages[page] * step.page_stride;
        keys[i] = base + static_cast<int64_t>(position - page * step.page_size) * step.head_dim;
        values[i] = keys[i] + values_after;
    }
    if (work.dims != step.head_dim) {
        for (int i = 0; i < count; ++i) {
            Stored* const key = work.padded + 2 * i * work.dims;
            std::memcpy(static_cast<void*>(key), keys[i], step.head_dim * sizeof(Stored));
            std::memcpy(static_cast<void*>(key + work.dims), values[i], step.head_dim * sizeof(Stored));
            keys[i] = key;
            values[i] = key + work.dims;
        }
    }
    const Stored* const zero = work.padded + 2 * kTileKeys * work.dims;
    for (int i = count; i < round_up(count, kLanes); ++i) keys[i] = values[i] = zero;
    Tile::pack_keys(keys, count, work.keys, work.dims);
    Tile::pack_values(values, count, work.values, work.dims);
}

template <typename Tile>
void fold_rows(Workspace<Tile>& work, int rows, int row, const int32_t* visible, int count, float scale) {
    switch (rows) {
        case 6: return fold_tile<Tile, 6>(work, row, visible, count, scale);
        case 5: return fold_tile<Tile, 5>(work, row, visible, count, scale);
        case 4: return fold_tile<Tile, 4>(work, row, visible, count, scale);
        case 3: return fold_tile<Tile, 3>(work, row, visible, count, scale);
        case 2: return fold_tile<Tile, 2>(work, row, visible, count, scale);
        default: return fold_tile<Tile, 1>(work, row, visible, count, scale);
    }
}

template <typename T>
void write_row(const float* from, float factor, T* to, int width) {
    int d = 0;
    for (; d + kLanes <= width; d += kLanes) store(to + d, load(from + d) * factor);
    for (; d < width; ++d) to[d] = from_float<T>(from[d] * factor);
}

inline float* partial_row(const AttentionStep& step, int partial, int kv_head, int row) {
    const int64_t rows = static_cast<int64_t>(step.block_tokens) * (step.num_heads / step.num_kv_heads);
    return step.partials + ((static_cast<int64_t>(partial) * step.num_kv_heads + kv_head) * rows + row) * (step.head_dim + 2);
}

// qkv [tokens, (heads + 2 kv_heads) * head_dim], rotated queries first; kv one layer's pages; out [tokens, heads * head_dim]
template <typename Tile>
void run_item(const AttentionStep& step, const WorkItem& item, int kv_head, const typename Tile::Stored* qkv,
              const typename Tile::Stored* kv, typename Tile::Stored* out, Workspace<Tile>& work) {
    const int group = step.num_heads / step.num_kv_heads, rows = item.query_count * group;
    const int head_dim = step.head_dim, dims = work.dims, first_head = kv_head * group;
    const int64_t qkv_width = static_cast<int64_t>(step.num_heads + 2 * step.num_kv_heads) * head_dim;
    for (int row = 0; row < rows; ++row) {
        const auto* query = qkv + (item.query_begin + row / group) * qkv_width + (first_head + row % group) * head_dim;
        if (dims != head_dim) {
            std::memcpy(static_cast<void*>(work.padded), query, head_dim * sizeof *query);
            query = work.padded;
        }
        Tile::pack_query(query, work.queries + row * Tile::query_width(dims), dims);
        work.best[row] = kNoScore;
        work.sum[row] = 0.0f;
    }
    std::memset(work.out, 0, static_cast<size_t>(rows) * dims * sizeof(float));

    const int32_t* const pages = step.page_table + static_cast<int64_t>(item.sequence) * step.max_pages;
    const auto* const head = kv + static_cast<int64_t>(kv_head) * 2 * step.page_size * head_dim;
    // The first query token of this item sees this many keys; each later one sees one more.
    const int sees = step.kv_lens[item.sequence] - step.query_start[item.sequence + 1] + item.query_begin + 1;
    for (int from = item.kv_begin; from < item.kv_end; from += kTileKeys) {
        const int count = std::min(kTileKeys, item.kv_end - from);
        load_tile<Tile>(step, head, pages, from, count, work);
        for (int row = 0; row < rows; row += kGroupRows) {
            const int here = std::min(kGroupRows, rows - row);
            int32_t visible[kGroupRows];
            for (int r = 0; r < here; ++r) visible[r] = std::min(count, sees + (row + r) / group - from);
            if (visible[here - 1] > 0) fold_rows<Tile>(work, here, row, visible, count, step.scale);
        }
    }

    for (int row = 0; row < rows; ++row) {
        if (item.partial < 0) {
            auto* const to = out + (static_cast<int64_t>(item.query_begin + row / group) * step.num_heads + first_head +
                                    row % group) * head_dim;
            write_row(work.out + row * dims, 1.0f / work.sum[row], to, head_dim);
        } else {
            float* const to = partial_row(step, item.partial, kv_head, row);
            std::memcpy(to, work.out + row * dims, head_dim * sizeof(float));
            to[head_dim] = work.best[row];
            to[head_dim + 1] = work.sum[row];
        }
    }
}

// Joins the partial results of one block's rows: weights exp(best_i - best), as in the online softmax itself.
template <typename T>
void run_merge(const AttentionStep& step, const Merge& merge, int kv_head, T* out, float* row_buffer) {
    const int group = step.num_heads / step.num_kv_heads, head_dim = step.head_dim;
    for (int row = 0; row < merge.query_count * group; ++row) {
        float best = kNoScore, sum = 0.0f;
        for (int i = 0; i < merge.num_partials; ++i)
            best = std::max(best, partial_row(step, merge.first_partial + i, kv_head, row)[head_dim]);
        std::memset(row_buffer, 0, head_dim * sizeof(float));
        for (int i = 0; i < merge.num_partials; ++i) {
            const float* const from = partial_row(step, merge.first_partial + i, kv_head, row);
            const float weight = from[head_dim + 1] > 0.0f ? std::exp(from[head_dim] - best) : 0.0f;
            sum += weight * from[head_dim + 1];
            for (int d = 0; d < head_dim; ++d) row_buffer[d] += weight * from[d];
        }
        T* const to = out + (static_cast<int64_t>(merge.query_begin + row / group) * step.num_heads + kv_head * group +
                             row % group) * head_dim;
        write_row(row_buffer, 1.0f / sum, to, head_dim);
    }
}

}  // namespace pd
