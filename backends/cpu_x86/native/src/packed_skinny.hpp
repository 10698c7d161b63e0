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

// Lines of the weight at a time, and how far ahead of the arithmetic lines are asked of the memory. They may lie a multiple of
// 4096 bytes apart, where all fall into one set of eight of the L1 cache: so they are asked into the L2 cache.
constexpr int64_t kLinesAtOnce = 16;

// Four vectors of quants that lie side by side, taken from their words byte by byte: vector j has columns j, 4 + j, 8 + j, ...
template <class V, int SCHEME>
struct Quads {
  typename V::I low, high;
  explicit Quads(const uint8_t* p) {
    const auto words = V::load_quads(p);
    low = SCHEME == THAL_PACKED_I8 ? V::flip_signs(words) : words;
    high = V::high_words(low);
  }
  // Of I4 in the first or second row of the line.
  template <int J, int ROW>
  THAL_INLINE typename V::F numbers() const {
    const auto words = J < 2 ? low : high;
    constexpr bool odd = J % 2 != 0;
    if constexpr (SCHEME == THAL_PACKED_I8) return odd ? V::template pick<0xff00, 15, 128>(words) : V::template pick<0xff, 23, 128>(words);
    else if constexpr (ROW == 0) return odd ? V::template pick<0xf00, 15, 8>(words) : V::template pick<0xf, 23, 8>(words);
    else return odd ? V::template pick<0xf000, 11, 8>(words) : V::template pick<0xf0, 19, 8>(words);
  }
};

// One vector of quants, of which the first n exist.
template <class V, int SCHEME>
struct Single {
  typename V::B bytes;
  Single(const uint8_t* p, int n) : bytes(n == V::N ? V::load_bytes(p) : V::load_bytes(p, n)) {}
  template <int J, int ROW>
  THAL_INLINE typename V::F numbers() const {
    if constexpr (SCHEME == THAL_PACKED_I8) return V::template widen_bytes<THAL_I8>(bytes);
    else if constexpr (ROW == 0) return V::template widen_low<8>(bytes);
    else return V::template widen_high<8>(bytes);
  }
};

// Sums over rows, group by group. Those of a group are of quants less zero times a; with the scale they join the sums.
template <class V, int SCHEME, int M>
class RowSums {
  static constexpr int kPerLine = SCHEME == THAL_PACKED_I4 ? 2 : 1;
  using F = typename V::F;

  const thal_packed& w_;
  const SkinnyPart& part_;
  float *group_sums_, *zeros_;  // zeros of a group as vectors have them
  int64_t stride_;

 public:
  // `memory` is for M + 1 rows of columns.
  RowSums(const MatmulPlan& p, const SkinnyPart& part, float* memory)
      : w_(*p.call.packed), part_(part), group_sums_(memory), zeros_(memory + M * p.tile_stride()), stride_(p.tile_stride()) {}

