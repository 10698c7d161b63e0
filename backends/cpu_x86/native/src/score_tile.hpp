// The scores of a tile of query rows: up to `tile_rows` rows, in panels whose rows are the vector lanes, meet the keys
// block by block. What is common to attention (attention_tile.hpp) and its gradients (gradient_tile.hpp).
#pragma once

#include "dropout.hpp"
#include "emit.hpp"
#include "gemm.hpp"
#include "keys.hpp"
#include "mods.hpp"

namespace {

// What hides keys of a block from rows of a panel. kScored: a score_mod alone, whose scores of -inf do.
enum class Partial { kNone, kCausal, kScored, kBias };

// f(kind) with the kind as a constant.
template <class F>
void with_partial(Partial partial, F f) {
  switch (partial) {
    case Partial::kNone:
      return f(std::integral_constant<Partial, Partial::kNone>());
    case Partial::kCausal:
      return f(std::integral_constant<Partial, Partial::kCausal>());
    case Partial::kScored:
      return f(std::integral_constant<Partial, Partial::kScored>());
    case Partial::kBias:
      return f(std::integral_constant<Partial, Partial::kBias>());
  }
}

// The scores of one panel and one block; n is 0 where no row sees a key.
struct Scored {
  int64_t n;
  Partial partial;
};

template <class V, int DT, bool PAIRS, int NQ>
class ScoreTile {
 protected:
  using T = Real<V>;
  using F = typename V::F;
  static constexpr int W = NQ * V::N;
  static constexpr int64_t kSize = size_of<DT>();

  const Plan& p_;
  const Item& it_;
  const thal_attention& c_;
  int64_t panels_, words_;
  T *q_, *k_, *bias_;
  int32_t *limit_, *visible_, *heads_, *positions_, *key_index_, batch_;
  char *buffer_, *scratch_;
  KeySource source_;
  BlockRows blocks_;
  // The block at hand.
  int64_t key0_, count_;
  BlockRows::State state_;  // of the whole item, by the BlockMask
  const char *key_source_, *value_source_;
  int64_t k_stride_[4], v_stride_[4];
  const char* keys_;
  int64_t key_stride_;
  bool loaded_;
  int finite_;  // are the block's values finite: -1 unknown, else 0 or 1

  ScoreTile(const Plan& p, const Item& it, char* scratch)
      : p_(p), it_(it), c_(p.call), batch_(static_cast<int32_t>(it.b)), scratch_(scratch), source_(p, it),
        blocks_(p, it, scratch + p.at_blocks) {
    q_ = reals(p.at_q), k_ = reals(p.at_k), bias_ = reals(p.at_bias);
    limit_ = ints(p.at_limit), visible_ = ints(p.at_visible), heads_ = ints(p.at_heads);
    positions_ = ints(p.at_positions), key_index_ = ints(p.at_key_index);
    buffer_ = scratch + p.at_rows;
    panels_ = (it.rows + W - 1) / W;
    words_ = PAIRS ? pair_words<V>(c_.E) : c_.E;
  }

  T* reals(int64_t at) const { return reinterpret_cast<T*>(scratch_ + at); }
  int32_t* ints(int64_t at) const { return reinterpret_cast<int32_t*>(scratch_ + at); }

  // Packs the query and finds what each row may see.
  void start_rows() {
    const int64_t last = it_.row0 + it_.rows - 1;
    for (int64_t i = 0; i < panels_ * W; ++i) {
      const int64_t row = smaller(it_.row0 + i, last);
      limit_[i] = static_cast<int32_t>(row_limit(p_, it_, row));
      if (!p_.needs_indices()) continue;
      heads_[i] = static_cast<int32_t>(it_.kv_head * p_.group + row % p_.group);
      positions_[i] = static_cast<int32_t>(it_.sequence.first + row / p_.group);
    }
    with_query_type<DT>(p_, [this](auto type) {
      for (int64_t i = 0; i < panels_; ++i)
        pack_query<V, decltype(type)::value, PAIRS, NQ>(p_, it_, it_.row0 + i * W, q_ + i * words_ * W, buffer_);
    });
  }

  // f() for each block of keys that a row may see.
  template <class Block>
  void each_block(Block f) {
    const int64_t end = smaller(it_.key1, limit_[it_.rows - 1]);
    const auto visit = [&](int64_t from, int64_t to, BlockRows::State state) { each_part(from, to, state, f); };
    if (c_.blocks) {
      blocks_.visit(it_.key0, end, visit);
    } else {
      visit(it_.key0, end, p_.has_mask_mod ? BlockRows::kPartial : BlockRows::kFull);
    }
  }

