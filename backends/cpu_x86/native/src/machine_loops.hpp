// The loops of the vector machine: plain ones over rows of kLanes elements, of which compilers make vector code.
#pragma once

#include "elementary.hpp"
#include "program.hpp"

namespace {

using thal::Frame;
using thal::Instruction;
using thal::kChunk;
using thal::kLanes;
using thal::Op;
using thal::Program;
using thal::Span;
using thal::Type;

#if defined(_MSC_VER) && !defined(__clang__)
#define THAL_RESTRICT __restrict
#define THAL_VECTOR_LOOP __pragma(loop(ivdep))
#elif defined(__clang__)
#define THAL_RESTRICT __restrict__
#define THAL_VECTOR_LOOP _Pragma("clang loop vectorize(enable)")
#else
#define THAL_RESTRICT __restrict__
#define THAL_VECTOR_LOOP _Pragma("GCC ivdep")
#endif

// std::fill would be shared between files of different instruction sets.
template <class T>
inline void fill(T* out, int64_t n, T x) {
  for (int64_t i = 0; i < n; ++i) out[i] = x;
}

inline bool varies_by_row(Span span) { return span == Span::kRows || span == Span::kBlock; }

// One instruction of one phase, with what its operands are in memory.
class Loops {
 public:
  Loops(const Instruction& in, const Frame& frame, int64_t rows, int64_t first)
      : in_(in), frame_(frame), rows_(rows), first_(first), memory_(frame.memory) {}

 protected:
  const Instruction& in_;
  const Frame& frame_;
  int64_t rows_;   // vectors of kLanes elements
  int64_t first_;  // row of the block at which the chunk begins
  char* memory_;

  // f with a value of the type that elements of `t` are kept as.
  template <class F>
  static void by_width(Type t, F f) {
    if (t == Type::kF64) return f(double());
    if (t == Type::kI64) return f(int64_t());
    if (thal::is_float(t)) return f(float());
    f(int32_t());
  }

  template <class T>
  T* result() {
    return reinterpret_cast<T*>(memory_ + in_.result);
  }
  template <class T>
  const T* operand(int i) const {
    return reinterpret_cast<const T*>(memory_ + in_.operand[i]);
  }
  int64_t step(int i) const { return varies_by_row(in_.operand_span[i]) ? kLanes : 0; }

  template <class R, class A, class F>
  void map(F f) {
    R* THAL_RESTRICT out = result<R>();
    const A* THAL_RESTRICT a = operand<A>(0);
    const int64_t sa = step(0);
    for (int64_t j = 0; j < rows_; ++j, out += kLanes, a += sa) {
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<R>(f(a[i]));
    }
  }

  template <class R, class A, class F>
  void map_two(F f) {
    R* THAL_RESTRICT out = result<R>();
    const A* THAL_RESTRICT a = operand<A>(0);
    const A* THAL_RESTRICT b = operand<A>(1);
    const int64_t sa = step(0), sb = step(1);
    for (int64_t j = 0; j < rows_; ++j, out += kLanes, a += sa, b += sb) {
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<R>(f(a[i], b[i]));
    }
  }

  template <class T>
  void where(T) {
    T* THAL_RESTRICT out = result<T>();
    const int32_t* THAL_RESTRICT c = operand<int32_t>(0);
    const T* THAL_RESTRICT a = operand<T>(1);
    const T* THAL_RESTRICT b = operand<T>(2);
    const int64_t sc = step(0), sa = step(1), sb = step(2);
    for (int64_t j = 0; j < rows_; ++j, out += kLanes, c += sc, a += sa, b += sb) {
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < kLanes; ++i) out[i] = c[i] ? a[i] : b[i];
    }
  }

  template <class T>
  void spread(T) {
    T* THAL_RESTRICT out = result<T>();
    const T* THAL_RESTRICT a = operand<T>(0) + first_;
    for (int64_t j = 0; j < rows_; ++j, out += kLanes) {
      const T x = a[j];
      THAL_VECTOR_LOOP
      for (int64_t i = 0; i < kLanes; ++i) out[i] = x;
    }
  }

  template <class T, class F>
  void in_place(F f) {
    T* THAL_RESTRICT out = result<T>();
    THAL_VECTOR_LOOP
    for (int64_t i = 0; i < rows_ * kLanes; ++i) out[i] = f(out[i]);
  }
};

}  // namespace
