// Attention for tiles of query rows, flash style: an online softmax over the blocks of keys.
#pragma once

#include "score_tile.hpp"

namespace {

template <class V, int DT, bool PAIRS, int NQ>
class Tile : ScoreTile<V, DT, PAIRS, NQ> {
  using Base = ScoreTile<V, DT, PAIRS, NQ>;
  using typename Base::F;
  using typename Base::T;
  using Base::W, Base::kSize, Base::p_, Base::it_, Base::c_, Base::panels_, Base::bias_, Base::limit_, Base::buffer_;
  using Base::key0_, Base::count_, Base::value_source_, Base::v_stride_;

  T *o_, *v_, *clean_, *scores_, *max_, *sum_;
  const char* values_;
  int64_t value_stride_;
  bool values_loaded_;
  Background<V, NQ> background_;

 public:
  Tile(const Plan& p, const Item& it, char* scratch) : Base(p, it, scratch) {
    o_ = this->reals(p.at_o), v_ = this->reals(p.at_v), clean_ = this->reals(p.at_clean);
    scores_ = this->reals(p.at_scores), max_ = this->reals(p.at_max), sum_ = this->reals(p.at_sum);
  }

  void run() {
    this->start_rows();
    for (int64_t i = 0; i < panels_ * W; ++i) max_[i] = -kInf, sum_[i] = T(0);
    std::memset(o_, 0, static_cast<size_t>(panels_ * W * c_.Ev) * sizeof(T));
    this->each_block([this] {
      values_loaded_ = false;
      if constexpr (V::kTiles) {
        if (overlaps()) return advance_together();
      }
      for (int64_t panel = 0; panel < panels_; ++panel) advance(panel);
    });
    for (int64_t panel = 0; panel < panels_; ++panel) finish(panel);
  }

 private:
  // Only with tiles; attention_overlap.hpp.
  bool overlaps() const;
  void advance_together();

  void load_values() {
    values_loaded_ = true;
    values_ = value_source_, value_stride_ = v_stride_[2] * kSize;
    if constexpr (PAIRS) {
      pack_value_pairs<V>(value_source_, v_stride_, count_, c_.Ev, v_, buffer_);
    } else if (DT != real_type<V>() || !this->in_place(v_stride_)) {
      widen_rows<V, DT>(value_source_, v_stride_, count_, c_.Ev, v_, buffer_);
    } else {
      return;
    }
    values_ = reinterpret_cast<const char*>(v_), value_stride_ = c_.Ev * static_cast<int64_t>(sizeof(T));
  }

  void advance(int64_t panel) {
    alignas(64) T top[W], alpha[W];
    const auto [n, partial] = this->score(panel, scores_, top, nullptr);
    if (n == 0) return;
    if (!values_loaded_) load_values();
    with_partial(partial, [&, n = n](auto kind) { soften<decltype(kind)::value>(panel, n, top, alpha); });
    if (c_.dropout) drop(panel, n);
    add_values(panel, n, alpha, partial);
  }

  // Zeroes the weights that dropout takes; what is left is scaled once at the end.
  void drop(int64_t panel, int64_t n) {
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
    const uint64_t threshold = c_.dropout->threshold;
    for (int half = 0; half < W; half += kPhiloxLanes) {
      const Indices at = this->indices(panel, half);
      draw_for_rows(*c_.dropout, it_.b, at.heads, at.positions, key0_, n, [&](int64_t j, const uint32_t* words) {
        auto* row = reinterpret_cast<Bits*>(scores_) + (PAIRS ? j / 2 : j) * W + half;
        const Bits taken = !PAIRS ? 0 : j % 2 ? 0x0000ffffu : 0xffff0000u;  // what stays of a dropped pair's word
        for (int i = 0; i < kPhiloxLanes; ++i) row[i] &= words[i] >= threshold ? ~Bits(0) : taken;
      });
    }
  }

  // Scores to weights in place (bf16 pairs of keys where the product wants them), with the running maximum and sum.
  template <Partial P>
  void soften(int64_t panel, int64_t n, const T* unmasked_top, T* alpha) {
    const F factor = V::set1(static_cast<T>(p_.exp_factor)), rest = V::set1(static_cast<T>(p_.exp_rest));
    for (int q = 0; q < NQ; ++q) {
      T* s = scores_ + q * V::N;
      const F top = P == Partial::kNone ? V::load(unmasked_top + q * V::N) : this->template mask_scores<P>(panel, n, q, scores_);
      T* state = max_ + panel * W + q * V::N;
      const F old = V::load(state), now = V::max(old, top), safe = V::finite_max(now);
      V::store(state, now);
      const F fade = V::exp2_product(V::sub(old, safe), factor, rest);
      V::store(alpha + q * V::N, fade);
      const F total = weigh(s, n, safe, factor, rest);
      T* sum = sum_ + panel * W + q * V::N;
      V::store(sum, V::fma(V::load(sum), fade, total));
    }
  }

