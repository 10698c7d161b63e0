// thal_program_run: one program over plain arrays.
#include <cstddef>
#include <new>

#include "plan.hpp"

namespace {

// The machine's memory, aligned as Frame asks.
class Memory {
  std::vector<char> bytes_;

 public:
  explicit Memory(int64_t size) : bytes_(static_cast<size_t>(size + 64)) {}
  char* aligned() {
    const auto at = reinterpret_cast<uintptr_t>(bytes_.data());
    return bytes_.data() + ((at + 63) / 64 * 64 - at);
  }
};

int evaluate(const int64_t* words, int64_t count, const thal::Isa& isa, int64_t rows, const thal_input* inputs,
             int64_t input_count, const thal_captured* captured, int64_t captured_count, thal::Type wanted, void* out) {
  thal::Span spans[thal::kInputsMost];
  thal::Frame frame{};
  for (int64_t i = 0; i < input_count; ++i) {
    if (inputs[i].span < 0 || inputs[i].span > THAL_SPAN_BLOCK || !inputs[i].data) return THAL_BAD_PROGRAM;
    spans[i] = static_cast<thal::Span>(inputs[i].span);
    frame.in[i] = {inputs[i].data, inputs[i].stride};
  }
  thal::Program program;
  if (const int code = thal::decode(words, count, spans, input_count, wanted, program)) return code;
  if (!thal::fit(program, captured, captured_count)) return THAL_BAD_PROGRAM;
  Memory memory(program.bytes);
  frame.rows = rows, frame.factor = 1.0f, frame.captured = captured, frame.memory = memory.aligned();
  frame.out = out, frame.out_stride = thal::kLanes;
  isa.run_program(program, frame);
  return THAL_OK;
}

}  // namespace

extern "C" int thal_program_run(const int64_t* words, int64_t count, int32_t isa, int64_t rows,
                                const thal_input* inputs, int64_t input_count, const thal_captured* captured,
                                int64_t captured_count, int32_t type, void* out) {
  const thal::Isa* found = thal::find_isa(isa == THAL_ISA_AUTO ? thal_get_isa(THAL_F32) : isa);
  if (!found) return THAL_BAD_ISA;
  if (rows < 1 || rows > thal::kRowsMost) return THAL_BAD_SIZE;
  if (type < 0 || type >= static_cast<int32_t>(thal::Type::kTypes)) return THAL_BAD_DTYPE;
  if (input_count < 0 || input_count > thal::kInputsMost) return THAL_BAD_PROGRAM;
  if (!out || (input_count && !inputs)) return THAL_BAD_POINTER;
  try {
    return evaluate(words, count, *found, rows, inputs, input_count, captured, captured_count,
                    static_cast<thal::Type>(type), out);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
