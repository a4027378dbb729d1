// Divides a batch's attention into work items of about equal cost, once per step and for every layer.
#pragma once

#include <algorithm>
#include <vector>

#include "attention_types.h"
#include "tile.h"

namespace pd {

// Rows (query tokens times heads of a group) that share one pass over the keys.
constexpr int kBlockRows = 48;
// Keys are attended to in sections of this many, each with a softmax of its own, joined in order. Work is split
// between sections only, and they are joined by the same arithmetic wherever that happens: so a token's output does
// not depend, to the last bit, on its batch, on how its prompt was cut into chunks, or on the number of threads.
constexpr int kSectionKeys = 8 * kTileKeys;
// Work items of average cost for each thread: enough to even out, few enough to stay cheap.
constexpr int kItemsPerThread = 4;
// Packing a key costs about as much as this many rows of it.
constexpr int kPackRows = 6;

inline int64_t block_cost(int64_t rows, int64_t keys) { return (rows + kPackRows) * keys; }

// Fills items, merges and their counts. Returns 0, or the capacity needed when the arrays are too small.
inline int32_t plan(AttentionStep& step) {
    const int group = step.num_heads / step.num_kv_heads;
    const int block = step.block_tokens;
    struct Block {
        int32_t sequence, begin, count, keys;
        int64_t cost;
    };
    std::vector<Block> blocks;
    int64_t total = 0;
    for (int32_t s = 0; s < step.num_seqs; ++s) {
        const int32_t first = step.query_start[s], end = step.query_start[s + 1];
        const int32_t before = step.kv_lens[s] - (end - first);
        for (int32_t begin = first; begin < end; begin += block) {
            const int32_t count = std::min(block, end - begin);
            const int32_t keys = before + (begin - first) + count;
            blocks.push_back({s, begin, count, keys, block_cost(count * group, keys)});
            total += blocks.back().cost;
        }
    }
    // Long blocks first, so that the short ones fill the threads' last gaps.
    std::stable_sort(blocks.begin(), blocks.end(), [](const Block& a, const Block& b) { return a.cost > b.cost; });
    const int64_t share = std::max<int64_t>(1, total * step.num_kv_heads / (step.num_threads * kItemsPerThread));
    int32_t items = 0, merges = 0, partials = 0;
    for (const Block& b : blocks) {
        const int64_t sections = (b.keys + kSectionKeys - 1) / kSectionKeys;
        const int64_t wanted = step.num_threads == 1 ? 1 : (b.cost + share - 1) / share;
        const int32_t splits = static_cast<int32_t>(std::min(sections, wanted));
        if (items + splits > step.item_capacity) {
            items += splits;  // only counted from here on
            continue;
        }
        for (int32_t i = 0; i < splits; ++i) {
            const int32_t first = static_cast<int32_t>(sections * i / splits);
            const int32_t after = static_cast<int32_t>(sections * (i + 1) / splits);
            step.items[items++] = {b.sequence,
                                   b.begin,
                                   b.count,
                                   first * kSectionKeys,
                                   std::min(b.keys, after * kSectionKeys),
                                   splits > 1 ? partials + first : -1};
        }
        if (splits > 1) {
            step.merges[merges++] = {b.begin, b.count, partials, static_cast<int32_t>(sections)};
            partials += static_cast<int32_t>(sections);
        }
    }
    if (items > step.item_capacity) return items;
    step.num_items = items;
    step.num_merges = merges;
    step.num_partials = partials;
    return 0;
}

}  // namespace pd