  // The difference is taken before scaling: near the maximum it is exact, whatever the size of the logits.
  F weigh(T* s, int64_t n, F safe, F factor, F rest) {
    const auto weight = [&](int64_t j) { return V::exp2_product(V::sub(V::load(s + j * W), safe), factor, rest); };
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

  static void store_weights(T* s, int64_t j, F a, F b) {
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
    return exposed && !this->values_are_finite();
  }

  void add_values(int64_t panel, int64_t n, const T* alpha, Partial partial) {
    T* o = o_ + panel * W * c_.Ev;
    const int64_t depth = PAIRS ? (n + 1) / 2 : n;
    if (!meets_wild(n, partial)) {
      weighted_values<V, PAIRS, NQ>(values_, value_stride_, c_.Ev, scores_, depth, o, alpha);
      return;
    }
    load_clean_values(value_source_);
    weighted_values<V, PAIRS, NQ>(reinterpret_cast<const char*>(clean_), c_.Ev * static_cast<int64_t>(sizeof(T)), c_.Ev, scores_, depth, o, alpha);
    add_wild_values(value_source_, panel, n, o, partial);
  }

  // The block's values with 0 in place of what is not finite, see clean.
  void load_clean_values(const char* source) {
    if constexpr (PAIRS) {
      pack_value_pairs<V>(source, v_stride_, count_, c_.Ev, clean_, buffer_);
      clean<true>(clean_, value_pair_words<V>(count_, c_.Ev));
    } else {
      widen_rows<V, DT>(source, v_stride_, count_, c_.Ev, clean_, buffer_);
      clean<false>(clean_, count_ * c_.Ev);
    }
  }

  // What load_clean_values left out, for the rows that do see the key.
  void add_wild_values(const char* source, int64_t panel, int64_t n, T* o, Partial partial) {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t e = 0; e < c_.Ev; ++e) {
        const T x = scalar<V, DT>(source + (j * v_stride_[2] + e * v_stride_[3]) * kSize);
        if (is_finite(x)) continue;
        for (int lane = 0; lane < W; ++lane)
          if (live(panel, j, lane, partial)) o[e * W + lane] += weight_at(j, lane) * x;
      }
  }

  bool live(int64_t panel, int64_t j, int lane, Partial partial) const {
    if (partial == Partial::kBias) return bias_[j * W + lane] != -kInf;
    return key0_ + j < limit_[panel * W + lane];
  }

  T weight_at(int64_t j, int lane) const {
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
    const T* o = o_ + panel * W * c_.Ev;
    for (int64_t i = row0; i < smaller(row0 + W, it_.rows); ++i) emit_state(p_, it_, i, max_[i], sum_[i]);
    for (int q = 0; q < NQ; ++q) {
      const int64_t first = row0 + q * V::N;
      const int64_t rows = smaller(V::N, it_.rows - first);
      const F scale = it_.partial ? V::set1(T(1)) : V::mul(V::inverse_or_zero(V::load(sum_ + first)), V::set1(static_cast<T>(p_.kept())));
      for (int64_t e = 0; e < c_.Ev && rows > 0; e += V::N) {
        const int w = static_cast<int>(smaller(V::N, c_.Ev - e));
        F t[V::N];
        for (int i = 0; i < V::N; ++i) t[i] = i < w ? V::mul(V::load(o + (e + i) * W + q * V::N), scale) : V::zero();
        V::transpose(t);
        with_query_type<DT>(p_, [&](auto type) {
          for (int64_t i = 0; i < rows; ++i) emit_columns<V, decltype(type)::value>(p_, it_, first + i, e, t[i], w);
        });
      }
    }
  }
};

template <class V, int DT, bool PAIRS>
void run_tile(const Plan& p, const Item& it, char* scratch) {
  if (p.panel == V::N) return Tile<V, DT, PAIRS, 1>(p, it, scratch).run();
  if (p.panel == 2 * V::N) return Tile<V, DT, PAIRS, 2>(p, it, scratch).run();
  // Functions want 16 lanes, which are four vectors of the narrowest.
  if constexpr (V::N == 4) Tile<V, DT, PAIRS, 4>(p, it, scratch).run();
}

}  // namespace
