// Attention for few query rows (decoding): vectors run along the head dimension, so that every key and value is read
// once, in the order it lies in memory, for all query heads of the group. Bound by memory bandwidth, not arithmetic.
//
// Quantised keys and values are read as they are stored, and their scales multiply scores and weights, one of each for a
// key instead of one for an element. The stored numbers are exact in float32, so this rounds less than scaling them would.
#pragma once

#include "dropout.hpp"
#include "emit.hpp"
#include "mods.hpp"
#include "row_products.hpp"

namespace {

// DT is the type of keys and values.
template <class V, int DT>
class Rows {
  using F = typename V::F;
  static constexpr int N = V::N;
  static constexpr int64_t kBlock = thal::kRowKeyBlock;
  static constexpr int64_t kParts = kBlock / thal::kLanes;  // rows of the machine for one query row
  static constexpr int64_t kSize = size_of<DT>();
  // Keys to fetch ahead, of 128 elements about 16 KB: in float32 64 made pages of 16 keys a tenth slower.
  static constexpr int64_t kAhead = kSize == 4 ? kBlock / 2 : kBlock;

  const Plan& p_;
  const Item& it_;
  const thal_attention& c_;
  int64_t rows_, width_, value_width_;  // padded to whole vectors
  float *q_, *o_, *k_, *v_, *scores_, *max_, *sum_;
  int32_t *visible_, *heads_, *positions_, *key_index_, batch_;
  char *buffer_, *scratch_;
  KeySource source_;
  BlockRows blocks_;
  int64_t key0_, count_;
  BlockRows::State state_;  // of all rows, by the BlockMask
  static constexpr int64_t kScales = is_quantized<DT>() ? kBlock : 1;
  alignas(64) float key_scales_[kScales], value_scales_[kScales];  // of the block, where keys and values are quantised
  Run runs_[kBlock];
  int64_t run_count_;
  bool masked_;  // some row may not see some key of the block

 public:
  Rows(const Plan& p, const Item& it, char* scratch)
      : p_(p), it_(it), c_(p.call), rows_(it.rows), batch_(static_cast<int32_t>(it.b)), scratch_(scratch),
        source_(p, it),
        blocks_(p, it, scratch + p.at_blocks) {
    const auto floats = [scratch](int64_t at) { return reinterpret_cast<float*>(scratch + at); };
    const auto ints = [scratch](int64_t at) { return reinterpret_cast<int32_t*>(scratch + at); };
    q_ = floats(p.at_q), o_ = floats(p.at_o), k_ = floats(p.at_k), v_ = floats(p.at_v), scores_ = floats(p.at_scores);
    max_ = floats(p.at_max), sum_ = floats(p.at_sum), buffer_ = scratch + p.at_rows;
    visible_ = ints(p.at_visible), heads_ = ints(p.at_heads), positions_ = ints(p.at_positions);
    key_index_ = ints(p.at_key_index);
    width_ = (c_.E + N - 1) / N * N;
    value_width_ = (c_.Ev + N - 1) / N * N;
  }

  void run() {
    start();
    const int64_t end = smaller(it_.key1, row_limit(p_, it_, it_.row0 + rows_ - 1));
    if (c_.blocks) {
      blocks_.visit(it_.key0, end, [this](int64_t from, int64_t to, BlockRows::State state) { visit(from, to, state); });
    } else {
      visit(it_.key0, end, p_.has_mask_mod ? BlockRows::kPartial : BlockRows::kFull);
    }
    for (int64_t r = 0; r < rows_; ++r) finish(r);
  }

 private:
  void visit(int64_t begin, int64_t end, BlockRows::State state) {
    state_ = state;
    for (int64_t key = begin; key < end; key += kBlock) {
      key0_ = key;
      count_ = smaller(kBlock, end - key);
      block();
    }
  }

