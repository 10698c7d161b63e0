// A function mapped over lists: its program, prepared once, and a call of it.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "compiled_map.hpp"
#include "plan.hpp"

namespace thal {

// A function, decoded and where possible compiled: what calls with other tensors have in common.
struct MapProgram {
  Program program;
  CompiledMap compiled;
  std::vector<uint8_t> shared;   // of each input
  std::vector<int32_t> kinds;    // of each input, thal_kind; for the operator alone
  std::vector<int32_t> targets;  // of each output, as thal_map_program has them; for the operator alone
  int32_t reduction = THAL_KEEP;
  // The memory of the last call of the operator in which nothing overlapped, so that lists that come again are not
  // searched again: sorting the addresses of 4000 tensors takes 0.2 ms.
  std::mutex mutex;
  std::vector<const void*> disjoint;
  std::vector<int64_t> disjoint_counts;
};

// What a reduction has come to, for integers and for all others.
union Partial {
  double real;
  int64_t whole;
};

// The program of a number that thal_map_program_new has given out; null for any other.
std::shared_ptr<MapProgram> find_map_program(int64_t id);

struct MapPlan {
  thal_map map;
  const Isa* isa;
  const Program* program;
  const uint8_t* shared;
  const CompiledMap* compiled;      // null: the machine runs
  int64_t inputs, outputs;
  int32_t reduction;
  std::vector<int64_t> first_task;  // of each position, and one past the last
  // After the program's memory: room for a row of each input and output, and for the rows that are reduced at a time.
  int64_t at_tail, at_rows, scratch_bytes;

  const void* input(int64_t i, int64_t position) const { return map.data[i * map.positions + position]; }
  void* output(int64_t i, int64_t position) const { return map.out[i * map.positions + position]; }
};

constexpr int64_t kReducedRows = 32;  // 4 KB of the widest type

// Whether reducing values of a type gives integers.
inline bool reduces_to_whole(int32_t reduction, Type t) { return reduction == THAL_ANY || !is_float(t); }
Partial nothing_reduced(int32_t reduction, Type t);
// `sum` and what follows it.
inline void join(int32_t reduction, bool whole, Partial& sum, Partial next) {
  if (whole) {
    if (reduction == THAL_SUM) sum.whole = static_cast<int64_t>(static_cast<uint64_t>(sum.whole) + static_cast<uint64_t>(next.whole));
    if (reduction == THAL_MAX) sum.whole = next.whole > sum.whole ? next.whole : sum.whole;
    if (reduction == THAL_ANY) sum.whole |= next.whole;
  } else {
    if (reduction == THAL_SUM) sum.real += next.real;
    if (reduction == THAL_MAX) sum.real = next.real > sum.real || next.real != next.real ? next.real : sum.real;
  }
}

// A plan for tensors that fit the program, which outlives it.
int lay_out_map(const thal_map& map, const MapProgram& program, MapPlan& plan);
int run_map_plan(const MapPlan& plan);

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
