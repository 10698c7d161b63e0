// Gradients of attention for tiles of query rows: the scores are computed again, and with P their weights, D the sum
// of grad_out * out in each row, and dP = grad_out . value (Dao et al., FlashAttention, arXiv:2205.14135, algorithm 4),
//
//   dS = P * (dP - D + grad_lse),  grad_query = scale * dS . key,  grad_key = scale * dS^T . query,
//   grad_value = P^T . grad_out.
//
// A pair of weight 0, hidden or not, passes nothing on, whatever its operands hold.
#pragma once

#include "gradient.hpp"
#include "gradient_gemm.hpp"
#include "gradient_sums.hpp"
#include "score_tile.hpp"

namespace {

using thal::GradientItem;
using thal::GradientPlan;

template <class V, int DT, bool PAIRS, int NQ>
class GradientTile : ScoreTile<V, DT, PAIRS, NQ> {
  using Base = ScoreTile<V, DT, PAIRS, NQ>;
  using typename Base::F;
  using typename Base::T;
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  using Base::W, Base::kSize, Base::p_, Base::it_, Base::c_, Base::panels_, Base::buffer_, Base::key0_, Base::count_;
  using Base::keys_, Base::key_stride_, Base::value_source_, Base::v_stride_, Base::key_source_, Base::k_stride_;
  static constexpr int64_t kReal = sizeof(T), kPanel = thal::kKeyBlock * W;
  static_assert(V::kRows <= thal::kSpareKeys && thal::kKeyBlock % V::kRows == 0, "products take whole groups of keys");

  const GradientPlan& g_;
  const GradientItem& item_;
  // Of all panels: float32, and for products of pairs in bf16 too.
  T *weights_, *gradients_, *narrow_weights_, *narrow_gradients_;
  T* key_pairs_;  // the gradients of one panel, in pairs of keys
  T *dots_, *query_rows_, *above_, *above_rows_, *delta_, *shift_, *out_, *clean_, *v_, *dq_;
  T *key_sums_, *value_sums_;
  Bits* kept_;
  bool finite_query_ = true, finite_above_ = true, values_loaded_;
  int finite_keys_;  // -1 unknown, else 0 or 1
  const char *values_, *key_rows_;
  int64_t key_row_stride_, value_stride_, value_words_, limits_[thal::kPanelsMost];

 public:
  GradientTile(const GradientPlan& g, const GradientItem& item, const Item& it, T* keys, char* scratch)
      : Base(g.p, it, scratch), g_(g), item_(item) {
    weights_ = this->reals(g.at_weights), gradients_ = this->reals(g.at_gradients);
    narrow_weights_ = this->reals(g.at_narrow_weights), narrow_gradients_ = this->reals(g.at_narrow_gradients);
    key_pairs_ = this->reals(g.at_key_pairs);
    value_words_ = PAIRS ? (c_.Ev + 1) / 2 : c_.Ev;
    dots_ = this->reals(p_.at_scores), dq_ = this->reals(p_.at_o), v_ = this->reals(p_.at_v);
    query_rows_ = this->reals(g.at_query_rows), above_ = this->reals(g.at_above);
    above_rows_ = this->reals(g.at_above_rows), delta_ = this->reals(g.at_delta), shift_ = this->reals(g.at_shift);
    out_ = this->reals(g.at_out);
    clean_ = this->reals(g.at_clean), kept_ = reinterpret_cast<Bits*>(this->ints(g.at_kept));
    key_sums_ = keys, value_sums_ = keys + (it.sequence.S + thal::kSpareKeys) * g.key_width;
  }

  void run() {
    this->start_rows();
    start_gradients();
    this->each_block([this] {
      values_loaded_ = false, finite_keys_ = -1;
      for (int64_t panel = 0; panel < panels_; ++panel) limits_[panel] = advance(panel);
      add_to_keys();
    });
    for (int64_t panel = 0; panel < panels_; ++panel) finish(panel);
  }