  void start() {
    const auto& c = c_;
    for (int64_t r = 0; r < rows_; ++r) {
      max_[r] = -kInf;
      sum_[r] = 0.0f;
      const int64_t row = it_.row0 + r, l = row / p_.group, h = it_.kv_head * p_.group + row % p_.group;
      with_query_type<DT>(p_, [&](auto type) { load_query<decltype(type)::value>(r, h, l); });
      for (int64_t i = 0; p_.needs_indices() && i < kParts; ++i) {
        heads_[r * kParts + i] = static_cast<int32_t>(h);
        positions_[r * kParts + i] = static_cast<int32_t>(it_.sequence.first + l);
      }
      if (c.E < width_) std::memset(q_ + r * width_ + c.E, 0, static_cast<size_t>(width_ - c.E) * 4);
    }
    std::memset(o_, 0, static_cast<size_t>(rows_ * value_width_) * 4);
  }

  template <int T>
  void load_query(int64_t r, int64_t h, int64_t l) {
    constexpr int64_t size = size_of<T>();
    const char* src =
        static_cast<const char*>(c_.q) + (it_.sequence.q + h * c_.q_stride[1] + l * c_.q_stride[2]) * size;
    src = contiguous_row<size>(src, c_.q_stride[3], c_.E, buffer_);
    for (int64_t e = 0; e < width_; e += N) {
      const F x = V::template load_part<T>(src + e * size, static_cast<int>(smaller(N, c_.E - e)));
      V::store(q_ + r * width_ + e, V::mul(x, V::set1(static_cast<float>(p_.query_factor))));
    }
  }

  void block() {
    if (!mask_block()) return;
    find_runs();
    for (const Run* run = runs_; run < runs_ + run_count_; ++run) score_run(*run);
    if constexpr (is_quantized<DT>()) multiply_columns(key_scales_);
    if (p_.has_score_mod)
      modify_scores(p_, indices(), rows_ * kParts, scores_, thal::kLanes, scratch_ + p_.at_program);
    float alpha[N];
    for (int64_t r = 0; r < rows_; ++r) alpha[r] = soften(r);
    if (c_.dropout) drop();
    add_values(alpha);
  }

  // Zeroes the weights that dropout takes; what is left is scaled once at the end.
  void drop() {
    const uint64_t threshold = c_.dropout->threshold;
    for (int64_t r = 0; r < rows_; ++r) {
      float* s = scores_ + r * kBlock;
      draw_for_keys(*c_.dropout, it_.b, heads_[r * kParts], positions_[r * kParts], key0_, count_,
                    [&](int64_t j, uint32_t word) { s[j] = word >= threshold ? s[j] : 0.0f; });
    }
  }

  // The parts of the block that lie at one stride, and how far from each what is read kAhead keys later is.
  void find_runs() {
    run_count_ = 0;
    for (int64_t j = 0; j < count_;) {
      const KeyRun run = source_.run(key0_ + j, smaller(kAhead, count_ - j));
      const int64_t next = key0_ + kAhead + j;
      const KeyRun ahead = next < it_.sequence.S ? source_.run(next, 1) : run;
      runs_[run_count_++] = {run.keys, run.values, j, run.count, ahead.keys - run.keys, ahead.values - run.values};
      if constexpr (is_quantized<DT>()) {
        copy_scales(run.key_scale, c_.quantized->key_stride[2], run.count, key_scales_ + j);
        copy_scales(run.value_scale, c_.quantized->value_stride[2], run.count, value_scales_ + j);
      }
      j += run.count;
    }
    for (int64_t j = count_; j < kScales; ++j) key_scales_[j] = value_scales_[j] = 0.0f;
  }

  // Scores or weights of all rows, each times the scale of its key.
  void multiply_columns(const float* scales) {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t j = 0; j < kBlock; j += N) {
        float* s = scores_ + r * kBlock + j;
        V::store(s, V::mul(V::load(s), V::load(scales + j)));
      }
  }

  // The products with keys and values of type T: as they lie, or widened.
  template <int T>
  RowProducts<V, T> products() const {
    return RowProducts<V, T>({rows_, c_.E, c_.Ev, width_, value_width_, q_, scores_, o_});
  }

  void score_run(const Run& run) {
    if (c_.k_stride[3] == 1) {
      products<DT>().score(run, c_.k_stride[2] * kSize);
    } else {
      widen_rows<V, DT>(run.keys, c_.k_stride, run.count, c_.E, k_, buffer_);
      const Run widened = {reinterpret_cast<const char*>(k_), nullptr, run.at, run.count, 0, 0};
      products<THAL_F32>().score(widened, c_.E * 4);
    }
  }

