// Results of a program, rows of up to kLanes columns, stored as they are in the rows of tensors.
#pragma once

#include "machine.hpp"
#include "map.hpp"

namespace {

struct ResultRows {
  const Program& program;
  void* const* out;  // of each result
  int64_t first;     // element of the first row's beginning
  int64_t stride;    // elements from row to row
  int64_t columns;   // at most kLanes

  // A Frame's sink.
  static void take(void* context, const Frame& frame, int64_t first, int64_t rows) {
    const auto& self = *static_cast<ResultRows*>(context);
    for (size_t i = 0; i < self.program.results.size(); ++i)
      self.store(self.program.results[i], static_cast<char*>(self.out[i]), frame, first, rows);
  }

 private:
  void store(const thal::Result& result, char* out, const Frame& frame, int64_t row, int64_t rows) const {
    const char* from = frame.memory + result.at;
    char* to = out + (first + row * stride) * thal::storage_of(result.type);
    switch (result.type) {
      case Type::kF64:
      case Type::kI64:
        return each_row<int64_t>(result, from, row, rows, to, [](int64_t x) { return x; });
      case Type::kF32:
      case Type::kI32:
        return each_row<int32_t>(result, from, row, rows, to, [](int32_t x) { return x; });
      case Type::kBF16:
        return each_row<uint32_t>(result, from, row, rows, to, [](uint32_t x) { return static_cast<uint16_t>(x >> 16); });
      case Type::kF16:
        return each_row<float>(result, from, row, rows, to, [](float x) {
          return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));  // exact: it is a float16 already
        });
      case Type::kI16:
        return each_row<int32_t>(result, from, row, rows, to, [](int32_t x) { return static_cast<int16_t>(x); });
      default:
        return each_row<int32_t>(result, from, row, rows, to, [](int32_t x) { return static_cast<int8_t>(x); });
    }
  }

  template <class T, class F>
  void each_row(const thal::Result& result, const char* from, int64_t row, int64_t rows, char* to, F f) const {
    using Out = decltype(f(T()));
    const T* THAL_RESTRICT in = reinterpret_cast<const T*>(from) + (result.span == Span::kRows ? row : 0);
    Out* THAL_RESTRICT out = reinterpret_cast<Out*>(to);
    const int64_t step = result.span == Span::kRows ? 1 : result.span == Span::kBlock ? kLanes : 0;
    for (int64_t j = 0; j < rows; ++j, in += step, out += stride) {
      if (result.span == Span::kRows) {
        fill(out, columns, f(*in));
      } else if (columns == kLanes) {
        THAL_VECTOR_LOOP
        for (int64_t i = 0; i < kLanes; ++i) out[i] = f(in[i]);
      } else {
        for (int64_t i = 0; i < columns; ++i) out[i] = f(in[i]);
      }
    }
  }
};

}  // namespace