 private:
  // Where row `row` begins in a tensor with a row, or a number, for each query.
  int64_t place(const int64_t* stride, int64_t row) const {
    const int64_t l = row / p_.group, h = it_.kv_head * p_.group + row % p_.group;
    return first_row(stride) + h * stride[1] + l * stride[2];
  }
  int64_t first_row(const int64_t* stride) const {
    return p_.packed() ? it_.sequence.first_q * stride[2] : it_.b * stride[0];
  }
  const char* row_of(const void* base, const int64_t* stride, int64_t row) const {
    return static_cast<const char*>(base) + place(stride, row) * kSize;
  }

  void start_gradients() {
    std::memset(dq_, 0, static_cast<size_t>(panels_ * W * c_.E) * sizeof(T));
    finite_query_ = pack_rows(query(), query_rows_);
    finite_above_ = pack_rows(above(), above_rows_);
    for (int64_t i = 0; i < panels_ * W; ++i) {
      // As the online softmax does with its maximum: the difference is taken before the scores are scaled. A row that
      // sees no key has scores of -inf alone.
      const T lse = i < it_.rows ? static_cast<const T*>(c_.lse)[place(c_.lse_stride, it_.row0 + i)] : T(0);
      shift_[i] = lse == -kInf ? T(0) : lse / static_cast<T>(p_.lse_factor);
    }
    for (int64_t panel = 0; panel < panels_; ++panel) {
      pack(above(), panel, above_ + panel * value_words_ * W);
      add_deltas(panel);
    }
  }

  using Rows = thal::Plan::Panel;
  Rows query() const { return {c_.q, c_.q_stride, c_.E, 1.0}; }
  Rows above() const { return {g_.g.grad_out, g_.g.grad_out_stride, c_.Ev, 1.0}; }

  // Rows of the tile in chunks of columns, as add_outer_block reads them; 0 in place of what is not finite. Returns
  // whether everything is.
  bool pack_rows(const Rows& from, T* out) {
    F seen = V::zero();
    const int64_t step = PAIRS ? 2 : 1;
    for (int64_t i = 0; i < it_.rows; i += step) {
      const char* row = contiguous(from, i, buffer_);
      const char* next = PAIRS && i + 1 < it_.rows ? contiguous(from, i + 1, buffer_ + from.columns * kSize) : nullptr;
      for (int64_t e = 0, width; e < from.columns; e += width) {
        width = chunk_columns<V>(e, from.columns);
        T* chunk = out + e * depth() + i / step * width;
        for (int64_t k = 0; k < width; k += V::N) {
          const int w = static_cast<int>(larger(0, smaller(V::N, from.columns - e - k)));
          V::store(chunk + k, w ? packed(row + (e + k) * kSize, next ? next + (e + k) * kSize : nullptr, w, seen) : V::zero());
        }
      }
    }
    const bool finite = !V::any_nan(seen);
    if (!finite) clean<PAIRS>(out, depth() * thal::chunked_columns(from.columns, V::N));
    return finite;
  }

  // Packed rows of a chunk.
  int64_t depth() const { return PAIRS ? panels_ * W / 2 : panels_ * W; }

  const char* contiguous(const Rows& from, int64_t i, char* buffer) const {
    return contiguous_row<kSize>(row_of(from.data, from.stride, it_.row0 + i), from.stride[3], from.columns, buffer);
  }

  // w columns of a row, or of two as pairs; `seen` becomes NaN where one is not finite.
  F packed(const char* row, const char* next, int w, F& seen) {
    const F x = V::template load_part<DT>(row, w);
    seen = V::fma(x, V::zero(), seen);
    if constexpr (PAIRS) {
      if (next) seen = V::fma(V::template load_part<DT>(next, w), V::zero(), seen);
      return V::zip_rows(row, next, w);
    } else {
      return x;
    }
  }

