// Blocks of the operands of a fused matrix product as panels of float32 or float64, with prologues applied.
#pragma once

#include "machine.hpp"
#include "matmul.hpp"
#include "pack.hpp"

namespace {

using thal::MatmulBlock;
using thal::MatmulPlan;

// A strided matrix.
struct Elements {
  const char* data;
  int64_t row_stride, column_stride;  // in elements
};

// Columns are contiguous: rows are widened vector by vector.
template <class V, int DT>
void widen_along_rows(const Elements& from, int64_t rows, int64_t columns, int64_t width, Real<V>* to) {
  constexpr int64_t size = size_of<DT>();
  for (int64_t i = 0; i < rows; ++i, to += width) {
    const char* row = from.data + i * from.row_stride * size;
    for (int64_t j = 0; j < width; j += V::N) {
      const int some = static_cast<int>(larger(0, smaller(V::N, columns - j)));
      const auto x = some == V::N ? V::template load_as<DT>(row + j * size) : V::template load_part<DT>(row + j * size, some);
      if (width - j >= V::N) {
        V::store(to + j, x);
      } else {
        V::template store_part<real_type<V>()>(to + j, x, static_cast<int>(width - j));
      }
    }
  }
}

// The columns of a square as `count` rows of a panel that has `left` from here on, at its column j.
template <class V>
THAL_INLINE void store_square(typename V::F (&square)[V::N], int64_t count, int64_t left, int64_t width, int64_t j,
                              Real<V>* out) {
  V::transpose(square);
  const int64_t lanes = smaller(V::N, width - j);
  for (int64_t i = 0; i < count; ++i, out += width) {
    // Where a row is shorter than a vector, what is written past its end is overwritten by the next row.
    if (lanes == V::N || (width < V::N && i + 1 < left)) {
      V::store(out, square[i]);
    } else {
      V::template store_part<real_type<V>()>(out, square[i], static_cast<int>(lanes));
    }
  }
}

// Room for a line of a block along K, in any type.
constexpr int64_t kLineBytes = thal::kDepthMost * 8;

// Lines of an operand along K are short stretches of distant rows, which the processor does not foresee: while some are
// turned into a panel, the same stretch of those that follow is asked for. Past the end of an operand nothing happens.
template <class V>
THAL_INLINE void prefetch_lines(const char* const (&lines)[V::N], int64_t at, int64_t ahead) {
  for (int i = 0; i < V::N; ++i) {
    const uintptr_t place = reinterpret_cast<uintptr_t>(lines[i]) + static_cast<uintptr_t>(at + ahead);
    _mm_prefetch(reinterpret_cast<const char*>(place), _MM_HINT_T1);
  }
}

// Rows are contiguous, or `buffer` takes copies of them that are: squares of N x N are transposed in registers.
template <class V, int DT>
void widen_across_rows(const Elements& from, int64_t rows, int64_t columns, int64_t width, Real<V>* to, char* buffer) {
  constexpr int64_t size = size_of<DT>();
  for (int64_t j = 0; j < width; j += V::N) {
    const char* lines[V::N];
    for (int64_t i = 0; i < V::N; ++i)
      lines[i] = j + i < columns ? contiguous_row<size>(from.data + (j + i) * from.column_stride * size, from.row_stride, rows,
                                                        buffer + i * kLineBytes)
                                 : nullptr;
    for (int64_t k = 0; k < rows; k += V::N) {
      const int some = static_cast<int>(smaller(V::N, rows - k));
      if (from.row_stride == 1) prefetch_lines<V>(lines, k * size, V::N * from.column_stride * size);
      typename V::F square[V::N];
      for (int i = 0; i < V::N; ++i) {
        if (!lines[i]) square[i] = V::zero();
        else if (some == V::N) square[i] = V::template load_as<DT>(lines[i] + k * size);
        else square[i] = V::template load_part<DT>(lines[i] + k * size, some);
      }
      store_square<V>(square, some, rows - k, width, j, to + k * width + j);
    }
  }
}

// Element (i, j) to to[i * width + j], 0 for columns <= j < width. At most kDepthMost rows; `buffer` has kWidenBytes<V>.
template <class V, int DT>
void widen(const Elements& from, int64_t rows, int64_t columns, int64_t width, Real<V>* to, char* buffer) {
  if (from.column_stride == 1) return widen_along_rows<V, DT>(from, rows, columns, width, to);
  widen_across_rows<V, DT>(from, rows, columns, width, to, buffer);
}
template <class V>
constexpr int64_t kWidenBytes = V::N * kLineBytes;

template <class V>
void widen_any(int32_t type, const Elements& from, int64_t rows, int64_t columns, int64_t width, Real<V>* to, char* buffer) {
  switch (type) {
    case THAL_F32:
      return widen<V, THAL_F32>(from, rows, columns, width, to, buffer);
    case THAL_BF16:
      return widen<V, THAL_BF16>(from, rows, columns, width, to, buffer);
    case THAL_F16:
      return widen<V, THAL_F16>(from, rows, columns, width, to, buffer);
    default:
      // A product with an operand of this type is one of float64.
      if constexpr (sizeof(Real<V>) == 8) widen<V, THAL_F64>(from, rows, columns, width, to, buffer);
  }
}

inline int64_t type_bytes(int32_t type) { return thal::bytes_of(type); }

// The indices that a captured function is told, as int32.
struct Told {
  int32_t batch;
  int32_t *rows, *columns;
  explicit Told(char* scratch) : batch(0), rows(reinterpret_cast<int32_t*>(scratch)), columns(rows + kChunk) {}
  static void count(int32_t* out, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(first + i);
  }
};

// A captured function over a matrix of numbers in memory, by strips of kLanes columns and kChunk rows. Strips of the same
// rows come one after the other, so that tensors which are read or written beside the matrix are walked along their rows:
// the other way round a projection of 512 x 1536 float32 lost 0.4 ms of 5 to misses.
struct Strips {
  const thal::Program& program;
  const thal_function& function;
  int64_t batch, row0, column0;  // of the matrix's first element, as the function is told
  char *memory, *indices;

