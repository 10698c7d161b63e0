// Captured functions inside the attention kernels: where their indices come from, and what hides a key.
#pragma once

#include "blocks.hpp"
#include "mask.hpp"

namespace {

// The indices of one block of scores, rows of kLanes elements, as the machine reads them.
struct Indices {
  const int32_t* b;
  const int32_t* heads;
  const int32_t* positions;
  const int32_t* keys;
};

inline thal::Frame frame_of(const thal_function& f, const Indices& at, int64_t rows, int64_t shift, char* memory) {
  thal::Frame frame{};
  frame.rows = rows, frame.factor = 1.0f, frame.captured = f.captured, frame.memory = memory;
  frame.in[shift] = {at.b, 0};
  frame.in[shift + 1] = {at.heads, 0};
  frame.in[shift + 2] = {at.positions, 0};
  frame.in[shift + 3] = {at.keys, thal::kLanes};
  return frame;
}

// Replaces `rows` rows of scores, `stride` apart; what the function sees is the dot product times the scale.
template <class T>
inline void modify_scores(const Plan& p, const Indices& at, int64_t rows, T* scores, int64_t stride, char* memory) {
  thal::Frame frame = frame_of(*p.call.score_mod, at, rows, 1, memory);
  frame.in[0] = {scores, stride};
  frame.factor = p.scale;
  frame.out = scores, frame.out_stride = stride;
  p.isa->run_program(p.score_mod, frame);
}

// Non-zero where the mask_mod lets a row see a key.
inline void ask_mask(const Plan& p, const Indices& at, int64_t rows, int32_t* visible, int64_t stride, char* memory) {
  thal::Frame frame = frame_of(*p.call.mask_mod, at, rows, 0, memory);
  frame.out = visible, frame.out_stride = stride;
  p.isa->run_program(p.mask_mod, frame);
}

}  // namespace