  // Rows of a panel as its lanes, with their columns in rows, as products with keys and values read them.
  void pack(const Rows& from, int64_t panel, T* out) {
    pack_panel<V, DT, PAIRS, NQ>(p_, it_, from, first_row(from.stride), it_.row0 + panel * W, out, buffer_);
  }

  // grad_out . out of each row, summed in the order in which grad_out . value is: where one key has all the weight, the
  // two cancel to 0, as they should. What the LSE passes on is subtracted.
  void add_deltas(int64_t panel) {
    pack({c_.out, c_.out_stride, c_.Ev, 1.0}, panel, out_);
    const T* above = above_ + panel * value_words_ * W;
    T* delta = delta_ + panel * W;
    for (int q = 0; q < NQ; ++q) {
      F sum = V::zero();
      for (int64_t i = q * V::N; i < value_words_ * W; i += W)
        sum = multiply_add<V, PAIRS>(V::load(out_ + i), V::load(above + i), sum);
      V::store(delta + q * V::N, sum);
    }
    for (int64_t lane = 0; g_.g.grad_lse && lane < real_lanes(panel); ++lane)
      delta[lane] -= static_cast<const T*>(g_.g.grad_lse)[place(g_.g.grad_lse_stride, it_.row0 + panel * W + lane)];
  }

  void load_values() {
    values_loaded_ = true;
    values_ = value_source_, value_stride_ = v_stride_[2] * kSize;
    const bool direct = PAIRS ? c_.Ev % 2 == 0 : DT == real_type<V>();
    if (direct && this->in_place(v_stride_)) return;
    if constexpr (PAIRS) {
      copy_pair_rows(value_source_, v_stride_, count_, c_.Ev, value_words_, reinterpret_cast<char*>(v_));
    } else {
      widen_rows<V, DT>(value_source_, v_stride_, count_, c_.Ev, v_, buffer_);
    }
    values_ = reinterpret_cast<const char*>(v_), value_stride_ = value_words_ * kReal;
  }

  // Weights and score gradients of a panel, and its share of the gradient of the query. Returns the number of keys.
  int64_t advance(int64_t panel) {
    alignas(64) T top[W];
    T *p = weights_ + panel * kPanel, *ds = gradients_ + panel * kPanel;
    const auto [n, partial] = this->score(panel, p, top, dots_);
    if (n == 0) return 0;
    if (!values_loaded_) load_values();
    scores<V, PAIRS, NQ>(values_, value_stride_, n, above_ + panel * value_words_ * W, value_words_, ds, top);
    if (c_.dropout) draw(panel, n, ds);
    with_partial(partial, [&, n = n](auto kind) { differentiate<decltype(kind)::value>(panel, n, p, ds); });
    if (g_.g.mask_sum >= 0) add_to_mask(panel, n, ds);
    if (p_.has_score_mod) pull_back(panel, n, p, ds);
    if (c_.dropout)
      for (int64_t i = 0; i < n * W; ++i) reinterpret_cast<Bits*>(p)[i] &= kept_[i];
    const int64_t whole = (n + V::kRows - 1) / V::kRows * V::kRows;  // add_outer reads whole groups of keys
    std::memset(p + n * W, 0, static_cast<size_t>((whole - n) * W) * sizeof(T));
    std::memset(ds + n * W, 0, static_cast<size_t>((whole - n) * W) * sizeof(T));
    if constexpr (PAIRS) narrow(panel, whole, p, ds);
    add_to_query(panel, n, ds);
    return n;
  }

  // Weights and gradients rounded to bf16, as the products of pairs read them.
  void narrow(int64_t panel, int64_t keys, const T* p, const T* ds) {
    T *weights = narrow_weights_ + panel * kPanel / 2, *gradients = narrow_gradients_ + panel * kPanel / 2;
    for (int64_t j = 0; j < keys; ++j) {
      V::template store_bf16<NQ>(weights + j * W / 2, p + j * W);
      V::template store_bf16<NQ>(gradients + j * W / 2, ds + j * W);
    }
    for (int64_t j = 0; j < keys; j += 2)
      for (int64_t i = j * W; i < j * W + W; i += V::N)
        V::store(key_pairs_ + (i - j * W / 2), V::bf16_pairs(V::load(ds + i), V::load(ds + i + W)));
  }