  void add_values(const float* alpha) {
    const bool wild = masked_ && !finite_values();
    if constexpr (is_quantized<DT>()) scale_weights(wild);
    if (!wild && c_.v_stride[3] == 1) {
      products<DT>().add_values({runs_, run_count_, c_.v_stride[2] * kSize}, alpha);
      return;
    }
    for (const Run* run = runs_; run < runs_ + run_count_; ++run)
      widen_rows<V, DT>(run->values, c_.v_stride, run->count, c_.Ev, v_ + run->at * c_.Ev, buffer_);
    if (wild) zero_wild_values();
    const Run whole = {nullptr, reinterpret_cast<const char*>(v_), 0, count_, 0, 0};
    products<THAL_F32>().add_values({&whole, 1, c_.Ev * 4}, alpha);
    for (const Run* run = runs_; wild && run < runs_ + run_count_; ++run) add_wild_values(*run);
  }

  bool finite_values() {
    bool finite = true;
    for (const Run* run = runs_; run < runs_ + run_count_; ++run)
      finite &= all_finite<V, DT>(run->values, c_.v_stride, run->count, c_.Ev, buffer_);
    for (int64_t j = 0; j < kScales && j < count_; ++j) finite &= !is_quantized<DT>() || is_finite(value_scales_[j]);
    return finite;
  }

  // A scale that is not finite waits for add_wild_values: a weight of 0 must not become NaN.
  void scale_weights(bool wild) {
    alignas(64) float tame[kScales];
    for (int64_t j = 0; j < kScales; ++j) tame[j] = !wild || is_finite(value_scales_[j]) ? value_scales_[j] : 1.0f;
    multiply_columns(tame);
  }

  // Zeroes what is not finite in the values of v_, and all of those whose scale is not.
  void zero_wild_values() {
    zero_wild(v_, count_ * c_.Ev);
    for (int64_t j = 0; is_quantized<DT>() && j < count_; ++j)
      if (!is_finite(value_scales_[j])) std::memset(v_ + j * c_.Ev, 0, static_cast<size_t>(c_.Ev) * 4);
  }

  float* bias(int64_t r) { return scores_ + (rows_ + r) * kBlock; }

  Indices indices() {
    return {&batch_, heads_, positions_, key_index_};
  }

  // Fills the biases of the block where something may hide a key; false when no row sees any key.
  bool mask_block() {
    const bool asked = state_ == BlockRows::kMixed || (state_ == BlockRows::kPartial && p_.has_mask_mod);
    const bool hidden = c_.mask_kind != THAL_MASK_NONE || row_limit(p_, it_, it_.row0) < key0_ + count_;
    if (p_.has_score_mod || (asked && p_.has_mask_mod)) number_keys();
    masked_ = hidden || asked || p_.has_score_mod;
    if (!masked_) return true;
    if (asked) ask();
    bool live = false;
    for (int64_t r = 0; r < rows_; ++r) live |= fill_row(r, asked);
    return live;
  }

  void number_keys() {
    for (int64_t r = 0; r < rows_; ++r)
      for (int64_t j = 0; j < kBlock; ++j) key_index_[r * kBlock + j] = static_cast<int32_t>(key0_ + j);
  }

  void ask() {
    if (p_.has_mask_mod) {
      ask_mask(p_, indices(), rows_ * kParts, visible_, thal::kLanes, scratch_ + p_.at_program);
    } else {
      for (int64_t i = 0; i < rows_ * kBlock; ++i) visible_[i] = 1;
    }
    if (state_ != BlockRows::kMixed) return;
    for (int64_t r = 0; r < rows_; ++r) {
      const auto state = blocks_.state(it_.row0 + r, key0_);
      if (state == BlockRows::kPartial) continue;
      for (int64_t j = 0; j < kBlock; ++j) visible_[r * kBlock + j] = state == BlockRows::kFull;
    }
  }

