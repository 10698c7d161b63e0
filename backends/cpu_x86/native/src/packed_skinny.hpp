// Products of few rows with a packed weight: its bytes are read once, from one end to the other, and widened in registers.
#pragma once

#include "matmul_tile.hpp"

namespace {

using thal::SkinnyPart;

// Rows of a as float32, with the prologue applied, and zeros up to `pitch`.
template <class V>
void pack_rows(const MatmulPlan& p, int64_t batch, float* rows, int64_t pitch, char* scratch) {
  const thal_matmul& c = p.call;
  const int64_t size = type_bytes(c.a_type);
  const char* data = static_cast<const char*>(c.a) + thal::batch_offset(c, c.a_batch_stride, batch) * size;
  float* block = reinterpret_cast<float*>(scratch + p.at_left);
  for (int64_t k = 0; k < pitch; k += thal::kDepthMost) {
    const int64_t depth = smaller(thal::kDepthMost, c.K - k), width = smaller(thal::kDepthMost, pitch - k);
    widen_any<V>(c.a_type, {data + k * c.a_stride[1] * size, c.a_stride[0], c.a_stride[1]}, c.M, depth, width, block, scratch + p.at_buffer);
    if (c.a_prologue)
      Strips{p.a_prologue, *c.a_prologue, batch, 0, k, scratch + p.at_program, scratch + p.at_indices}.replace(block, width, c.M, width);
    for (int64_t m = 0; m < c.M; ++m) {
      std::memcpy(rows + m * pitch + k, block + m * width, static_cast<size_t>(depth) * 4);
      fill(rows + m * pitch + k + depth, width - depth, 0.0f);
    }
  }
}

// ---------------------------------------------------------------------------- rows of quants

// Rows of the weight at a time: so many lines are asked of the memory ahead of the arithmetic, wherever rows lie.
constexpr int64_t kRowsAhead = 16;

// Sums over rows, group by group. Those of a group are of quants less zero times a; with the scale they join the sums.
template <class V, int SCHEME, int M>
class RowSums {
  static constexpr bool kHalves = SCHEME == THAL_PACKED_I4;
  static constexpr int kPerLine = kHalves ? 2 : 1;
  static constexpr int kVectors = V::N == 16 ? 4 : M <= 2 ? 4 : 2;
  using F = typename V::F;

  const thal_packed& w_;
  const SkinnyPart& part_;
  float* group_sums_;
  int64_t stride_;

 public:
  RowSums(const MatmulPlan& p, const SkinnyPart& part, float* group_sums)
      : w_(*p.call.packed), part_(part), group_sums_(group_sums), stride_(p.tile_stride()) {}

  void run() const {
    const int64_t last = part_.k0 + part_.depth;
    for (int64_t k = part_.k0, end; k < last; k = end) {
      end = smaller(last, (k / w_.group + 1) * w_.group);
      for (int64_t i = k, some; i < end; i += some) {
        some = smaller(kRowsAhead, end - i);
        add_rows({i, some, i == k, i + some == end, k == part_.k0});
      }
    }
  }

 private:
  struct Rows {
    int64_t k, count;
    bool first, last;  // of their group
    bool alone;        // no group came before theirs
  };

  void add_rows(const Rows& rows) const {
    constexpr int64_t kWide = kVectors * V::N;
    int64_t j = 0;
    for (; j + kWide <= part_.columns; j += kWide) step<kVectors, true>(rows, j, V::N);
    for (; j + V::N <= part_.columns; j += V::N) step<1, true>(rows, j, V::N);
    if (j < part_.columns) step<1, false>(rows, j, static_cast<int>(part_.columns - j));
  }

  template <bool WHOLE>
  static typename V::B bytes(const uint8_t* p, int n) {
    if constexpr (WHOLE) return V::load_bytes(p);
    else return V::load_bytes(p, n);
  }