  // Which weights dropout keeps; the gradients of the others are zeroed.
  void draw(int64_t panel, int64_t n, T* ds) {
    const uint64_t threshold = c_.dropout->threshold;
    for (int half = 0; half < W; half += kPhiloxLanes) {
      const Indices at = this->indices(panel, half);
      draw_for_rows(*c_.dropout, it_.b, at.heads, at.positions, key0_, n, [&](int64_t j, const uint32_t* words) {
        Bits* kept = kept_ + j * W + half;
        auto* row = reinterpret_cast<Bits*>(ds) + j * W + half;
        for (int i = 0; i < kPhiloxLanes; ++i) {
          kept[i] = words[i] >= threshold ? ~Bits(0) : Bits(0);
          row[i] &= kept[i];
        }
      });
    }
  }

  // Scores to weights, and the gradients of weights to those of scores, both in place.
  template <Partial P>
  void differentiate(int64_t panel, int64_t n, T* p, T* ds) {
    const F factor = V::set1(static_cast<T>(p_.exp_factor)), rest = V::set1(static_cast<T>(p_.exp_rest));
    const F kept = V::set1(static_cast<T>(p_.kept()));
    for (int q = 0; q < NQ; ++q) {
      if constexpr (P != Partial::kNone) this->template mask_scores<P>(panel, n, q, p);
      const F shift = V::load(shift_ + panel * W + q * V::N), delta = V::load(delta_ + panel * W + q * V::N);
      T *x = p + q * V::N, *d = ds + q * V::N;
      for (int64_t j = 0; j < n; ++j, x += W, d += W) {
        const F weight = V::exp2_product(above_shift<P>(V::load(x), shift), factor, rest);
        V::store(x, weight);
        V::store(d, V::where_nonzero(weight, V::mul(weight, V::sub(V::mul(V::load(d), kept), delta))));
      }
    }
  }

  // A row that sees NaN has an LSE of NaN: what is hidden from it still has weight 0.
  template <Partial P>
  static F above_shift(F score, F shift) {
    if constexpr (P == Partial::kNone) return V::sub(score, shift);
    return V::add_bias(shift, V::set1(-1.0f), score);
  }

  int64_t real_lanes(int64_t panel) const { return smaller(W, it_.rows - panel * W); }

  void add_to_mask(int64_t panel, int64_t n, const T* ds) {
    const int64_t* stride = g_.g.mask_sum_stride;
    double* base = item_.sums + g_.g.mask_sum + it_.b * stride[0] + key0_ * stride[3];
    for (int64_t lane = 0; lane < real_lanes(panel); ++lane) {
      const int64_t row = it_.row0 + panel * W + lane;
      const int64_t l = row / p_.group, h = it_.kv_head * p_.group + row % p_.group;
      double* sums = base + h * stride[1] + l * stride[2];
      for (int64_t j = 0; j < n; ++j) sums[j * stride[3]] += static_cast<double>(ds[j * W + lane]);
    }
  }

  // Through the score_mod: its captured tensors get their share, and ds becomes the gradient of what it was given.
  void pull_back(int64_t panel, int64_t n, const T* p, T* ds) {
    for (int half = 0; half < W; half += thal::kLanes) {
      thal::Frame frame = frame_of(*c_.score_mod, this->indices(panel, half), n, 1, this->scratch_ + g_.at_program);
      frame.in[0] = {dots_ + half, W}, frame.in[5] = {ds + half, W};
      frame.factor = p_.scale;
      frame.out = ds + half, frame.out_stride = W;
      CapturedSums<T> sums{g_, item_.sums, p + half, W, smaller(thal::kLanes, real_lanes(panel) - half)};
      if (g_.g.contribution_count && sums.lanes > 0) frame.sink = CapturedSums<T>::take, frame.sink_context = &sums;
      p_.isa->run_program(g_.score_gradient, frame);
    }
    for (int64_t i = 0; i < n * W; i += V::N)  // what a function makes of a hidden pair may be anything
      V::store(ds + i, V::where_nonzero(V::load(p + i), V::load(ds + i)));
  }