  // Keys per block: as many as fit, but of few keys equal parts, so that the 128 of a BlockMask are not 120 and 8.
  static int64_t block_size(int64_t keys) {
    constexpr int64_t most = V::kTiles ? thal::kTileKeyBlock : thal::kKeyBlock, height = V::kRows;
    if (keys > 8 * most) return most;
    const int64_t part = keys / larger(1, (keys + most - 1) / most);
    return larger(height, smaller(most, (part + height) / height * height));
  }

  // Keys that the BlockMask, or the want of one, puts in one state.
  template <class Block>
  void each_part(int64_t begin, int64_t end, BlockRows::State state, Block f) {
    state_ = state;
    const int64_t step = block_size(end - begin);
    for (int64_t key = begin; key < end; key += step) {
      key0_ = key;
      count_ = smaller(step, end - key);
      loaded_ = false;
      finite_ = -1;
      if (p_.needs_indices())
        for (int64_t j = 0; j < count_; ++j) key_index_[j] = static_cast<int32_t>(key + j);
      f();
    }
  }

  // Twelve rows are read at a time. Rows a multiple of 4 KB apart all map to the same few lines of the L1 cache.
  static bool in_place(const int64_t* stride) {
    const int64_t bytes = stride[2] * kSize;
    return stride[3] == 1 && bytes >= 0 && bytes <= 16384 && bytes % 4096 != 0;
  }

  // The block's rows as they lie, or copied together from their pages, or dequantised.
  void find_block() {
    char *keys = scratch_ + p_.at_stage_k, *values = scratch_ + p_.at_stage_v;
    std::memcpy(k_stride_, c_.k_stride, sizeof(k_stride_));
    std::memcpy(v_stride_, c_.v_stride, sizeof(v_stride_));
    if constexpr (DT == real_type<V>()) {
      if (c_.quantized) {
        dequantize_block<V>(c_, source_, key0_, count_, keys, values, buffer_);
        use_staged(keys, values);
        return;
      }
    }
    const KeyRun first = source_.run(key0_, count_);
    key_source_ = first.keys, value_source_ = first.values;
    if (first.count == count_) return;
    for (int64_t j = 0; j < count_;) {
      const KeyRun run = source_.run(key0_ + j, count_ - j);
      copy_rows<kSize>(run.keys, c_.k_stride, run.count, c_.E, keys + j * c_.E * kSize);
      copy_rows<kSize>(run.values, c_.v_stride, run.count, c_.Ev, values + j * c_.Ev * kSize);
      j += run.count;
    }
    use_staged(keys, values);
  }

  void use_staged(const char* keys, const char* values) {
    key_source_ = keys, value_source_ = values;
    k_stride_[2] = c_.E, v_stride_[2] = c_.Ev, k_stride_[3] = v_stride_[3] = 1;
  }

  void load_keys() {
    loaded_ = true;
    find_block();
    const bool direct = PAIRS ? are_pair_rows<V>(count_, c_.E) : DT == real_type<V>();
    keys_ = key_source_, key_stride_ = k_stride_[2] * kSize;
    if (direct && in_place(k_stride_)) return;
    if constexpr (PAIRS) {
      copy_pair_rows(key_source_, k_stride_, count_, c_.E, words_, reinterpret_cast<char*>(k_));
    } else {
      widen_rows<V, DT>(key_source_, k_stride_, count_, c_.E, k_, buffer_);
    }
    keys_ = reinterpret_cast<const char*>(k_), key_stride_ = words_ * static_cast<int64_t>(sizeof(T));
  }

  bool values_are_finite() {
    if (finite_ < 0) finite_ = all_finite<V, DT>(value_source_, v_stride_, count_, c_.Ev, buffer_);
    return finite_ == 1;
  }

