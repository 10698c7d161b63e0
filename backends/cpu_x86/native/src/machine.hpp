// The vector machine: runs a decoded program over a block of rows of kLanes elements, value by value, in memory that
// fits in the L1 cache. Included once per instruction set.
#pragma once

#include "machine_arithmetic.hpp"

namespace {

class Step : Arithmetic {
 public:
  using Arithmetic::Arithmetic;

  void run(const Program& program) {
    switch (in_.op) {
      case Op::k_input:
        load_input(program);
        break;
      case Op::k_constant:
        constant();
        break;
      case Op::k_gather:
        gather(program);
        break;
      case Op::k_cast:
        by_width(in_.from, [&](auto from) { cast(from); });
        break;
      case Op::k_where:
        by_width(in_.type, [&](auto t) { where(t); });
        break;
      case Op::k_spread:
        by_width(in_.type, [&](auto t) { spread(t); });
        break;
      default:
        compute();
    }
    settle();
  }

 private:
  void constant() {
    by_width(in_.type, [&](auto t) {
      using T = decltype(t);
      T x;
      if constexpr (std::is_floating_point_v<T>) {
        x = static_cast<T>(bits_as<double>(in_.attribute));
      } else {
        x = static_cast<T>(in_.attribute);
      }
      fill(result<T>(), kLanes, x);
    });
  }

  // f with a function that reads element `i` of memory that holds elements of `t`, as they are kept here.
  template <class F>
  static void by_type(Type t, const void* data, F f) {
    const auto plain = [&](auto kind) {
      using T = decltype(kind);
      f([p = static_cast<const T*>(data)](int64_t i) { return p[i]; });
    };
    const auto as_int = [&](auto kind) {
      using T = decltype(kind);
      f([p = static_cast<const T*>(data)](int64_t i) { return static_cast<int32_t>(p[i]); });
    };
    const auto* half = static_cast<const uint16_t*>(data);
    switch (t) {
      case Type::kF64:
        return plain(double());
      case Type::kF32:
        return plain(float());
      case Type::kBF16:
        return f([half](int64_t i) { return widened_bf16(half[i]); });
      case Type::kF16:
        return f([half](int64_t i) { return widened_f16(half[i]); });
      case Type::kI64:
        return plain(int64_t());
      case Type::kI32:
        return plain(int32_t());
      case Type::kI16:
        return as_int(int16_t());
      case Type::kI8:
        return as_int(int8_t());
      default:
        return as_int(uint8_t());
    }
  }

  void load_input(const Program&) {
    const Frame::In& in = frame_.in[in_.attribute];
    by_type(in_.type, in.data, [&](auto element) {
      using T = decltype(element(0));
      T* THAL_RESTRICT out = result<T>();
      if (in_.span == Span::kOne) {
        fill(out, kLanes, element(0));
      } else if (in_.span == Span::kRows) {
        for (int64_t i = 0; i < frame_.rows; ++i) out[i] = element(i);
        fill(out + frame_.rows, rows_ * kLanes - frame_.rows, T(0));
      } else {
        if constexpr (std::is_floating_point_v<T>) {
          if (in_.attribute == 0) return load_rows(out, in.stride, [&](int64_t i) { return element(i) * static_cast<T>(frame_.factor); });
        }
        load_rows(out, in.stride, element);
      }
    });
  }

  template <class T, class Element>
  void load_rows(T* THAL_RESTRICT out, int64_t stride, Element element) const {
    for (int64_t j = 0; j < rows_; ++j, out += kLanes) {
      const int64_t base = (first_ + j) * stride;
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < kLanes; ++i) out[i] = element(base + i);
    }
  }