  void add_to_query(int64_t panel, int64_t n, const T* ds) {
    alignas(64) T ones[W];
    for (T& x : ones) x = T(1);
    T* dq = dq_ + panel * W * c_.E;
    if (finite_keys_ < 0) load_key_rows();
    const T* weights = PAIRS ? key_pairs_ : ds;
    weighted_values<V, PAIRS, NQ>(key_rows_, key_row_stride_, c_.E, weights, PAIRS ? (n + 1) / 2 : n, dq, ones);
    if (!finite_keys_) add_wild_keys(n, ds, dq);
  }

  // The block's keys as the product with their gradients reads them, with 0 in place of what is not finite.
  void load_key_rows() {
    finite_keys_ = all_finite<V, DT>(key_source_, k_stride_, count_, c_.E, buffer_);
    key_rows_ = reinterpret_cast<const char*>(clean_), key_row_stride_ = c_.E * kReal;
    if constexpr (PAIRS) {
      zip_value_rows<V>(key_source_, k_stride_, count_, c_.E, clean_, buffer_);
      if (!finite_keys_) clean<true>(clean_, (count_ + 1) / 2 * c_.E);
    } else if (finite_keys_) {
      key_rows_ = keys_, key_row_stride_ = key_stride_;
    } else {
      widen_rows<V, DT>(key_source_, k_stride_, count_, c_.E, clean_, buffer_);
      clean<false>(clean_, count_ * c_.E);
    }
  }

  void add_wild_keys(int64_t n, const T* ds, T* dq) const {
    for (int64_t j = 0; j < n; ++j)
      for (int64_t e = 0; e < c_.E; ++e) {
        const T x = scalar<V, DT>(key_source_ + (j * k_stride_[2] + e * k_stride_[3]) * kSize);
        if (is_finite(x)) continue;
        for (int lane = 0; lane < W; ++lane)
          if (ds[j * W + lane] != T(0)) dq[e * W + lane] += ds[j * W + lane] * x;
      }
  }

  // The block's share of the gradients of keys and values.
  void add_to_keys() {
    int64_t most = 0;
    for (int64_t panel = 0; panel < panels_; ++panel) most = larger(most, limits_[panel]);
    if (most == 0) return;
    T *keys = key_sums_ + key0_ * g_.key_width, *values = value_sums_ + key0_ * g_.value_width;
    add_products(PAIRS ? narrow_gradients_ : gradients_, most, query_rows_, c_.E, keys, g_.key_width);
    add_products(PAIRS ? narrow_weights_ : weights_, most, above_rows_, c_.Ev, values, g_.value_width);
    if (!finite_query_) add_wild_rows(gradients_, query(), keys, g_.key_width);
    if (!finite_above_) add_wild_rows(weights_, above(), values, g_.value_width);
  }

  void add_products(const T* weights, int64_t keys, const T* rows, int64_t columns, T* sums, int64_t width) {
    const TileWeights w{reinterpret_cast<const char*>(weights), panels_, kPanel * (PAIRS ? 2 : kReal), it_.rows, limits_};
    add_outer_block<V, PAIRS, W>(w, keys, rows, depth(), columns, sums, width);
  }

  // What pack_rows left out, for the keys that the row sees.
  void add_wild_rows(const T* weights, const Rows& from, T* sums, int64_t width) {
    for (int64_t i = 0; i < it_.rows; ++i) {
      const char* row = row_of(from.data, from.stride, it_.row0 + i);
      const T* w = weights + i / W * kPanel + i % W;
      for (int64_t e = 0; e < from.columns; ++e) {
        const T x = scalar<V, DT>(row + e * from.stride[3] * kSize);
        if (is_finite(x)) continue;
        for (int64_t j = 0; j < limits_[i / W]; ++j)
          if (w[j * W] != T(0)) sums[j * width + e] += w[j * W] * x;
      }
    }
  }