  // The scores of a panel, as they are before biases and what hides keys, and their maxima where nothing changes them.
  // A score_mod has been applied; `dots` gets what it was applied to, where that is not null.
  Scored score(int64_t panel, T* scores_out, T* top, T* dots) {
    const int32_t* limit = limit_ + panel * W;
    const int64_t n = smaller(count_, limit[W - 1] - key0_);
    if (n <= 0) return {0, Partial::kNone};
    Partial partial = limit[0] < key0_ + n ? Partial::kCausal : Partial::kNone;
    const bool asked = state_ == BlockRows::kMixed || (state_ == BlockRows::kPartial && p_.has_mask_mod);
    if (c_.mask_kind != THAL_MASK_NONE || asked) {
      const Cover cover = hide(panel, n, asked);
      if (cover == Cover::kHidden) return {0, Partial::kNone};
      partial = cover == Cover::kOpen && c_.mask_kind <= THAL_MASK_BOOL ? Partial::kNone : Partial::kBias;
    }
    if (!loaded_) load_keys();
    scores<V, PAIRS, NQ>(keys_, key_stride_, n, q_ + panel * words_ * W, words_, scores_out, top);
    if (!p_.has_score_mod) return {n, partial};
    if (dots) std::memcpy(dots, scores_out, static_cast<size_t>(n * W) * sizeof(T));
    // Which keys are hidden has to be known apart from the scores where a value is not finite.
    const bool needs_bias = !values_are_finite() || partial == Partial::kCausal;
    if (partial != Partial::kBias && needs_bias) causal_bias<V, NQ>(limit, key0_, n, bias_);
    for (int half = 0; half < W; half += thal::kLanes)
      modify_scores(p_, indices(panel, half), n, scores_out + half, W, scratch_ + p_.at_program);
    return {n, needs_bias || partial == Partial::kBias ? Partial::kBias : Partial::kScored};
  }

  Indices indices(int64_t panel, int64_t half) const {
    return {&batch_, heads_ + panel * W + half, positions_ + panel * W + half, key_index_};
  }

  // Biases of the panel: the causal limit, the mask, and where `asked` the mask_mod and the BlockMask.
  Cover hide(int64_t panel, int64_t n, bool asked) {
    const int32_t* limit = limit_ + panel * W;
    Cover cover = Cover::kMixed;
    if (c_.mask_kind == THAL_MASK_NONE) {
      causal_bias<V, NQ>(limit, key0_, n, bias_);
    } else {
      cover = fill_bias<V, NQ>(p_, it_, it_.row0 + panel * W, limit, key0_, n, bias_);
      if (cover == Cover::kHidden) return cover;
    }
    return asked ? ask(panel, n) : cover;
  }

  Cover ask(int64_t panel, int64_t n) {
    if (p_.has_mask_mod) {
      for (int half = 0; half < W; half += thal::kLanes)
        ask_mask(p_, indices(panel, half), n, visible_ + half, W, scratch_ + p_.at_program);
    } else {
      for (int64_t i = 0; i < n * W; ++i) visible_[i] = 1;
    }
    if (state_ == BlockRows::kMixed) ask_blocks(panel, n);
    F not_hidden = V::zero(), not_open = V::zero();
    const F hidden = V::set1(-kInf);
    for (int64_t i = 0; i < n * W; i += V::N) {
      const F x = V::keep_set(V::load(bias_ + i), V::load_int(visible_ + i));
      not_hidden = V::or_bits(not_hidden, V::xor_bits(x, hidden));
      not_open = V::or_bits(not_open, x);
      V::store(bias_ + i, x);
    }
    if (!V::any_bits(not_hidden)) return Cover::kHidden;
    return V::any_bits(not_open) ? Cover::kMixed : Cover::kOpen;
  }

  // Rows for which the block is empty or full take no notice of the mask_mod.
  void ask_blocks(int64_t panel, int64_t n) {
    const int64_t last = it_.row0 + it_.rows - 1;
    int32_t keep[W], add[W];
    for (int lane = 0; lane < W; ++lane) {
      const auto state = blocks_.state(smaller(it_.row0 + panel * W + lane, last), key0_);
      keep[lane] = state == BlockRows::kPartial ? -1 : 0;
      add[lane] = state == BlockRows::kFull ? 1 : 0;
    }
    for (int64_t j = 0; j < n; ++j)
      for (int lane = 0; lane < W; ++lane) visible_[j * W + lane] = (visible_[j * W + lane] & keep[lane]) | add[lane];
  }

  // Puts -inf where a key may not be seen, adds biases, and returns the maxima.
  template <Partial P>
  F mask_scores(int64_t panel, int64_t n, int q, T* scores) {
    T* s = scores + q * V::N;
    const auto limit = V::load_int(limit_ + panel * W + q * V::N);
    const F factor = V::set1(static_cast<T>(p_.score_factor));
    F top = V::set1(-kInf);
    for (int64_t j = 0; j < n; ++j) {
      F x = V::load(s + j * W);
      if constexpr (P == Partial::kCausal) {
        x = V::keep_below(x, limit, static_cast<int32_t>(key0_ + j));
      } else if constexpr (P == Partial::kBias) {
        T* bias = bias_ + j * W + q * V::N;
        x = V::add_bias(x, factor, V::load(bias));
        if (p_.has_score_mod) V::store(bias, x);  // a score of -inf hides its key too
      }
      if constexpr (P != Partial::kScored) V::store(s + j * W, x);
      top = V::max(top, x);
    }
    return top;
  }

};

}  // namespace
