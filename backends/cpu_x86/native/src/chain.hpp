// Products with packed weights that follow each other, prepared once.
#pragma once

#include <memory>
#include <vector>

#include "packed.hpp"

namespace thal {

struct ChainStep {
  thal_chain_step given;
  std::vector<int64_t> words;
  bool is_read = false;  // by a later step: its result is none of the chain's

  // Tensors that a call brings: the weight's parts, and the bias.
  int64_t parts() const { return weight_parts() + (given.bias_type >= 0); }
  int64_t weight_parts() const { return is_blocks(given.packed.scheme) ? 1 : given.packed.zero ? 3 : 2; }
};

struct Chain {
  int32_t a_type;
  std::vector<ChainStep> steps;
};

// What a step computes with in one call: memory that the caller has checked.
struct ChainCall {
  const void *a, *data, *bias;
  const float *scale, *zero;
  const void* factor;
  void* out;
  int64_t rows;
  int32_t threads;
};

std::shared_ptr<const Chain> find_chain(int64_t id);
int run_step(const Chain& chain, const ChainStep& step, const ChainCall& call);  // THAL_OK or an error

}  // namespace thal
