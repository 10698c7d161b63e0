// Running a program over the flat elements of tensors, and storing its results as they are stored in tensors.
#pragma once

#include "machine.hpp"
#include "map.hpp"

namespace {

using thal::MapPlan;

// Where the rows at hand are: whole rows in the tensors, or one padded row in scratch.
struct MapRows {
  const MapPlan& m;
  const void* in[thal::kInputsMost];
  std::vector<char*>& out;

  static void take(void* context, const Frame& frame, int64_t first, int64_t rows) {
    const auto& self = *static_cast<MapRows*>(context);
    for (size_t i = 0; i < self.out.size(); ++i) self.store(self.m.program->results[i], self.out[i], frame, first, rows);
  }

 private:
  void store(const thal::Result& result, char* out, const Frame& frame, int64_t first, int64_t rows) const {
    const char* from = frame.memory + result.at;
    char* to = out + first * kLanes * thal::storage_of(result.type);
    switch (result.type) {
      case Type::kF64:
      case Type::kI64:
        return each_row<int64_t>(result, from, first, rows, to, [](int64_t x) { return x; });
      case Type::kF32:
      case Type::kI32:
        return each_row<int32_t>(result, from, first, rows, to, [](int32_t x) { return x; });
      case Type::kBF16:
        return each_row<uint32_t>(result, from, first, rows, to, [](uint32_t x) { return static_cast<uint16_t>(x >> 16); });
      case Type::kF16:
        return each_row<float>(result, from, first, rows, to, [](float x) { return half_of(x); });
      case Type::kI16:
        return each_row<int32_t>(result, from, first, rows, to, [](int32_t x) { return static_cast<int16_t>(x); });
      default:
        return each_row<int32_t>(result, from, first, rows, to, [](int32_t x) { return static_cast<int8_t>(x); });
    }
  }

  // A value that is kept as a float32 and is a float16: the rounding is exact.
  static uint16_t half_of(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }

  template <class T, class F>
  static void each_row(const thal::Result& result, const char* from, int64_t first, int64_t rows, char* to, F f) {
    using Out = decltype(f(T()));
    const T* THAL_RESTRICT in = reinterpret_cast<const T*>(from);
    Out* THAL_RESTRICT out = reinterpret_cast<Out*>(to);
    if (result.span == Span::kBlock) {
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < rows * kLanes; ++i) out[i] = f(in[i]);
      return;
    }
    in += result.span == Span::kRows ? first : 0;
    for (int64_t j = 0; j < rows; ++j)
      for (int64_t i = 0; i < kLanes; ++i) out[j * kLanes + i] = f(in[result.span == Span::kRows ? j : i]);
  }
};

inline void map_rows(const MapPlan& m, MapRows& rows, int64_t count, char* memory) {
  Frame frame;
  frame.rows = count, frame.factor = 1.0f, frame.captured = m.map.captured, frame.memory = memory;
  for (int64_t i = 0; i < m.inputs; ++i) frame.in[i] = {rows.in[i], kLanes};
  frame.sink = MapRows::take, frame.sink_context = &rows;
  frame.out = nullptr;
  if (!m.compiled) return run_program(*m.program, frame);
  run_phase(*m.program, m.program->once, frame, 1, 0);
  m.compiled->run(rows.in, rows.out.data(), memory, count);
}

// Elements [first, first + count) of one position.
inline void run_map(const MapPlan& m, int64_t position, int64_t first, int64_t count, char* scratch) {
  thread_local std::vector<char*> out;
  out.resize(static_cast<size_t>(m.outputs));
  MapRows rows{m, {}, out};
  const auto point = [&](int64_t at) {
    for (int64_t i = 0; i < m.inputs; ++i)
      rows.in[i] = static_cast<const char*>(m.input(i, position)) +
                   (m.shared[i] ? 0 : at * thal::storage_of(m.program->inputs[static_cast<size_t>(i)]));
    for (int64_t i = 0; i < m.outputs; ++i)
      out[static_cast<size_t>(i)] = static_cast<char*>(m.output(i, position)) +
                                    at * thal::storage_of(m.program->results[static_cast<size_t>(i)].type);
  };
  const int64_t whole = count / kLanes, most = m.compiled ? whole : thal::kRowsMost;
  for (int64_t row = 0; row < whole; row += most) {
    point(first + row * kLanes);
    map_rows(m, rows, whole - row < most ? whole - row : most, scratch);
  }
  const int64_t rest = count - whole * kLanes;
  if (rest == 0) return;
  point(first + whole * kLanes);
  // The last elements, padded with copies of the first of them: what they are computed to is thrown away.
  char* tail = scratch + m.at_tail;
  const auto take = [&tail] {
    char* here = tail;
    tail += kLanes * 8;
    return here;
  };
  for (int64_t i = 0; i < m.inputs; ++i) {
    if (m.shared[i]) continue;
    const int64_t size = thal::storage_of(m.program->inputs[static_cast<size_t>(i)]);
    char* here = take();
    for (int64_t k = 0; k < kLanes; ++k)
      std::memcpy(here + k * size, static_cast<const char*>(rows.in[i]) + (k < rest ? k : 0) * size, static_cast<size_t>(size));
    rows.in[i] = here;
  }
  for (int64_t i = 0; i < m.outputs; ++i) out[static_cast<size_t>(i)] = take();
  map_rows(m, rows, 1, scratch);
  for (int64_t i = 0; i < m.outputs; ++i) {
    const int64_t size = thal::storage_of(m.program->results[static_cast<size_t>(i)].type);
    std::memcpy(static_cast<char*>(m.output(i, position)) + (first + whole * kLanes) * size, out[static_cast<size_t>(i)],
                static_cast<size_t>(rest * size));
  }
}

}  // namespace