  void gather(const Program& program) {
    const thal_captured& source = frame_.captured[in_.attribute];
    by_type(in_.type, source.data, [&](auto element) {
      using T = decltype(element(0));
      T* THAL_RESTRICT out = result<T>();
      if (thal::is_empty(source)) {  // there is nothing that could be read
        fill(out, rows_ * kLanes, T(0));
        return;
      }
      // The lanes' places in a row are mostly the same in every row, and side by side: a gather is a load then.
      alignas(64) int64_t fixed[kLanes] = {};
      bool moves = false;
      each_index(program, source, [&](const thal::Index& index, int64_t size, int64_t stride) {
        moves |= !is_offset(index) && varies_by_row(index.span);
        if (!varies_by_row(index.span)) add_index(index, 0, size, stride, fixed);
      });
      bool adjacent = !moves;
      for (int64_t i = 1; i < kLanes; ++i) adjacent &= fixed[i] == fixed[0] + i;
      for (int64_t j = 0; j < rows_; ++j, out += kLanes) {
        int64_t offset = 0;
        alignas(64) int64_t at[kLanes] = {};
        each_index(program, source, [&](const thal::Index& index, int64_t size, int64_t stride) {
          if (is_offset(index)) offset += row_offset(index, j, size, stride);
          else if (varies_by_row(index.span)) add_index(index, j, size, stride, at);
        });
        if (adjacent) {
          offset += fixed[0];
          THAL_VECTOR_LOOP
          for (int64_t i = 0; i < kLanes; ++i) out[i] = element(offset + i);
        } else {
          THAL_VECTOR_LOOP
          for (int64_t i = 0; i < kLanes; ++i) out[i] = element(offset + fixed[i] + at[i]);
        }
      }
    });
  }

  template <class F>
  void each_index(const Program& program, const thal_captured& source, F f) const {
    for (int32_t d = 0; d < in_.indices; ++d) f(program.indices[in_.index + d], source.sizes[d], source.strides[d]);
  }

  // Whether an index is one number for each row of a block.
  bool is_offset(const thal::Index& index) const { return in_.span == Span::kBlock && index.span == Span::kRows; }

  // Negative indices count from the end, and what is out of range, which a mask discards, is brought into it.
  static int64_t place(int64_t x, int64_t size, int64_t stride) {
    x += x < 0 ? size : 0;
    x = x < 0 ? 0 : x;
    return (x < size ? x : size - 1) * stride;
  }

  int64_t row_offset(const thal::Index& index, int64_t row, int64_t size, int64_t stride) const {
    const char* p = memory_ + index.at;
    const int64_t at = first_ + row;
    const bool wide = index.type == Type::kI64;
    return place(wide ? reinterpret_cast<const int64_t*>(p)[at] : reinterpret_cast<const int32_t*>(p)[at], size, stride);
  }

  void add_index(const thal::Index& index, int64_t row, int64_t size, int64_t stride, int64_t* THAL_RESTRICT at) const {
    by_width(index.type, [&](auto kind) {
      using T = decltype(kind);
      if constexpr (std::is_integral_v<T>) {
        const T* THAL_RESTRICT p = reinterpret_cast<const T*>(memory_ + index.at);
        p += varies_by_row(index.span) ? row * kLanes : 0;
        THAL_VECTOR_LOOP
        for (int64_t i = 0; i < kLanes; ++i) at[i] += place(p[i], size, stride);
      }
    });
  }
};

inline void run_phase(const Program& program, const std::vector<Instruction>& phase, const Frame& f, int64_t rows,
                      int64_t first) {
  for (const Instruction& in : phase) Step(in, f, rows, first).run(program);
}

// The first result as rows of kLanes elements.
template <class T>
void store_result(const thal::Result& result, const Frame& f, int64_t rows, int64_t first) {
  const T* in = reinterpret_cast<const T*>(f.memory + result.at);
  T* out = static_cast<T*>(f.out) + first * f.out_stride;
  for (int64_t j = 0; j < rows; ++j, out += f.out_stride) {
    if (result.span == Span::kRows) {
      fill(out, kLanes, in[first + j]);
    } else {
      std::memcpy(out, in + (result.span == Span::kBlock ? j * kLanes : 0), sizeof(T) * kLanes);
    }
  }
}

inline void run_program(const Program& program, const Frame& f) {
  run_phase(program, program.once, f, 1, 0);
  run_phase(program, program.rows, f, (f.rows + kLanes - 1) / kLanes, 0);
  const thal::Result& result = program.results[0];
  for (int64_t first = 0; first < f.rows; first += kChunk) {
    const int64_t rows = kChunk < f.rows - first ? kChunk : f.rows - first;
    run_phase(program, program.block, f, rows, first);
    if (!f.out) {
      // all results go to the sink
    } else if (thal::width_of(result.type) == 8) {
      store_result<int64_t>(result, f, rows, first);
    } else {
      store_result<int32_t>(result, f, rows, first);
    }
    if (f.sink) f.sink(f.sink_context, f, first, rows);
  }
}

}  // namespace
