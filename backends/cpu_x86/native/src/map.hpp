// A function mapped over lists, decoded and checked.
#pragma once

#include "plan.hpp"

namespace thal {

struct MapPlan {
  thal_map map;
  const Isa* isa;
  Program program;
  std::vector<int64_t> first_task;  // of each position, and one past the last
  int64_t at_tail, scratch_bytes;   // after the program's memory: room for a row of each input and output

  const void* input(int64_t i, int64_t position) const { return map.data[i * map.positions + position]; }
  void* output(int64_t i, int64_t position) const { return map.out[i * map.positions + position]; }
};

// Bytes of an element in a tensor.
inline int64_t storage_of(Type t) {
  switch (t) {
    case Type::kF64:
    case Type::kI64:
      return 8;
    case Type::kF32:
    case Type::kI32:
      return 4;
    case Type::kBF16:
    case Type::kF16:
    case Type::kI16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace thal
