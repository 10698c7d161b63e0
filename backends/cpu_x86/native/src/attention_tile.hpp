// Attention for tiles of query rows, flash style: a tile of up to `tile_rows` query rows, in panels whose rows are the
// vector lanes, meets the keys block by block with an online softmax.
#pragma once

#include "dropout.hpp"
#include "emit.hpp"
#include "gemm.hpp"
#include "keys.hpp"
#include "mods.hpp"

namespace {

// What hides keys of a block from rows of a panel. kScored: a score_mod alone, whose scores of -inf do.
enum class Partial { kNone, kCausal, kScored, kBias };

template <class V, int DT, bool PAIRS, int NQ>
class Tile {
  using F = typename V::F;
  static constexpr int W = NQ * V::N;
  static constexpr int64_t kSize = size_of<DT>();

  const Plan& p_;
  const Item& it_;
  const thal_attention& c_;
  int64_t panels_, words_;
  float *q_, *o_, *k_, *v_, *clean_, *scores_, *bias_, *max_, *sum_;
  int32_t *limit_, *visible_, *heads_, *positions_, *key_index_, batch_;
  char *buffer_, *scratch_;
  KeySource source_;
  BlockRows blocks_;
  // The block at hand.
  int64_t key0_, count_;
  BlockRows::State state_;  // of the whole item, by the BlockMask
  const char *key_source_, *value_source_;
  int64_t k_stride_[4], v_stride_[4];
  const char *keys_, *values_;
  int64_t key_stride_, value_stride_;
  bool loaded_;
  int finite_;  // are the block's values finite: -1 unknown, else 0 or 1
  Background<V, NQ> background_;

