// A captured pointwise function as a program for the vector machine: decoded from words, checked, and laid out in
// memory. Nothing here depends on an instruction set; machine.hpp runs it.
//
// The words, all int64, are a torchhal.pointwise.Graph as it stands (programs.py writes them):
//
//   version, inputs, (type)*, captured, (type, dimensions)*, nodes, (op, type, attribute, operands, (node)*)*,
//   outputs, (node)*
//
// A constant's attribute is its value: the bits of a double for floating types, else the integer.
#pragma once

#include <cstdint>
#include <vector>

#include "torchhal_cpu_x86.h"

namespace thal {

// The same order as torchhal.pointwise.dtypes.DTYPES; programs.py tests that.
enum class Type : int8_t { kF64, kF32, kBF16, kF16, kI64, kI32, kI16, kI8, kU8, kBool, kTypes };

// X(name as in torchhal.pointwise.primitives, operands, rule). Gather takes an index for each dimension.
#define THAL_PRIMITIVES(X)                                                                                            \
  X(input, 0, kLeaf) X(constant, 0, kLeaf) X(gather, -1, kLeaf) X(cast, 1, kLeaf) X(where, 3, kSelected)              \
  X(detach, 1, kAlike) X(neg, 1, kNumbers) X(abs, 1, kNumbers) X(sign, 1, kNumbers) X(relu, 1, kNumbers)              \
  X(min, 2, kNumbers) X(max, 2, kNumbers) X(div, 2, kFloats) X(atan2, 2, kFloats) X(truncdiv, 2, kIntegers)           \
  X(bitwise_not, 1, kIntegers) X(logical_not, 1, kBools) X(add, 2, kNumbers) X(sub, 2, kNumbers) X(mul, 2, kNumbers)  \
  X(floordiv, 2, kNumbers) X(remainder, 2, kNumbers) X(fmod, 2, kNumbers) X(pow, 2, kNumbers)                         \
  X(clamp_min, 2, kNumbers) X(clamp_max, 2, kNumbers) X(exp, 1, kFloats) X(exp2, 1, kFloats) X(expm1, 1, kFloats)     \
  X(log, 1, kFloats) X(log2, 1, kFloats) X(log10, 1, kFloats) X(log1p, 1, kFloats) X(sqrt, 1, kFloats)                \
  X(rsqrt, 1, kFloats) X(reciprocal, 1, kFloats) X(sin, 1, kFloats) X(cos, 1, kFloats) X(tan, 1, kFloats)             \
  X(asin, 1, kFloats) X(acos, 1, kFloats) X(atan, 1, kFloats) X(sinh, 1, kFloats) X(cosh, 1, kFloats)                 \
  X(tanh, 1, kFloats) X(asinh, 1, kFloats) X(acosh, 1, kFloats) X(atanh, 1, kFloats) X(sigmoid, 1, kFloats)           \
  X(erf, 1, kFloats) X(erfc, 1, kFloats) X(erfinv, 1, kFloats) X(floor, 1, kFloats) X(ceil, 1, kFloats)               \
  X(round, 1, kFloats) X(trunc, 1, kFloats) X(eq, 2, kCompared) X(ne, 2, kCompared) X(lt, 2, kCompared)               \
  X(le, 2, kCompared) X(gt, 2, kCompared) X(ge, 2, kCompared) X(bitwise_and, 2, kIntegers)                            \
  X(bitwise_or, 2, kIntegers) X(bitwise_xor, 2, kIntegers) X(shift_left, 2, kIntegers) X(shift_right, 2, kIntegers)   \
  X(logical_and, 2, kBools) X(logical_or, 2, kBools) X(logical_xor, 2, kBools) X(isnan, 1, kClassified)               \
  X(isinf, 1, kClassified) X(isfinite, 1, kClassified)

enum class Op : int16_t {
#define THAL_OP(name, arity, rule) k_##name,
  THAL_PRIMITIVES(THAL_OP)
#undef THAL_OP
  kPrimitives,
  k_spread = kPrimitives  // a value of one row, or one for each row, copied to whole rows
};

// What a value varies with. The machine evaluates a block of rows of kLanes elements; a value that is the same in all
// rows, or throughout each row, is computed and kept once.
enum class Span : int8_t { kOne, kLanes, kRows, kBlock };

constexpr int64_t kLanes = 16;
// Rows evaluated at a time: 40 rows of a 32-bit value are 2.5 KB, so that a dozen values sit in the L1 cache, and
// choosing the next instruction costs half a cycle for each vector.
constexpr int64_t kChunk = 40;
// Rows of the largest block; the caller's, see kKeyBlock and kRowKeyBlock.
constexpr int64_t kRowsMost = 128;

struct Instruction {
  Op op;
  Type type, from;       // of the result, and of the (last) operand
  Span span;
  int32_t result;        // byte offset in the machine's memory
  int32_t operand[3];    // byte offsets
  Span operand_span[3];  // kBlock or kRows where the operand advances from row to row
  int64_t attribute;     // constant: its value; input, gather: which
  int32_t index, indices;  // gather: its indices are Program::indices[index .. index + indices)
};

struct Index {
  int32_t at;
  Type type;
  Span span;
};

struct Result {
  int32_t at;
  Type type;
  Span span;
};

struct CapturedSpec {
  Type type;
  int32_t dims;
};

struct Program {
  std::vector<Type> inputs;
  std::vector<CapturedSpec> captured;
  std::vector<Instruction> once, rows, block;  // spans kOne and kLanes; kRows; kBlock, which runs chunk by chunk
  std::vector<Index> indices;
  std::vector<Result> results;
  int64_t bytes = 0;  // of the machine's memory
};

constexpr int64_t kInputsMost = 64;

// Bytes of an element while it is computed with: 16-bit floating values are kept as float32, small integers and
// booleans (0 or 1) as int32.
inline int64_t width_of(Type t) { return t == Type::kF64 || t == Type::kI64 ? 8 : 4; }
inline bool is_float(Type t) { return t <= Type::kF16; }
inline bool is_integer(Type t) { return t >= Type::kI64 && t <= Type::kU8; }

// Decodes `count` words for inputs that span `spans`, one for each. Every word is checked before it is used.
// `wanted` is the type that the first result is cast to, and whether that spans the block. May throw std::bad_alloc.
// Returns THAL_OK or THAL_BAD_PROGRAM.
int decode(const int64_t* words, int64_t count, const Span* spans, int64_t inputs, Type wanted, Program& program);

// Whether captured tensors are what the program was made for, with memory where they have elements.
bool fit(const Program& program, const thal_captured* captured, int64_t count);

inline bool is_empty(const thal_captured& c) {
  for (int32_t d = 0; d < c.dims; ++d)
    if (c.sizes[d] == 0) return true;
  return false;
}

// One evaluation: `rows` rows of kLanes elements.
struct Frame {
  int64_t rows;
  struct In {
    const void* data;  // kOne: one element, kLanes: kLanes of them, kRows: one for each row, kBlock: rows of kLanes
    int64_t stride;    // kBlock: elements from row to row
  } in[kInputsMost];
  double factor;  // multiplied into input 0, where that is a block of float32 or float64
  const thal_captured* captured;
  char* memory;  // Program::bytes, aligned to 64
  void* out;     // rows of kLanes elements of the wanted type's width; null: the sink takes all results
  int64_t out_stride;
  // Called after each chunk of rows, whose results are in memory then; may be null.
  void (*sink)(void* context, const Frame& frame, int64_t first, int64_t rows);
  void* sink_context;
};


}  // namespace thal