  void finish(int64_t panel) {
    const F scale = V::set1(static_cast<T>(p_.scale));
    const int64_t* stride = g_.g.grad_q_stride;
    for (int q = 0; q < NQ; ++q) {
      const int64_t first = panel * W + q * V::N, rows = smaller(V::N, it_.rows - first);
      for (int64_t e = 0; e < c_.E && rows > 0; e += V::N) {
        const int w = static_cast<int>(smaller(V::N, c_.E - e));
        F t[V::N];
        for (int i = 0; i < V::N; ++i)
          t[i] = i < w ? V::mul(V::load(dq_ + (panel * c_.E + e + i) * W + q * V::N), scale) : V::zero();
        V::transpose(t);
        for (int64_t i = 0; i < rows; ++i) {
          char* row = const_cast<char*>(row_of(g_.g.grad_q, stride, it_.row0 + first + i));
          store_columns<V, DT>(row + e * stride[3] * kSize, stride[3], t[i], w);
        }
      }
    }
  }
};

// Sums of keys and values as they are summed for an item, to the tensors.
template <class V, int DT>
void store_key_gradients(const GradientPlan& g, const GradientItem& item, const void* sums) {
  using T = Real<V>;
  const T* keys = static_cast<const T*>(sums);
  const thal_attention& c = g.p.call;
  const T* values = keys + (item.sequence.S + thal::kSpareKeys) * g.key_width;
  const auto store = [&](const T* from, int64_t width, int64_t columns, void* to, const int64_t* stride, double factor) {
    constexpr int64_t size = size_of<DT>();
    const int64_t first = g.p.packed() ? item.sequence.first_k * stride[2] : item.sequence.b * stride[0];
    char* base = static_cast<char*>(to) + (first + item.kv_head * stride[1]) * size;
    for (int64_t j = 0; j < item.sequence.S; ++j)
      for (int64_t e = 0; e < columns; e += V::N) {
        const typename V::F x = V::mul(V::load(from + j * width + e), V::set1(static_cast<T>(factor)));
        store_columns<V, DT>(base + (j * stride[2] + e * stride[3]) * size, stride[3], x,
                             static_cast<int>(smaller(V::N, columns - e)));
      }
  };
  store(keys, g.key_width, c.E, g.g.grad_k, g.g.grad_k_stride, g.p.scale);
  store(values, g.value_width, c.Ev, g.g.grad_v, g.g.grad_v_stride, g.p.kept());
}

template <class V, int DT, bool PAIRS>
void run_gradient(const GradientPlan& g, const GradientItem& item, char* scratch) {
  using T = Real<V>;
  T* keys = reinterpret_cast<T*>(item.partial ? item.partial : scratch + g.at_keys);
  const int64_t rows = item.sequence.S + thal::kSpareKeys;
  std::memset(keys, 0, static_cast<size_t>(rows * (g.key_width + g.value_width)) * sizeof(T));
  for (int64_t tile = item.tile0; tile < item.tile0 + item.tiles; ++tile) {
    const Item it = thal::tile_item(g, item, tile);
    if (g.p.panel == V::N) {
      GradientTile<V, DT, PAIRS, 1>(g, item, it, keys, scratch).run();
    } else if (g.p.panel == 2 * V::N) {
      GradientTile<V, DT, PAIRS, 2>(g, item, it, keys, scratch).run();
    } else if constexpr (V::N == 4) {
      GradientTile<V, DT, PAIRS, 4>(g, item, it, keys, scratch).run();
    }
  }
  if (!item.partial) store_key_gradients<V, DT>(g, item, keys);
}

}  // namespace
