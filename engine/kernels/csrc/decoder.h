// The whole forward pass of a dense decoder in one parallel region: threads meet at barriers between phases and
// never return to Python in between, so a step costs no more than its arithmetic and its memory traffic. The
// residual stream is kept in float32 whatever the type of weights and activations.
#pragma once

#include "attention.h"
#include "decoder_types.h"
#include "elementwise.h"
#include "gemm.h"
#include "rope.h"
#include "team.h"

namespace pd {

template <typename T>
Weight<T> weight_of(const PackedLinear& linear, bool two_halves = false) {
    return {linear.packed, static_cast<const T*>(linear.bias), linear.outputs, linear.inputs, two_halves};
}

// Every function here that takes a team is called by all its threads and ends with a barrier.

// out = x / rms(x) * weight for rows of float32.
template <typename T>
void norm_rows(Team& team, const float* x, const void* weight, T* out, int64_t rows, int64_t width, float eps) {
    team.share(rows, [&](int64_t row) {
        const float* const from = x + row * width;
        const float factor = 1.0f / std::sqrt(square_sum(from, width) / static_cast<float>(width) + eps);
        scale_by_weight(from, static_cast<const T*>(weight), factor, out + row * width, width);
    });
    team.barrier();
}

// Attention of one layer for a whole batch, K and V written first.
template <typename Tile>
void attend_in_team(Team& team, const AttentionStep& step, int64_t layer, typename Tile::Stored* qkv,
                    const void* q_norm, const void* k_norm, typename Tile::Stored* out) {
    using T = typename Tile::Stored;
    T* const kv = static_cast<T*>(step.kv) + layer * step.layer_stride;
    team.share(step.num_tokens, [&](int64_t token) {
        rotate_and_write(step, token, qkv, kv, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm));
    });
    team.barrier();
    const int64_t heads = step.num_kv_heads;
    const int block_rows = step.block_tokens * (step.num_heads / step.num_kv_heads);
    char* const scratch = step.scratch + team.index() * Workspace<Tile>::bytes(step.head_dim, block_rows);
    Workspace<Tile> work(scratch, step.head_dim, block_rows);
    const int64_t units = step.num_items * heads;
    Ahead ahead;
    team.share(units, [&](int64_t index) {
        const Unit unit = unit_of(step, index), next = unit_of(step, std::min(index + 1, units - 1));
        run_unit<Tile>(step, unit, index + 1 < units ? &next : nullptr, qkv, kv, out, work, ahead);
    });
    team.barrier();
    if (step.num_merges > 0) {
        team.share(step.num_merges * heads, [&](int64_t unit) {
            run_merge(step, step.merges[unit / heads], static_cast<int>(unit % heads), out, work.totals);
        });
        team.barrier();
    }
}

// Keeps only the wanted rows of x [.., width], in place: rows[i] >= i, ascending. One thread does it all.
template <typename T>
void keep_rows(T* x, const int64_t* rows, int64_t count, int64_t width) {
    for (int64_t i = 0; i < count; ++i)
        if (rows[i] != i) std::memcpy(static_cast<void*>(x + i * width), x + rows[i] * width, width * sizeof(T));
}

template <typename Tile>
void forward_in_team(Team& team, const Decoder& model, const AttentionStep& step, const DecoderBatch& batch) {
    using T = typename Tile::Stored;
    const int64_t hidden = model.hidden_size;
    auto* const normed = static_cast<T*>(batch.normed);
    auto* const qkv = static_cast<T*>(batch.qkv);
    auto* const attended = static_cast<T*>(batch.attended);
    auto* const activated = static_cast<T*>(batch.activated);
    float* const residual = batch.residual;
    int64_t rows = step.num_tokens;
    team.share(rows, [&](int64_t row) {
        const T* const from = static_cast<const T*>(model.embedding) + batch.token_ids[row] * hidden;
        for (int64_t i = 0; i < hidden; ++i) residual[row * hidden + i] = to_float(from[i]);
    });
    team.barrier();
    for (int64_t index = 0; index < model.num_layers; ++index) {
        const DecoderLayer& layer = model.layers[index];
        norm_rows(team, residual, layer.input_norm, normed, rows, hidden, model.norm_eps);
        multiply(team, normed, rows, weight_of<T>(layer.qkv), Store<T>{qkv, layer.qkv.outputs});
        attend_in_team<Tile>(team, step, index, qkv, layer.q_norm, layer.k_norm, attended);
        if (index + 1 == model.num_layers && batch.num_rows < rows) {
            // Past the last attention only the rows whose logits are wanted matter.
            rows = batch.num_rows;
            if (team.index() == 0) {
                keep_rows(residual, batch.logit_rows, rows, hidden);
                keep_rows(attended, batch.logit_rows, rows, layer.output.inputs);
            }
            team.barrier();
        }
        multiply(team, attended, rows, weight_of<T>(layer.output), AddTo{residual, hidden});
        norm_rows(team, residual, layer.post_norm, normed, rows, hidden, model.norm_eps);
        multiply(team, normed, rows, weight_of<T>(layer.gate_up, true), SiluMul<T>{activated, layer.down.inputs});
        multiply(team, activated, rows, weight_of<T>(layer.down), AddTo{residual, hidden});
    }
    norm_rows(team, residual, model.norm, normed, rows, hidden, model.norm_eps);
    multiply(team, normed, rows, weight_of<T>(model.head), Store<float>{batch.logits, model.head.outputs});
}

}  // namespace pd
