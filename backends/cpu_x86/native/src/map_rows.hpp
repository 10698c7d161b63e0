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

// The elements of one position from some place on: where inputs and outputs lie.
class MapPlace {
  const MapPlan& m_;
  int64_t position_;
  char* scratch_;

 public:
  MapRows& rows;

  MapPlace(const MapPlan& m, int64_t position, char* scratch, MapRows& r) : m_(m), position_(position), scratch_(scratch), rows(r) {}

  void read_from(int64_t at) {
    for (int64_t i = 0; i < m_.inputs; ++i)
      rows.in[i] = static_cast<const char*>(m_.input(i, position_)) + (m_.shared[i] ? 0 : at * size_of_input(i));
  }
  void write_to(int64_t at) {
    for (int64_t i = 0; i < m_.outputs; ++i) output(i) = static_cast<char*>(m_.output(i, position_)) + at * size_of_output(i);
  }
  // Reads the last elements from a row padded with copies of the first of them: what they become is thrown away.
  void read_padded(int64_t at, int64_t rest) {
    read_from(at);
    char* tail = scratch_ + m_.at_tail;
    for (int64_t i = 0; i < m_.inputs; ++i, tail += kLanes * 8) {
      if (m_.shared[i]) continue;
      const int64_t size = size_of_input(i);
      for (int64_t k = 0; k < kLanes; ++k)
        std::memcpy(tail + k * size, static_cast<const char*>(rows.in[i]) + (k < rest ? k : 0) * size, static_cast<size_t>(size));
      rows.in[i] = tail;
    }
  }
  void write_to_tail() {
    for (int64_t i = 0; i < m_.outputs; ++i) output(i) = scratch_ + m_.at_tail + (m_.inputs + i) * kLanes * 8;
  }
  void write_to_rows() {
    for (int64_t i = 0; i < m_.outputs; ++i) output(i) = scratch_ + m_.at_rows + i * thal::kReducedRows * kLanes * 8;
  }
  char*& output(int64_t i) { return rows.out[static_cast<size_t>(i)]; }
  int64_t size_of_output(int64_t i) const { return thal::storage_of(m_.program->results[static_cast<size_t>(i)].type); }
  void compute(int64_t count) { map_rows(m_, rows, count, scratch_); }

 private:
  int64_t size_of_input(int64_t i) const { return thal::storage_of(m_.program->inputs[static_cast<size_t>(i)]); }
};

// Elements [first, first + count) of one position.
inline void run_map(const MapPlan& m, int64_t position, int64_t first, int64_t count, char* scratch) {
  thread_local std::vector<char*> out;
  out.resize(static_cast<size_t>(m.outputs));
  MapRows rows{m, {}, out};
  MapPlace place(m, position, scratch, rows);
  const int64_t whole = count / kLanes, most = m.compiled ? whole : thal::kRowsMost;
  for (int64_t row = 0; row < whole; row += most) {
    place.read_from(first + row * kLanes), place.write_to(first + row * kLanes);
    place.compute(whole - row < most ? whole - row : most);
  }
  const int64_t rest = count - whole * kLanes;
  if (rest == 0) return;
  place.read_padded(first + whole * kLanes, rest), place.write_to_tail();
  place.compute(1);
  for (int64_t i = 0; i < m.outputs; ++i)
    std::memcpy(static_cast<char*>(m.output(i, position)) + (first + whole * kLanes) * place.size_of_output(i), place.output(i),
                static_cast<size_t>(rest * place.size_of_output(i)));
}

// A lane of sums for each element of a row.
template <class T>
struct LaneSums {
  T lanes[kLanes];

  template <class Element>
  void add(int32_t reduction, Element element, int64_t rows) {
    const auto each = [&](auto f) {
      for (int64_t j = 0; j < rows; ++j) {
        THAL_VECTOR_LOOP
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] = f(lanes[i], element(j * kLanes + i));
      }
    };
    step(reduction, each);
  }
  template <class Element>
  void add_some(int32_t reduction, Element element, int64_t count) {
    step(reduction, [&](auto f) {
      for (int64_t i = 0; i < count; ++i) lanes[i] = f(lanes[i], element(i));
    });
  }

 private:
  template <class Each>
  static void step(int32_t reduction, Each each) {
    if (reduction == THAL_ANY) return each([](T sum, auto x) { return x != decltype(x)(0) ? T(1) : sum; });
    if (reduction == THAL_MAX)
      return each([](T sum, auto x) {
        const T y = static_cast<T>(x);
        return y > sum || y != y ? y : sum;
      });
    each([](T sum, auto x) {
      if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(static_cast<uint64_t>(sum) + static_cast<uint64_t>(static_cast<T>(x)));
      } else {
        return sum + static_cast<T>(x);
      }
    });
  }
};

// What the elements [first, first + count) of one position come to, for each output.
inline void reduce_map(const MapPlan& m, int64_t position, int64_t first, int64_t count, char* scratch, thal::Partial* partials) {
  thread_local std::vector<char*> out;
  thread_local std::vector<LaneSums<double>> real;
  thread_local std::vector<LaneSums<int64_t>> whole_numbers;
  const auto outputs = static_cast<size_t>(m.outputs);
  out.resize(outputs), real.resize(outputs), whole_numbers.resize(outputs);
  const auto type = [&m](size_t i) { return m.program->results[i].type; };
  for (size_t i = 0; i < outputs; ++i) {
    const thal::Partial none = thal::nothing_reduced(m.reduction, type(i));
    fill(real[i].lanes, kLanes, none.real), fill(whole_numbers[i].lanes, kLanes, none.whole);
  }
  // f(sums, element) with the sums of each output, and a function that reads what has been computed.
  const auto each = [&](auto f) {
    for (size_t i = 0; i < outputs; ++i)
      Step::by_type(type(i), out[i], [&](auto element) {
        if constexpr (std::is_floating_point_v<decltype(element(0))>) {
          if (m.reduction != THAL_ANY) return f(real[i], element);
        }
        f(whole_numbers[i], element);
      });
  };
  MapRows rows{m, {}, out};
  MapPlace place(m, position, scratch, rows);
  const int64_t whole = count / kLanes;
  for (int64_t row = 0; row < whole; row += thal::kReducedRows) {
    const int64_t some = whole - row < thal::kReducedRows ? whole - row : thal::kReducedRows;
    place.read_from(first + row * kLanes), place.write_to_rows();
    place.compute(some);
    each([&](auto& sums, auto element) { sums.add(m.reduction, element, some); });
  }
  const int64_t rest = count - whole * kLanes;
  if (rest) {
    place.read_padded(first + whole * kLanes, rest), place.write_to_tail();
    place.compute(1);
    each([&](auto& sums, auto element) { sums.add_some(m.reduction, element, rest); });
  }
  for (size_t i = 0; i < outputs; ++i) {
    const bool is_whole = thal::reduces_to_whole(m.reduction, type(i));
    thal::Partial& sum = partials[i] = thal::nothing_reduced(m.reduction, type(i));
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      thal::Partial next;
      if (is_whole) {
        next.whole = whole_numbers[i].lanes[lane];
      } else {
        next.real = real[i].lanes[lane];
      }
      thal::join(m.reduction, is_whole, sum, next);
    }
  }
}

}  // namespace
