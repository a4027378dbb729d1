// What crosses the C ABI for a whole forward pass. engine/kernels/library.py mirrors these structs field by field.
#pragma once

#include <cstdint>

namespace pd {

struct PackedLinear {
    const void* packed;  // by pd_pack_linear
    const void* bias;    // [outputs], or null
    int64_t outputs;
    int64_t inputs;
};

struct DecoderLayer {
    const void* input_norm;  // [hidden]
    const void* q_norm;      // [head_dim], or null
    const void* k_norm;
    const void* post_norm;
    PackedLinear qkv;
    PackedLinear output;
    PackedLinear gate_up;  // packed with its two halves side by side
    PackedLinear down;
};

struct Decoder {
    int64_t num_layers;
    int64_t hidden_size;
    const DecoderLayer* layers;
    const void* embedding;  // [vocab, hidden]
    const void* norm;       // [hidden]
    PackedLinear head;
    float norm_eps;
};

// One batch's inputs, outputs and activations, for `tokens` tokens.
struct DecoderBatch {
    const int64_t* token_ids;   // [tokens]
    const int64_t* logit_rows;  // [num_rows], ascending
    int64_t num_rows;
    float* logits;    // [num_rows, vocab]
    float* residual;  // [tokens, hidden]
    void* normed;     // [tokens, hidden]
    void* qkv;        // [tokens, (heads + 2 kv_heads) * head_dim]
    void* attended;   // [tokens, heads * head_dim]
    void* activated;  // [tokens, intermediate]
};

}  // namespace pd