  // Columns j to j + C * N, of which the last n exist in the one vector that is not whole.
  template <int C, bool WHOLE>
  THAL_INLINE void step(const Rows& rows, int64_t j, int n) const {
    F acc[C * M], zero[C];
    const int64_t group = rows.k / w_.group * w_.columns + part_.n0 + j;
    const bool has_zero = w_.zero != nullptr;
    each<C>([&](auto c) { zero[c] = has_zero ? V::template load_part<THAL_F32>(w_.zero + group + c * V::N, n) : V::zero(); });
    each<C * M>([&](auto i) { acc[i] = rows.first ? V::zero() : V::load(group_sums_ + i / C * stride_ + j + i % C * V::N); });
    const uint8_t* line = static_cast<const uint8_t*>(w_.data) + rows.k / kPerLine * w_.columns + part_.n0 + j;
    const float* a = part_.rows + rows.k;
    const auto add = [&](int64_t r, auto number) {
      F x[C];
      each<C>([&](auto c) { x[c] = has_zero ? V::sub(number(c), zero[c]) : number(c); });
      each<C * M>([&](auto i) { acc[i] = V::fma(x[i % C], V::set1(a[i / C * part_.pitch + r]), acc[i]); });
    };
    for (int64_t r = 0; r < rows.count; r += kPerLine, line += w_.columns) {
      _mm_prefetch(reinterpret_cast<const char*>(line + kRowsAhead / kPerLine * w_.columns), _MM_HINT_T0);
      typename V::B raw[C];
      each<C>([&](auto c) { raw[c] = bytes<WHOLE>(line + c * V::N, n); });
      if constexpr (kHalves) {
        add(r, [&](auto c) { return V::template widen_low<8>(raw[c]); });
        add(r + 1, [&](auto c) { return V::template widen_high<8>(raw[c]); });
      } else {
        add(r, [&](auto c) { return V::template widen_bytes<THAL_I8>(raw[c]); });
      }
    }
    each<C * M>([&](auto i) {
      constexpr int m = i / C, c = i % C;
      const int64_t at = m * stride_ + j + c * V::N;
      if (!rows.last) return V::store(group_sums_ + at, acc[i]);
      const F scaled = V::mul(acc[i], V::template load_part<THAL_F32>(w_.scale + group + c * V::N, n));
      V::store(part_.sums + at, rows.alone ? scaled : V::add(V::load(part_.sums + at), scaled));
    });
  }
};

// ---------------------------------------------------------------------------- blocks down columns

// Sums of products of four columns with M rows; columns past the last are copies of it.
template <class V, int SCHEME, int M>
void sum_columns(const MatmulPlan& p, const SkinnyPart& part) {
  using F = typename V::F;
  constexpr int kColumns = 4, kVectors = kBlockElements / V::N;
  const thal_packed& w = *p.call.packed;
  const int64_t line = thal::line_bytes(w), blocks = part.depth / kBlockElements;
  const auto* data = static_cast<const uint8_t*>(w.data) + part.k0 / kBlockElements * block_bytes(SCHEME);
  for (int64_t n = 0; n < part.columns; n += kColumns) {
    const uint8_t* at[kColumns];
    for (int i = 0; i < kColumns; ++i) at[i] = data + (part.n0 + smaller(n + i, part.columns - 1)) * line;
    F acc[kColumns * M];
    each<kColumns * M>([&](auto i) { acc[i] = V::zero(); });
    const float* a = part.rows + part.k0;
    for (int64_t b = 0; b < blocks; ++b, a += kBlockElements) {
      each<kColumns>([&](auto i) {
        const Block<SCHEME> block{at[i] + b * block_bytes(SCHEME)};
        _mm_prefetch(reinterpret_cast<const char*>(block.data + kColumns * line), _MM_HINT_T0);
        const F scale = V::set1(block.scale());
        if constexpr (M == 1 && SCHEME != THAL_PACKED_Q4_1) {
          F sum = V::mul(block.template numbers<V, 0>(), V::load(a));
          each<kVectors - 1>([&](auto v) {
            constexpr int next = decltype(v)::value + 1;
            sum = V::fma(block.template numbers<V, next>(), V::load(a + next * V::N), sum);
          });
          acc[i] = V::fma(sum, scale, acc[i]);
        } else {
          const F minimum = V::set1(SCHEME == THAL_PACKED_Q4_1 ? block.minimum() : 0.0f);
          each<kVectors>([&](auto v) {
            const F x = block.template scaled<V>(block.template numbers<V, decltype(v)::value>(), scale, minimum);
            each<M>([&](auto m) { acc[i * M + m] = V::fma(x, V::load(a + m * part.pitch + v * V::N), acc[i * M + m]); });
          });
        }
      });
    }
    each<M>([&](auto m) {
      alignas(16) float sums[kColumns];
      _mm_store_ps(sums, V::reduce4(acc[m], acc[M + m], acc[2 * M + m], acc[3 * M + m]));
      float* out = part.sums + m * p.tile_stride() + n;
      for (int i = 0; i < kColumns && n + i < part.columns; ++i) out[i] = sums[i];
    });
  }
}

template <class V, int SCHEME, int M>
void sum_rows(const MatmulPlan& p, const SkinnyPart& part, char* scratch) {
  if (p.call.M > M) {
    if constexpr (M < thal::kSkinnyRows) sum_rows<V, SCHEME, M + 1>(p, part, scratch);
  } else if constexpr (kBlocks<SCHEME>) {
    sum_columns<V, SCHEME, M>(p, part);
  } else {
    float* group_sums = reinterpret_cast<float*>(scratch + p.at_tile) + M * p.tile_stride();
    RowSums<V, SCHEME, M>(p, part, group_sums).run();
  }
}

template <class V>
void sum_part(const MatmulPlan& p, const SkinnyPart& part, char* scratch) {
  by_scheme(p.call.packed->scheme, [&](auto scheme) { sum_rows<V, decltype(scheme)::value, 1>(p, part, scratch); });
}

template <class V>
constexpr thal::SkinnyKernels skinny_kernels() {
  return {pack_rows<V>, sum_part<V>, finish_tile<V>};
}

}  // namespace
