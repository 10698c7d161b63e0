// A program's block phase as machine code: values stay in registers from the tensors that are read to those that are
// written, where the vector machine stores and loads each of them.
//
// An AdamW step over 20 tensors of 1M float32 is 13 instructions between 4 loads and 3 stores: the machine takes 3.4
// times as long as memory does, and this as long as memory. What is not compiled (other types than float32 and float64,
// functions of the C library) runs on the machine, to the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "program.hpp"

namespace thal {

class CompiledMap {
 public:
  struct Arguments {
    int64_t end;  // whole rows of kLanes elements, times 16
    const void* memory;  // the machine's, with what varies with nothing
    const void* tensors[12];  // inputs that are read, then outputs
  };

  CompiledMap() = default;
  CompiledMap(const CompiledMap&) = delete;
  CompiledMap& operator=(const CompiledMap&) = delete;
  ~CompiledMap();

  // False where the program can not be compiled, or the system forbids memory that is executed.
  bool compile(const Program& program);
  explicit operator bool() const { return code_ != nullptr; }

  // `rows` whole rows, at least one; `in` and `out` begin at the first.
  void run(const void* const* in, char* const* out, const char* memory, int64_t rows) const;

 private:
  void* code_ = nullptr;
  size_t size_ = 0;
  int32_t inputs_[12] = {};  // the program's numbers of the inputs that are read
  int32_t input_count_ = 0, output_count_ = 0;
};

}  // namespace thal