  // f(frame, i, j) for the strip at row i, column j of the matrix at `data`, whose columns are a multiple of kLanes.
  template <class T, class F>
  void each(const T* data, int64_t stride, int64_t rows, int64_t columns, F f) const {
    Told told(indices);
    told.batch = static_cast<int32_t>(batch);
    Frame frame;
    frame.factor = 1.0, frame.captured = function.captured, frame.memory = memory;
    frame.out = nullptr, frame.out_stride = 0, frame.sink = nullptr, frame.sink_context = nullptr;
    frame.in[1] = {&told.batch, 0}, frame.in[2] = {told.rows, 0}, frame.in[3] = {told.columns, 0};
    for (int64_t i = 0; i < rows; i += kChunk) {
      frame.rows = smaller(kChunk, rows - i);
      Told::count(told.rows, row0 + i, frame.rows);
      for (int64_t j = 0; j < columns; j += kLanes) {
        Told::count(told.columns, column0 + j, kLanes);
        frame.in[0] = {data + i * stride + j, stride};
        f(frame, i, j);
      }
    }
  }

  // The function's first result in place of the matrix.
  template <class T>
  void replace(T* data, int64_t stride, int64_t rows, int64_t columns) const {
    each(data, stride, rows, columns, [&](Frame& frame, int64_t i, int64_t j) {
      frame.out = data + i * stride + j, frame.out_stride = stride;
      run_program(program, frame);
    });
  }
};

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class V>
thal::PanelSource plain_source(const MatmulPlan& p) {
  const auto fill = [](const void* context, const thal::PanelBlock& block, int64_t width, void* panel, char* buffer) {
    const auto& c = *static_cast<const thal_matmul*>(context);
    const int64_t place = block.k0 * c.b_stride[0] + block.n0 * c.b_stride[1];
    const int64_t first = thal::batch_offset(c, c.b_batch_stride, block.batch) + place;
    const Elements from{static_cast<const char*>(c.b) + first * type_bytes(c.b_type), c.b_stride[0], c.b_stride[1]};
    widen_any<V>(c.b_type, from, block.depth, block.columns, width, static_cast<Real<V>*>(panel), buffer);
  };
  return {fill, &p.call, kWidenBytes<V>};
}

// Columns of a panel of b: two vectors, or one at the end where that is enough.
template <class V>
int64_t panel_width(int64_t columns) {
  return columns <= V::N ? V::N : 2 * V::N;
}

template <class V>
void pack_right(const MatmulPlan& p, const MatmulBlock& b, void* panels, char* scratch) {
  using T = Real<V>;
  T* to = static_cast<T*>(panels);
  const int64_t last = b.first + b.count;
  char* buffer = scratch + p.at_buffer;
  if (!p.call.b_prologue) {
    for (int64_t n = b.first, width; n < last; n += width, to += b.depth * width) {
      width = panel_width<V>(last - n);
      p.source.fill(p.source.context, {b.batch, b.k0, b.depth, n, smaller(width, last - n)}, width, to, buffer);
    }
    return;
  }
  constexpr int64_t kWide = 2 * V::N < kLanes ? kLanes : 2 * V::N;  // the machine's lanes may be more than a panel's
  T* block = reinterpret_cast<T*>(scratch + p.at_block);
  for (int64_t n = b.first; n < last; n += kWide) {
    const int64_t columns = smaller(kWide, last - n), width = columns <= kLanes ? kLanes : kWide;
    p.source.fill(p.source.context, {b.batch, b.k0, b.depth, n, columns}, width, block, buffer);
    const Strips strips{p.b_prologue, *p.call.b_prologue, b.batch, b.k0, n, scratch + p.at_program, scratch + p.at_indices};
    strips.replace(block, width, b.depth, width);
    for (int64_t j = 0, part; j < columns; j += part, to += b.depth * part) {
      part = panel_width<V>(columns - j);
      const Elements from{reinterpret_cast<const char*>(block + j), width, 1};
      widen_along_rows<V, real_type<V>()>(from, b.depth, smaller(part, columns - j), part, to);
    }
  }
}

// Rows of a that a prologue is applied to at a time: whole panels, of just less than what the machine takes at once.
template <class V>
constexpr int64_t kPrologueRows = kChunk / V::kRows * V::kRows;

template <class V>
void pack_left(const MatmulPlan& p, const MatmulBlock& b, void* panels, char* scratch) {
  using T = Real<V>;
  const thal_matmul& c = p.call;
  T* to = static_cast<T*>(panels);
  const int64_t size = type_bytes(c.a_type), last = b.first + b.count, pitch = padded(b.depth);
  const int64_t first = thal::batch_offset(c, c.a_batch_stride, b.batch) + b.k0 * c.a_stride[1];
  const char* data = static_cast<const char*>(c.a) + first * size;
  T* block = reinterpret_cast<T*>(scratch + p.at_block);
  char* buffer = scratch + p.at_buffer;
  // The panels are those of the transposed operand: a row for each k.
  const auto pack = [&](int32_t type, const Elements& rows, int64_t count) {
    widen_any<V>(type, {rows.data, rows.column_stride, rows.row_stride}, b.depth, count, V::kRows, to, buffer);
    to += b.depth * V::kRows;
  };
  if (!c.a_prologue) {
    for (int64_t m = b.first; m < last; m += V::kRows)
      pack(c.a_type, {data + m * c.a_stride[0] * size, c.a_stride[0], c.a_stride[1]}, smaller(V::kRows, last - m));
    return;
  }
  for (int64_t m = b.first; m < last; m += kPrologueRows<V>) {
    const int64_t rows = smaller(kPrologueRows<V>, last - m);
    const Elements from{data + m * c.a_stride[0] * size, c.a_stride[0], c.a_stride[1]};
    widen_any<V>(c.a_type, from, rows, b.depth, pitch, block, buffer);
    const Strips strips{p.a_prologue, *c.a_prologue, b.batch, m, b.k0, scratch + p.at_program, scratch + p.at_indices};
    strips.replace(block, pitch, rows, pitch);
    for (int64_t i = 0; i < rows; i += V::kRows)
      pack(real_type<V>(), {reinterpret_cast<const char*>(block + i * pitch), pitch, 1}, smaller(V::kRows, rows - i));
  }
}

}  // namespace
