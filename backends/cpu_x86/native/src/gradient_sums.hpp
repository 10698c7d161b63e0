// Gradients of tensors that a score_mod captures: sums over all pairs, kept in double precision, since a scalar gets an
// addend for each pair.
#pragma once

#include "gradient.hpp"
#include "machine.hpp"

namespace {

// One run of the gradient's program: its results are taken chunk by chunk.
template <class Weight>
struct CapturedSums {
  const thal::GradientPlan& g;
  double* sums;
  const Weight* weights;  // of the pairs; a pair of weight 0 adds nothing, whatever the program makes of it
  int64_t stride;        // from key to key
  int64_t lanes;         // that are query rows

  static void take(void* context, const thal::Frame& frame, int64_t first, int64_t rows) {
    const auto& self = *static_cast<CapturedSums*>(context);
    for (int32_t i = 0; i < self.g.g.contribution_count; ++i) self.add(self.g.g.contributions[i], frame, first, rows);
  }

 private:
  void add(const thal_contribution& c, const thal::Frame& frame, int64_t first, int64_t rows) const {
    const thal::Result& value = g.score_gradient.results[c.value];
    const thal_captured& captured = frame.captured[c.captured];
    if (thal::is_empty(captured)) return;
    if (value.type == Type::kF64) {
      add_values(c, frame, first, rows, Column<double>(frame, value));
    } else {
      add_values(c, frame, first, rows, Column<float>(frame, value));
    }
  }

  // A result's element at row j of the chunk and lane i.
  template <class T>
  struct Column {
    const T* data;
    Span span;
    Column(const thal::Frame& frame, const thal::Result& r)
        : data(reinterpret_cast<const T*>(frame.memory + r.at)), span(r.span) {}
    T at(int64_t first, int64_t j, int64_t i) const {
      return span == Span::kRows ? data[first + j] : data[(span == Span::kBlock ? j * kLanes : 0) + i];
    }
  };

  template <class T>
  void add_values(const thal_contribution& c, const thal::Frame& frame, int64_t first, int64_t rows,
                  Column<T> value) const {
    for (int64_t j = 0; j < rows; ++j) {
      int64_t at[kLanes] = {};
      bool one_place = place(c, frame, first, j, at);
      const Weight* w = weights + (first + j) * stride;
      double total = 0.0;
      for (int64_t i = 0; i < lanes; ++i) {
        if (w[i] == Weight(0)) continue;
        const auto x = static_cast<double>(value.at(first, j, i));
        if (one_place) {
          total += x;
        } else {
          sums[c.offset + at[i]] += x;
        }
      }
      if (one_place) sums[c.offset + at[0]] += total;
    }
  }

  // Where each lane's addend goes; returns whether that is one place. Sums lie contiguously.
  bool place(const thal_contribution& c, const thal::Frame& frame, int64_t first, int64_t j, int64_t* at) const {
    const thal_captured& captured = frame.captured[c.captured];
    int64_t step = 1;
    bool one_place = true;
    for (int32_t d = captured.dims - 1; d >= 0; step *= captured.sizes[d], --d) {
      const thal::Result& index = g.score_gradient.results[c.index + d];
      if (index.type == Type::kI64) {
        add_index(Column<int64_t>(frame, index), first, j, captured.sizes[d], step, at);
      } else {
        add_index(Column<int32_t>(frame, index), first, j, captured.sizes[d], step, at);
      }
      one_place = one_place && (index.span == Span::kOne || index.span == Span::kRows);
    }
    return one_place;
  }

  template <class T>
  void add_index(Column<T> index, int64_t first, int64_t j, int64_t size, int64_t step, int64_t* at) const {
    for (int64_t i = 0; i < lanes; ++i) {
      int64_t x = index.at(first, j, i);
      x += x < 0 ? size : 0;
      x = x < 0 ? 0 : x < size ? x : size - 1;
      at[i] += x * step;
    }
  }
};

}  // namespace