 public:
  Tile(const Plan& p, const Item& it, char* scratch)
      : p_(p), it_(it), c_(p.call), batch_(static_cast<int32_t>(it.b)), scratch_(scratch), source_(p, it, kSize),
        blocks_(p, it, scratch + p.at_blocks) {
    const auto floats = [scratch](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
    const auto ints = [scratch](int64_t at) { return reinterpret_cast<int32_t*>(scratch + at); };
    q_ = floats(p.at_q), o_ = floats(p.at_o), k_ = floats(p.at_k), v_ = floats(p.at_v), clean_ = floats(p.at_clean);
    scores_ = floats(p.at_scores), bias_ = floats(p.at_bias), max_ = floats(p.at_max), sum_ = floats(p.at_sum);
    limit_ = ints(p.at_limit), visible_ = ints(p.at_visible), heads_ = ints(p.at_heads);
    positions_ = ints(p.at_positions), key_index_ = ints(p.at_key_index);
    buffer_ = scratch + p.at_rows;
    panels_ = (it.rows + W - 1) / W;
    words_ = PAIRS ? pair_words<V>(c_.E) : c_.E;
  }

  void run() {
    start();
    const int64_t end = smaller(it_.key1, limit_[it_.rows - 1]);
    if (c_.blocks) {
      blocks_.visit(it_.key0, end, [this](int64_t from, int64_t to, BlockRows::State state) { visit(from, to, state); });
    } else {
      visit(it_.key0, end, p_.has_mask_mod ? BlockRows::kPartial : BlockRows::kFull);
    }
    for (int64_t panel = 0; panel < panels_; ++panel) finish(panel);
  }

 private:
  // Keys per block: as many as fit, but of few keys equal parts, so that the 128 of a BlockMask are not 120 and 8.
  int64_t block_size(int64_t keys) const {
    const int64_t most = p_.isa->key_block, height = V::kRows;
    if (keys > 8 * most) return most;
    const int64_t part = keys / larger(1, (keys + most - 1) / most);
    return larger(height, smaller(most, (part + height) / height * height));
  }

  // Keys that the BlockMask, or the want of one, puts in one state.
  void visit(int64_t begin, int64_t end, BlockRows::State state) {
    state_ = state;
    const int64_t step = block_size(end - begin);
    for (int64_t key = begin; key < end; key += step) {
      key0_ = key;
      count_ = smaller(step, end - key);
      loaded_ = false;
      finite_ = -1;
      if (p_.needs_indices())
        for (int64_t j = 0; j < count_; ++j) key_index_[j] = static_cast<int32_t>(key + j);
      if constexpr (V::kTiles) {
        if (overlaps()) {
          advance_together();
          continue;
        }
      }
      for (int64_t panel = 0; panel < panels_; ++panel) advance(panel);
    }
  }

  // Only with tiles; attention_overlap.hpp.
  bool overlaps() const;
  void advance_together();

  void start() {
    const int64_t last = it_.row0 + it_.rows - 1;
    for (int64_t i = 0; i < panels_ * W; ++i) {
      const int64_t row = smaller(it_.row0 + i, last);
      max_[i] = -kInf;
      sum_[i] = 0.0f;
      limit_[i] = static_cast<int32_t>(row_limit(p_, it_, row));
      if (!p_.needs_indices()) continue;
      heads_[i] = static_cast<int32_t>(it_.kv_head * p_.group + row % p_.group);
      positions_[i] = static_cast<int32_t>(it_.sequence.first + row / p_.group);
    }
    for (int64_t i = 0; i < panels_; ++i)
      pack_query<V, DT, PAIRS, NQ>(p_, it_, it_.row0 + i * W, q_ + i * words_ * W, buffer_);
    std::memset(o_, 0, static_cast<size_t>(panels_ * W * c_.Ev) * 4);
  }

  // Twelve rows are read at a time. Rows a multiple of 4 KB apart all map to the same few lines of the L1 cache.
  static bool in_place(const int64_t* stride) {
    const int64_t bytes = stride[2] * kSize;
    return stride[3] == 1 && bytes >= 0 && bytes <= 16384 && bytes % 4096 != 0;
  }

  // The block's rows as they lie, or copied together from their pages.
  void find_block() {
    std::memcpy(k_stride_, c_.k_stride, sizeof(k_stride_));
    std::memcpy(v_stride_, c_.v_stride, sizeof(v_stride_));
    const KeyRun first = source_.run(key0_, count_);
    key_source_ = first.keys, value_source_ = first.values;
    if (first.count == count_) return;
    char *keys = scratch_ + p_.at_stage_k, *values = scratch_ + p_.at_stage_v;
    key_source_ = keys, value_source_ = values;
    for (int64_t j = 0; j < count_;) {
      const KeyRun run = source_.run(key0_ + j, count_ - j);
      copy_rows<kSize>(run.keys, c_.k_stride, run.count, c_.E, keys + j * c_.E * kSize);
      copy_rows<kSize>(run.values, c_.v_stride, run.count, c_.Ev, values + j * c_.Ev * kSize);
      j += run.count;
    }
    k_stride_[2] = c_.E, v_stride_[2] = c_.Ev, k_stride_[3] = v_stride_[3] = 1;
  }

  void load_block() {
    loaded_ = true;
    find_block();
    const char *key = key_source_, *value = value_source_;
    const bool direct = PAIRS ? are_pair_rows<V>(count_, c_.E) : DT == THAL_F32;
    keys_ = key, key_stride_ = k_stride_[2] * kSize;
    if (!direct || !in_place(k_stride_)) {
      if constexpr (PAIRS) {
        copy_pair_rows(key, k_stride_, count_, c_.E, words_, reinterpret_cast<char*>(k_));
      } else {
        widen_rows<V, DT>(key, k_stride_, count_, c_.E, k_, buffer_);
      }
      keys_ = reinterpret_cast<const char*>(k_), key_stride_ = words_ * 4;
    }
    values_ = value, value_stride_ = v_stride_[2] * kSize;
    if constexpr (PAIRS) {
      pack_value_pairs<V>(value, v_stride_, count_, c_.Ev, v_, buffer_);
    } else if (DT != THAL_F32 || !in_place(v_stride_)) {
      widen_rows<V, DT>(value, v_stride_, count_, c_.Ev, v_, buffer_);
    } else {
      return;
    }
    values_ = reinterpret_cast<const char*>(v_), value_stride_ = c_.Ev * 4;
  }

  void advance(int64_t panel) {
    const int32_t* limit = limit_ + panel * W;
    const int64_t visible = limit[W - 1] - key0_;
    const int64_t n = smaller(count_, visible);
    if (n <= 0) return;
    Partial partial = limit[0] < key0_ + n ? Partial::kCausal : Partial::kNone;
    const bool asked = state_ == BlockRows::kMixed || (state_ == BlockRows::kPartial && p_.has_mask_mod);
    if (c_.mask_kind != THAL_MASK_NONE || asked) {
      const Cover cover = hide(panel, n, asked);
      if (cover == Cover::kHidden) return;
      partial = cover == Cover::kOpen && c_.mask_kind <= THAL_MASK_BOOL ? Partial::kNone : Partial::kBias;
    }
    if (!loaded_) load_block();
    alignas(64) float top[W], alpha[W];
    scores<V, PAIRS, NQ>(keys_, key_stride_, n, q_ + panel * words_ * W, words_, scores_, top);
    if (p_.has_score_mod) {
      if (finite_ < 0) finite_ = all_finite<V, DT>(value_source_, v_stride_, count_, c_.Ev, buffer_);
      const bool needs_bias = finite_ == 0 || partial == Partial::kCausal;
      if (partial != Partial::kBias && needs_bias) causal_bias<V, NQ>(limit, key0_, n, bias_);
      partial = needs_bias || partial == Partial::kBias ? Partial::kBias : Partial::kScored;
      for (int half = 0; half < W; half += thal::kLanes)
        modify_scores(p_, indices(panel, half), n, scores_ + half, W, scratch_ + p_.at_program);
    }
    switch (partial) {
      case Partial::kNone:
        soften<Partial::kNone>(panel, n, top, alpha);
        break;
      case Partial::kCausal:
        soften<Partial::kCausal>(panel, n, top, alpha);
        break;
      case Partial::kScored:
        soften<Partial::kScored>(panel, n, top, alpha);
        break;
      case Partial::kBias:
        soften<Partial::kBias>(panel, n, top, alpha);
        break;
    }
    if (c_.dropout) drop(panel, n);
    add_values(panel, n, alpha, partial);
  }

  // Zeroes the weights that dropout takes; what is left is scaled once at the end.
  void drop(int64_t panel, int64_t n) {
    const uint64_t threshold = c_.dropout->threshold;
    for (int half = 0; half < W; half += kPhiloxLanes) {
      const Indices at = indices(panel, half);
      draw_for_rows(*c_.dropout, it_.b, at.heads, at.positions, key0_, n, [&](int64_t j, const uint32_t* words) {
        auto* row = reinterpret_cast<uint32_t*>(scores_) + (PAIRS ? j / 2 : j) * W + half;
        const uint32_t taken = !PAIRS ? 0 : j % 2 ? 0x0000ffffu : 0xffff0000u;  // what stays of a dropped pair's word
        for (int i = 0; i < kPhiloxLanes; ++i) row[i] &= words[i] >= threshold ? 0xffffffffu : taken;
      });
    }
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

  // Scores to weights in place (bf16 pairs of keys where the product wants them), with the running maximum and sum.
  template <Partial P>
  void soften(int64_t panel, int64_t n, const float* unmasked_top, float* alpha) {
    const F exp_factor = V::set1(p_.exp_factor);
    for (int q = 0; q < NQ; ++q) {
      float* s = scores_ + q * V::N;
      const F top = P == Partial::kNone ? V::load(unmasked_top + q * V::N) : mask_scores<P>(panel, n, q);
      float* state = max_ + panel * W + q * V::N;
      const F old = V::load(state), now = V::max(old, top), safe = V::finite_max(now);
      V::store(state, now);
      const F fade = V::exp2(V::mul(V::sub(old, safe), exp_factor));
      V::store(alpha + q * V::N, fade);
      const F total = weigh(s, n, safe, exp_factor);
      float* sum = sum_ + panel * W + q * V::N;
      V::store(sum, V::fma(V::load(sum), fade, total));
    }
  }

  // Puts -inf where a key may not be seen, adds biases, and returns the maxima.
  template <Partial P>
  F mask_scores(int64_t panel, int64_t n, int q) {
    float* s = scores_ + q * V::N;
    const auto limit = V::load_int(limit_ + panel * W + q * V::N);
    const F factor = V::set1(p_.score_factor);
    F top = V::set1(-kInf);
    for (int64_t j = 0; j < n; ++j) {
      F x = V::load(s + j * W);
      if constexpr (P == Partial::kCausal) {
        x = V::keep_below(x, limit, static_cast<int32_t>(key0_ + j));
      } else if constexpr (P == Partial::kBias) {
        float* bias = bias_ + j * W + q * V::N;
        x = V::add_bias(x, factor, V::load(bias));
        if (p_.has_score_mod) V::store(bias, x);  // a score of -inf hides its key too
      }
      if constexpr (P != Partial::kScored) V::store(s + j * W, x);
      top = V::max(top, x);
    }
    return top;
  }

  // The difference is taken before scaling: near the maximum it is exact, whatever the size of the logits.
  F weigh(float* s, int64_t n, F safe, F exp_factor) {
    const auto weight = [&](int64_t j) { return V::exp2(V::mul(V::sub(V::load(s + j * W), safe), exp_factor)); };
    F even = V::zero(), odd = V::zero();
    int64_t j = 0;
    for (; j + 2 <= n; j += 2) {
      if (j % 8 == 0) background_.step();
      const F a = weight(j), b = weight(j + 1);
      even = V::add(even, a), odd = V::add(odd, b);
      store_weights(s, j, a, b);
    }
    if (j < n) {
      const F a = weight(j);
      even = V::add(even, a);
      if constexpr (PAIRS) {
        V::store(s + j / 2 * W, V::bf16_pairs(a, V::zero()));
      } else {
        V::store(s + j * W, a);
      }
    }
    return V::add(even, odd);
  }

  static void store_weights(float* s, int64_t j, F a, F b) {
    if constexpr (PAIRS) {
      V::store(s + j / 2 * W, V::bf16_pairs(a, b));  // row j / 2 has been read already
    } else {
      V::store(s + j * W, a);
      V::store(s + (j + 1) * W, b);
    }
  }

  // Whether values that are not finite lie beside those that rows may see.
  bool meets_wild(int64_t n, Partial partial) {
    // In pairs, an odd last key drags its neighbour in with weight zero, and nobody here may see that neighbour. So do tiles.
    const bool exposed = partial != Partial::kNone || (n % keys_per_step<V, PAIRS>() != 0 && n != count_);
    if (exposed && finite_ < 0) finite_ = all_finite<V, DT>(value_source_, v_stride_, count_, c_.Ev, buffer_);
    return exposed && finite_ == 0;
  }

  void add_values(int64_t panel, int64_t n, const float* alpha, Partial partial) {
    float* o = o_ + panel * W * c_.Ev;
    const int64_t depth = PAIRS ? (n + 1) / 2 : n;
    if (!meets_wild(n, partial)) {
      weighted_values<V, PAIRS, NQ>(values_, value_stride_, c_.Ev, scores_, depth, o, alpha);
      return;
    }
    load_clean_values(value_source_);
    weighted_values<V, PAIRS, NQ>(reinterpret_cast<const char*>(clean_), c_.Ev * 4, c_.Ev, scores_, depth, o, alpha);
    add_wild_values(value_source_, panel, n, o, partial);
  }

  // The block's values with 0 in place of what is not finite, see zero_wild.
  void load_clean_values(const char* source) {
    if constexpr (PAIRS) {
      pack_value_pairs<V>(source, v_stride_, count_, c_.Ev, clean_, buffer_);
      auto* words = reinterpret_cast<uint16_t*>(clean_);
      for (int64_t i = 0; i < value_pair_words<V>(count_, c_.Ev) * 2; ++i)
        if ((words[i] & 0x7f80) == 0x7f80) words[i] = 0;
    } else {
      widen_rows<V, DT>(source, v_stride_, count_, c_.Ev, clean_, buffer_);
      zero_wild(clean_, count_ * c_.Ev);
    }
  }

  // What load_clean_values left out, for the rows that do see the key.
  void add_wild_values(const char* source, int64_t panel, int64_t n, float* o, Partial partial) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t e = 0; e < c_.Ev; ++e) {
        const float x = scalar_as_float<V, DT>(source + (j * v_stride_[2] + e * v_stride_[3]) * kSize);
        if (is_finite(x)) continue;
        for (int lane = 0; lane < W; ++lane)
          if (live(panel, j, lane, partial)) o[e * W + lane] += weight_at(j, lane) * x;
      }
  }

