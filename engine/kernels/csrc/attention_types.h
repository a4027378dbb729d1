// What crosses the C ABI for attention. engine/kernels/library.py mirrors these structs field by field.
#pragma once

#include <cstdint>

namespace pd {

// One block of query tokens against one range of keys of its sequence; done once per KV head.
struct WorkItem {
    int32_t sequence;
    int32_t query_begin;  // index into the batch's tokens
    int32_t query_count;
    int32_t kv_begin;  // multiple of kSectionKeys
    int32_t kv_end;
    int32_t partial;  // where its first section's results go, -1 when it sees all keys and writes the output itself
};

// The sections' results of one block of query tokens, to be joined.
struct Merge {
    int32_t query_begin;
    int32_t query_count;
    int32_t first_partial;
    int32_t num_partials;
};

struct AttentionStep {
    // fixed for a model
    int32_t dtype;  // 0 float32, 1 bfloat16, 2 float16
    int32_t num_threads;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t page_size;
    int64_t page_stride;   // elements from one page of a layer to the next page of the same layer
    int64_t layer_stride;  // elements from one layer of a page to the next
    float scale;
    float norm_eps;
    const float* rope;  // [positions, head_dim]: cosines, then sines
    // one batch
    void* kv;  // the pool: [pages, layers, kv_heads, 2, page_size, head_dim]
    int32_t num_tokens;
    int32_t num_seqs;
    int32_t max_pages;
    int32_t num_items;
    int32_t num_merges;
    int32_t num_partials;
    const int64_t* positions;    // [tokens]
    const int64_t* slots;        // [tokens]
    const int32_t* query_start;  // [seqs + 1]
    const int32_t* kv_lens;      // [seqs]
    const int32_t* page_table;   // [seqs, max_pages]
    WorkItem* items;             // [item_capacity]
    Merge* merges;               // [item_capacity]
    int32_t item_capacity;
    int32_t block_tokens;  // query tokens in a full block
    float* partials;       // [partials, kv_heads, block_tokens * group, head_dim + 2]
    char* scratch;         // num_threads * scratch_bytes()
};

}  // namespace pd