  // The biases of row r; whether it sees a key.
  bool fill_row(int64_t r, bool asked) {
    const int64_t size = mask_size(c_.mask_kind), limit = row_limit(p_, it_, it_.row0 + r) - key0_;
    const bool has_mask = c_.mask_kind != THAL_MASK_NONE;
    const char* mask = has_mask ? mask_row(p_, it_, it_.row0 + r) + key0_ * c_.mask_stride[3] * size : nullptr;
    for (int64_t j = 0; j < kBlock; j += N) {
      F x = V::zero();
      const int w = static_cast<int>(smaller(N, larger(0, count_ - j)));
      if (has_mask && w > 0)
        x = load_mask_strided<V>(c_.mask_kind, mask + j * c_.mask_stride[3] * size, c_.mask_stride[3], w);
      if (asked) x = V::keep_set(x, V::load_int(visible_ + r * kBlock + j));
      V::store(bias(r) + j, x);
    }
    for (int64_t j = larger(0, smaller(limit, count_)); j < kBlock; ++j) bias(r)[j] = -kInf;
    bool live = false;
    for (int64_t j = 0; j < kBlock; j += N) live |= V::any_other(V::load(bias(r) + j), V::set1(-kInf));
    return live;
  }

  // Scores of row r to weights; returns the factor for what was summed before.
  float soften(int64_t r) {
    float* s = scores_ + r * kBlock;
    for (int64_t j = count_; j < kBlock; ++j) s[j] = -kInf;
    F top = V::set1(-kInf);
    for (int64_t j = 0; j < kBlock; j += N) {
      F x = V::load(s + j);
      if (masked_) x = V::add_bias(x, V::set1(static_cast<float>(p_.score_factor)), V::load(bias(r) + j));
      if (p_.has_score_mod) V::store(bias(r) + j, x);  // a score of -inf hides its key too
      V::store(s + j, x);
      top = V::max(top, x);
    }
    const float block_max = V::reduce_max(top);
    const float now = max_[r] > block_max ? max_[r] : block_max;
    const F safe = V::finite_max(V::set1(now)), factor = V::set1(static_cast<float>(p_.exp_factor));
    F total = V::zero();
    for (int64_t j = 0; j < kBlock; j += N) {
      const F w = V::exp2(V::mul(V::sub(V::load(s + j), safe), factor));
      total = V::add(total, w);
      V::store(s + j, w);
    }
    alignas(64) float fade[N];
    V::store(fade, V::exp2(V::mul(V::sub(V::set1(max_[r]), safe), factor)));
    max_[r] = now;
    sum_[r] = sum_[r] * fade[0] + V::reduce_add(total);
    return fade[0];
  }

  // What zero_wild_values took out, for the rows that do see the key.
  void add_wild_values(const Run& run) {
    for (int64_t j = 0; j < run.count; ++j)
      for (int64_t e = 0; e < c_.Ev; ++e) {
        float x = scalar<V, DT>(run.values + (j * c_.v_stride[2] + e * c_.v_stride[3]) * kSize);
        if constexpr (is_quantized<DT>())
          if (!is_finite(value_scales_[run.at + j])) x *= value_scales_[run.at + j];
        if (is_finite(x)) continue;
        for (int64_t r = 0; r < rows_; ++r)
          if (bias(r)[run.at + j] != -kInf) o_[r * value_width_ + e] += scores_[r * kBlock + run.at + j] * x;
      }
  }

  void finish(int64_t r) {
    emit_state(p_, it_, r, max_[r], sum_[r]);
    const F scale = it_.partial ? V::set1(1.0f) : V::mul(V::inverse_or_zero(V::set1(sum_[r])), V::set1(static_cast<float>(p_.kept())));
    for (int64_t e = 0; e < c_.Ev; e += N) {
      const int w = static_cast<int>(smaller(N, c_.Ev - e));
      const F x = V::mul(V::load(o_ + r * value_width_ + e), scale);
      with_query_type<DT>(p_, [&](auto type) { emit_columns<V, decltype(type)::value>(p_, it_, r, e, x, w); });
    }
  }
};

template <class V, int DT>
void run_rows(const Plan& p, const Item& it, char* scratch) {
  Rows<V, DT>(p, it, scratch).run();
}

}  // namespace
