// Products with packed weights that follow each other, as their text says them.
#pragma once

#include <cstddef>
#include <vector>

#include "packed.hpp"

namespace thal {

// One product: of what the chain is given, or of the result of a step before it.
struct ChainStep {
  thal_packed weight;        // its pointers come with each call
  bool has_zero;
  int64_t source;            // the step whose result is multiplied; -1: what the chain is given
  int64_t factor;            // the step whose result, (M, N), is all that the epilogue captures; -1: none
  int64_t captured;          // tensors that the epilogue captures and a call brings
  int32_t b_type, bias_type; // THAL_F32 ... THAL_F16; bias_type -1: no bias
  int32_t out_type;
  std::vector<int64_t> words;  // of the epilogue; empty: none
  bool is_read = false;        // by a later step: its result is none of the chain's

  int64_t weight_parts() const { return is_blocks(weight.scheme) ? 1 : has_zero ? 3 : 2; }
  // Tensors that a call brings: the weight's, the bias, and what the epilogue captures.
  int64_t parts() const { return weight_parts() + (bias_type >= 0) + captured; }
};

struct Chain {
  bool required;  // that a call be served: whoever made it has no other way
  int32_t a_type;
  std::vector<ChainStep> steps;
};

// What a step computes with in one call: memory that the caller has checked.
struct ChainCall {
  const void *a, *data, *bias;
  const float *scale, *zero;
  const thal_captured* captured;
  int64_t captured_count;
  void* out;
  int64_t rows;
  int32_t threads;
};

// Whole numbers: whether a call has to be served, the type of a, how many steps; then of each scheme, rows, columns, group,
// whether there is a zero, source, factor, captured, the types of b, bias and result, how many words the epilogue has, and
// they. False where they say nothing that can be run.
bool read_chain(const std::vector<int64_t>& numbers, Chain& chain);
int32_t result_type(int32_t type);  // of THAL_F32 ... THAL_F16, its place in torchhal.pointwise.dtypes.DTYPES
int run_step(const Chain& chain, const ChainStep& step, const ChainCall& call);  // THAL_OK or an error

}  // namespace thal