  void run() const {
    const int64_t last = part_.k0 + part_.depth;
    for (int64_t k = part_.k0, end; k < last; k = end) {
      end = smaller(last, (k / w_.group + 1) * w_.group);
      for (int64_t i = k, some; i < end; i += some) {
        some = smaller(kLinesAtOnce * kPerLine, end - i);
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
    if (w_.zero) add_columns<true>(rows);
    else add_columns<false>(rows);
  }

  template <bool ZERO>
  void add_columns(const Rows& rows) const {
    const int64_t wide = 4 * V::N, line = part_.n0 + rows.k / kPerLine * w_.columns;
    const auto* data = static_cast<const uint8_t*>(w_.data) + line;
    int64_t j = 0;
    for (; j + wide <= part_.columns; j += wide)
      step<4, ZERO>(rows, j, V::N, data + j, [](const uint8_t* p) { return Quads<V, SCHEME>(p); });
    for (; j < part_.columns; j += V::N) {
      const int n = static_cast<int>(smaller(V::N, part_.columns - j));
      step<1, ZERO>(rows, j, n, data + j, [n](const uint8_t* p) { return Single<V, SCHEME>(p, n); });
    }
  }

  // C vectors of columns from j on; of a lone one the first n exist.
  template <int C, bool ZERO, class Read>
  THAL_INLINE void step(const Rows& rows, int64_t j, int n, const uint8_t* line, Read read) const {
    const int64_t group = rows.k / w_.group * w_.columns + part_.n0 + j;
    F acc[C * M], zero[C];
    if constexpr (ZERO) {
      if (rows.first) put_zeros<C>(w_.zero + group, zeros_ + j, n);
      each<C>([&](auto c) { zero[c] = V::load(zeros_ + j + c * V::N); });
    }
    float* sums = group_sums_ + j;
    each<C * M>([&](auto i) { acc[i] = rows.first ? V::zero() : V::load(sums + i / C * stride_ + i % C * V::N); });
    const float* a = part_.rows + rows.k;
    for (const float* end = a + rows.count; a < end; a += kPerLine, line += w_.columns) {
      _mm_prefetch(reinterpret_cast<const char*>(line + kLinesAtOnce * w_.columns), _MM_HINT_T1);
      const auto quants = read(line);
      each<kPerLine>([&](auto row) {
        each<C>([&](auto c) {
          F x = quants.template numbers<decltype(c)::value, decltype(row)::value>();
          if constexpr (ZERO) x = V::sub(x, zero[c]);
          each<M>([&](auto m) { acc[m * C + c] = V::fma(x, V::set1(a[m * part_.pitch + row]), acc[m * C + c]); });
        });
      });
    }
    if (!rows.last) {
      each<C * M>([&](auto i) { V::store(sums + i / C * stride_ + i % C * V::N, acc[i]); });
      return;
    }
    each<M>([&](auto m) {
      if constexpr (C == 4) V::interleave(acc + m * C);
      each<C>([&](auto c) {
        float* out = part_.sums + m * stride_ + j + c * V::N;
        const F scaled = V::mul(acc[m * C + c], V::template load_part<THAL_F32>(w_.scale + group + c * V::N, n));
        V::store(out, rows.alone ? scaled : V::add(V::load(out), scaled));
      });
    });
  }

  template <int C>
  static void put_zeros(const float* from, float* to, int n) {
    if constexpr (C == 1) V::store(to, V::template load_part<THAL_F32>(from, n));
    else
      for (int i = 0; i < V::N; ++i)
        for (int c = 0; c < C; ++c) to[c * V::N + i] = from[i * C + c];
  }
};

// ---------------------------------------------------------------------------- blocks down columns

// How far ahead of the arithmetic blocks are asked of the memory, in bytes, and into the L2 cache: two threads read Q8_0 at
// 20 GB/s so, at 14 into the L1 cache, which has fewer lines under way, and at 9 without asking.
constexpr int64_t kAhead = 8192;

// Sums of products of four columns with M rows; columns past the last are copies of it.
template <class V, int SCHEME, int M>
void sum_columns(const MatmulPlan& p, const SkinnyPart& part) {
  using F = typename V::F;
  constexpr int kColumns = 4, kVectors = kBlockElements / V::N;
  const thal_packed& w = *p.call.packed;
  const int64_t line = thal::line_bytes(w), blocks = part.depth / kBlockElements;
  const auto* data = static_cast<const uint8_t*>(w.data) + part.k0 / kBlockElements * block_bytes(SCHEME);
  const int64_t ahead = (kAhead + line - 1) / line * line;
  for (int64_t n = 0; n < part.columns; n += kColumns) {
    const uint8_t* at[kColumns];
    for (int i = 0; i < kColumns; ++i) at[i] = data + (part.n0 + smaller(n + i, part.columns - 1)) * line;
    F acc[kColumns * M];
    each<kColumns * M>([&](auto i) { acc[i] = V::zero(); });
    const float* a = part.rows + part.k0;
    for (int64_t b = 0; b < blocks; ++b, a += kBlockElements) {
      each<kColumns>([&](auto i) {
        const Block<SCHEME> block{at[i] + b * block_bytes(SCHEME)};
        _mm_prefetch(reinterpret_cast<const char*>(block.data + ahead), _MM_HINT_T1);
        using Numbers = BlockNumbers<V, SCHEME>;
        if constexpr (M == 1 && SCHEME != THAL_PACKED_Q4_1 && !Numbers::kLookedUp) {
          F sum = V::mul(block.template numbers<V, 0>(), V::load(a));
          each<kVectors - 1>([&](auto v) {
            constexpr int next = decltype(v)::value + 1;
            sum = V::fma(block.template numbers<V, next>(), V::load(a + next * V::N), sum);
          });
          acc[i] = V::fma(sum, block.template scales<V>(), acc[i]);
        } else {
          const Numbers numbers(block);
          each<kVectors>([&](auto v) {
            const F x = numbers.template get<decltype(v)::value>();
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
void sum_rows(const MatmulPlan& p, const SkinnyPart& part, int64_t rows, char* scratch) {
  if (rows > M) {
    if constexpr (M < thal::kRowsTogether) sum_rows<V, SCHEME, M + 1>(p, part, rows, scratch);
  } else if constexpr (kBlocks<SCHEME>) {
    sum_columns<V, SCHEME, M>(p, part);
  } else {
    float* group_sums = reinterpret_cast<float*>(scratch + p.at_tile) + p.rows * p.tile_stride();
    RowSums<V, SCHEME, M>(p, part, group_sums).run();
  }
}

template <class V>
void sum_part(const MatmulPlan& p, const SkinnyPart& part, char* scratch) {
  SkinnyPart some = part;
  for (int64_t m = 0; m < p.call.M; m += thal::kRowsTogether) {
    some.rows = part.rows + m * part.pitch, some.sums = part.sums + m * p.tile_stride();
    const int64_t rows = smaller(thal::kRowsTogether, p.call.M - m);
    by_scheme(p.call.packed->scheme, [&](auto scheme) { sum_rows<V, decltype(scheme)::value, 1>(p, some, rows, scratch); });
  }
}

template <class V>
constexpr thal::SkinnyKernels skinny_kernels() {
  return {pack_rows<V>, sum_part<V>, finish_tile<V>};
}

}  // namespace