  bool live(int64_t panel, int64_t j, int lane, Partial partial) const {
    if (partial == Partial::kBias) return bias_[j * W + lane] != -kInf;
    return key0_ + j < limit_[panel * W + lane];
  }

  float weight_at(int64_t j, int lane) const {
    if constexpr (PAIRS) {
      uint32_t pair;
      std::memcpy(&pair, scores_ + j / 2 * W + lane, 4);
      return float_of_bits(j % 2 ? pair & 0xffff0000u : pair << 16);
    } else {
      return scores_[j * W + lane];
    }
  }

  void finish(int64_t panel) {
    const int64_t row0 = panel * W;
    const float* o = o_ + panel * W * c_.Ev;
    for (int64_t i = row0; i < smaller(row0 + W, it_.rows); ++i) emit_state(p_, it_, i, max_[i], sum_[i]);
    for (int q = 0; q < NQ; ++q) {
      const int64_t first = row0 + q * V::N;
      const int64_t rows = smaller(V::N, it_.rows - first);
      const F scale = it_.partial ? V::set1(1.0f) : V::mul(V::inverse_or_zero(V::load(sum_ + first)), V::set1(p_.kept()));
      for (int64_t e = 0; e < c_.Ev && rows > 0; e += V::N) {
        const int w = static_cast<int>(smaller(V::N, c_.Ev - e));
        F t[V::N];
        for (int i = 0; i < V::N; ++i) t[i] = i < w ? V::mul(V::load(o + (e + i) * W + q * V::N), scale) : V::zero();
        V::transpose(t);
        for (int64_t i = 0; i < rows; ++i) emit_columns<V, DT>(p_, it_, first + i, e, t[i], w);
      }
    }
  }
};

template <class V, int DT, bool PAIRS>
void run_tile(const Plan& p, const Item& it, char* scratch) {
  if (p.panel > V::N) {
    Tile<V, DT, PAIRS, 2>(p, it, scratch).run();
  } else {
    Tile<V, DT, PAIRS, 1>(p, it, scratch).run();
  }
}

}  // namespace
