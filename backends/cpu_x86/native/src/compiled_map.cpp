// Compiling the block phase of a program, and memory for the code.
#include "compiled_map.hpp"

#include <algorithm>

#include "assembler.hpp"

#if defined(_WIN32)
#define NOMINMAX
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace thal {
namespace {

using R = Assembler;
// Vector registers that no convention asks to keep, upper halves included.
constexpr int kVectors[] = {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 0, 1, 2, 3, 4, 5};
constexpr int kTruths[] = {1, 2, 3, 4, 5, 6, 7};
constexpr int kTensors[] = {R::rcx, R::rdx, R::rbx, R::rbp, R::rsi, R::r8, R::r9, R::r10, R::r11, R::r12, R::r13, R::r14};
constexpr int kSaved[] = {R::rbx, R::rbp, R::rsi, R::rdi, R::r12, R::r13, R::r14, R::r15};
// Bytes: the processor's own prefetching begins anew at each page. An AdamW step is 5 to 10 % quicker for it.
constexpr int32_t kAhead = 512;
constexpr int kAt = R::rax, kEnd = R::r15, kMemory = R::rdi;

class Compiler {
  const Program& program_;
  Assembler out_;
  bool wide_ = false;  // float64: half a row in each round
  std::vector<int> free_, free_truths_;

  // What is in a place of the machine's memory now.
  struct Held {
    int32_t at;
    int reg;
    bool truth;
  };
  std::vector<Held> held_;

 public:
  std::vector<int32_t> inputs;

  explicit Compiler(const Program& program)
      : program_(program), free_(std::begin(kVectors), std::end(kVectors)),
        free_truths_(std::begin(kTruths), std::end(kTruths)) {}

  const std::vector<uint8_t>& bytes() const { return out_.bytes; }

  bool compile() {
    if (!fits()) return false;
    begin();
    const size_t top = out_.bytes.size();
    for (size_t i = 0; i < program_.block.size(); ++i)
      if (!instruction(i)) return false;
    for (size_t i = 0; i < program_.results.size(); ++i)
      if (!store(program_.results[i], static_cast<int>(inputs.size() + i))) return false;
    out_.add(kAt, wide_ ? 8 : 16);
    out_.loop_while_less(kAt, kEnd, top);
    out_.finish();
    for (size_t i = std::size(kSaved); i-- > 0;) out_.pop(kSaved[i]);
    out_.ret();
    return true;
  }

 private:
  bool of_width(Type t) const { return t == (wide_ ? Type::kF64 : Type::kF32); }

  bool fits() {
    if (program_.results.empty() || !program_.rows.empty()) return false;
    wide_ = program_.results[0].type == Type::kF64;
    for (const Result& r : program_.results)
      if (!of_width(r.type) || r.span == Span::kRows) return false;
    for (const Instruction& in : program_.block) {
      if (in.op == Op::k_input && in.span == Span::kBlock) {
        if (!of_width(in.type)) return false;
        inputs.push_back(static_cast<int32_t>(in.attribute));
      }
    }
    return inputs.size() + program_.results.size() <= std::size(kTensors);
  }

  void begin() {
    for (int r : kSaved) out_.push(r);
#if defined(_WIN32)
    out_.move(R::rdi, R::rcx);
#endif
    out_.load(kEnd, R::rdi, offsetof(CompiledMap::Arguments, end));
    const auto count = static_cast<int32_t>(inputs.size() + program_.results.size());
    for (int32_t i = 0; i < count; ++i)
      out_.load(kTensors[i], R::rdi, static_cast<int32_t>(offsetof(CompiledMap::Arguments, tensors)) + 8 * i);
    out_.load(kMemory, R::rdi, offsetof(CompiledMap::Arguments, memory));
    out_.clear(kAt);
  }

  Place tensor(int number) const { return Place::indexed(kTensors[number], kAt, wide_ ? 3 : 2); }

  // ------------------------------------------------------------------------ values

  Held* find(int32_t at) {
    for (Held& h : held_)
      if (h.at == at) return &h;
    return nullptr;
  }

  Place value(int32_t at, Span span) {
    if (span == Span::kOne) return Place::at(kMemory, at);
    return Place::of(find(at)->reg);
  }

  // In a register, which is a copy where the value is in memory.
  bool in_register(int32_t at, Span span, int& reg, bool& borrowed) {
    const Place p = value(at, span);
    borrowed = p.is_memory();
    if (!borrowed) {
      reg = p.reg;
      return true;
    }
    if (!take(reg)) return false;
    move(reg, p);
    return true;
  }

  bool take(int& reg) {
    if (free_.empty()) return false;
    reg = free_.back();
    free_.pop_back();
    return true;
  }
  void give(int reg) { free_.push_back(reg); }

  bool take_truth(int& reg) {
    if (free_truths_.empty()) return false;
    reg = free_truths_.back();
    free_truths_.pop_back();
    return true;
  }

  // Whether what is at `at` after instruction `i` is read again before another value takes its place.
  bool lives(int32_t at, size_t i) const {
    for (size_t j = i + 1; j < program_.block.size(); ++j) {
      const Instruction& in = program_.block[j];
      for (int k = 0; k < operands(in); ++k)
        if (in.operand_span[k] == Span::kBlock && in.operand[k] == at) return true;
      if (in.result == at && in.span == Span::kBlock) return false;
    }
    for (const Result& r : program_.results)
      if (r.span == Span::kBlock && r.at == at) return true;
    return false;
  }

  void release_dead(size_t i) {
    for (size_t h = 0; h < held_.size();) {
      if (lives(held_[h].at, i)) {
        ++h;
        continue;
      }
      (held_[h].truth ? free_truths_ : free_).push_back(held_[h].reg);
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(h));
    }
  }

  static int operands(const Instruction& in) {
    switch (in.op) {
      case Op::k_input:
      case Op::k_constant:
      case Op::k_gather:
        return 0;
      case Op::k_where:
        return 3;
      case Op::k_add:
      case Op::k_sub:
      case Op::k_mul:
      case Op::k_div:
      case Op::k_min:
      case Op::k_max:
      case Op::k_clamp_min:
      case Op::k_clamp_max:
      case Op::k_eq:
      case Op::k_ne:
      case Op::k_lt:
      case Op::k_le:
      case Op::k_gt:
      case Op::k_ge:
        return 2;
      default:
        return 1;
    }
  }

  // ------------------------------------------------------------------------ instructions

  Code arithmetic(uint8_t opcode) const { return {wide_ ? k66 : kNone, k0F, opcode, wide_}; }

  void move(int dst, Place from) { out_.vector(arithmetic(0x10), dst, 0, from); }

  bool instruction(size_t i) {
    const Instruction& in = program_.block[i];
    if (in.span != Span::kBlock || in.op == Op::k_gather) return false;
    const bool truth = in.type == Type::kBool;
    if (!truth && !of_width(in.type)) return false;
    if (in.op != Op::k_input && !of_width(in.from)) return false;
    int dst = -1;
    if (!(truth ? take_truth(dst) : take(dst))) return false;
    if (!(truth ? compare(in, dst) : compute(in, dst))) return false;
    // The operands of this instruction may give their place to its result: they are dead now.
    for (size_t h = 0; h < held_.size(); ++h) {
      if (held_[h].at != in.result) continue;
      (held_[h].truth ? free_truths_ : free_).push_back(held_[h].reg);
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(h));
      break;
    }
    held_.push_back({in.result, dst, truth});
    release_dead(i);
    return true;
  }

  bool compute(const Instruction& in, int dst) {
    switch (in.op) {
      case Op::k_input:
        return load(dst, static_cast<int>(std::find(inputs.begin(), inputs.end(), in.attribute) - inputs.begin()));
      case Op::k_cast:
        move(dst, value(in.operand[0], in.operand_span[0]));
        return true;
      case Op::k_add:
        return binary(in, dst, 0x58);
      case Op::k_mul:
        return binary(in, dst, 0x59);
      case Op::k_sub:
        return binary(in, dst, 0x5c);
      case Op::k_div:
        return binary(in, dst, 0x5e);
      case Op::k_min:
      case Op::k_clamp_max:
        return extreme(in, dst, 0x5d);
      case Op::k_max:
      case Op::k_clamp_min:
        return extreme(in, dst, 0x5f);
      case Op::k_sqrt:
        out_.vector(arithmetic(0x51), dst, 0, value(in.operand[0], in.operand_span[0]));
        return true;
      case Op::k_neg:
        sign_bit(dst);
        out_.vector({k66, k0F, 0xef, wide_}, dst, dst, value(in.operand[0], in.operand_span[0]));
        return true;
      case Op::k_abs:
        ones(dst);
        shift(dst, 2, 1);
        out_.vector({k66, k0F, 0xdb, wide_}, dst, dst, value(in.operand[0], in.operand_span[0]));
        return true;
      case Op::k_sign:
        return sign(in, dst);
      case Op::k_where:
        return where(in, dst);
      default:
        return false;
    }
  }

  bool load(int dst, int number) {
    Place ahead = tensor(number);
    move(dst, ahead);
    ahead.offset = kAhead;
    out_.prefetch(ahead);
    return true;
  }

  bool binary(const Instruction& in, int dst, uint8_t opcode) {
    int left = -1;
    bool borrowed = false;
    if (!in_register(in.operand[0], in.operand_span[0], left, borrowed)) return false;
    out_.vector(arithmetic(opcode), dst, left, value(in.operand[1], in.operand_span[1]));
    if (borrowed) give(left);
    return true;
  }

  // As the machine has it: the first operand if that is no number, else the instruction's own choice, which is the second
  // one if that is no number, and of zeros.
  bool extreme(const Instruction& in, int dst, uint8_t opcode) {
    int left = -1, bad = -1;
    bool borrowed = false;
    if (!in_register(in.operand[0], in.operand_span[0], left, borrowed) || !take_truth(bad)) return false;
    out_.vector(arithmetic(opcode), dst, left, value(in.operand[1], in.operand_span[1]));
    out_.vector(arithmetic(0xc2), bad, left, Place::of(left), uint8_t{3});
    out_.vector(arithmetic(0x10), dst, 0, Place::of(left), bad);
    free_truths_.push_back(bad);
    if (borrowed) give(left);
    return true;
  }

  bool where(const Instruction& in, int dst) {
    if (in.operand_span[0] != Span::kBlock) return false;
    const Held* condition = find(in.operand[0]);
    if (!condition || !condition->truth) return false;
    const int mask = condition->reg;
    move(dst, value(in.operand[2], in.operand_span[2]));
    out_.vector(arithmetic(0x10), dst, 0, value(in.operand[1], in.operand_span[1]), mask);
    return true;
  }

  // (x > 0) - (x < 0): 1 and -1 have the same bits but for the sign, and what is no number has the sign 0.
  bool sign(const Instruction& in, int dst) {
    int x = -1, other = -1, above = -1, below = -1;
    bool borrowed = false;
    if (!in_register(in.operand[0], in.operand_span[0], x, borrowed) || !take(other)) return false;
    if (!take_truth(above) || !take_truth(below)) return false;
    out_.vector({k66, k0F, 0xef, wide_}, dst, dst, Place::of(dst));
    one(other);
    out_.vector(arithmetic(0xc2), above, x, Place::of(dst), uint8_t{0x1e});
    out_.vector(arithmetic(0xc2), below, x, Place::of(dst), uint8_t{0x11});
    out_.vector(arithmetic(0x5c), dst, dst, Place::of(other), below);
    out_.vector(arithmetic(0x10), dst, 0, Place::of(other), above);
    free_truths_.push_back(below), free_truths_.push_back(above);
    give(other);
    if (borrowed) give(x);
    return true;
  }

  bool compare(const Instruction& in, int dst) {
    // Ordered and quiet, but for ne, which is true of what is no number.
    int predicate = -1;
    switch (in.op) {
      case Op::k_eq:
        predicate = 0x00;
        break;
      case Op::k_ne:
        predicate = 0x04;
        break;
      case Op::k_lt:
        predicate = 0x11;
        break;
      case Op::k_le:
        predicate = 0x12;
        break;
      case Op::k_ge:
        predicate = 0x1d;
        break;
      case Op::k_gt:
        predicate = 0x1e;
        break;
      default:
        return false;
    }
    int left = -1;
    bool borrowed = false;
    if (!in_register(in.operand[0], in.operand_span[0], left, borrowed)) return false;
    out_.vector(arithmetic(0xc2), dst, left, value(in.operand[1], in.operand_span[1]), static_cast<uint8_t>(predicate));
    if (borrowed) give(left);
    return true;
  }

  // ------------------------------------------------------------------------ constants without memory

  void ones(int dst) { out_.vector({k66, k0F3A, 0x25, false}, dst, dst, Place::of(dst), uint8_t{0xff}); }
  // `kind`: 2 to the right, 6 to the left.
  void shift(int dst, int kind, int bits) {
    out_.vector({k66, k0F, static_cast<uint8_t>(wide_ ? 0x73 : 0x72), wide_}, kind, dst, Place::of(dst),
                static_cast<uint8_t>(bits));
  }
  void sign_bit(int dst) {
    ones(dst);
    shift(dst, 6, wide_ ? 63 : 31);
  }
  void one(int dst) {
    ones(dst);
    shift(dst, 2, wide_ ? 54 : 25);
    shift(dst, 6, wide_ ? 52 : 23);
  }

  bool store(const Result& result, int number) {
    int reg = -1;
    bool borrowed = false;
    if (!in_register(result.at, result.span, reg, borrowed)) return false;
    out_.vector(arithmetic(0x11), reg, 0, tensor(number));
    if (borrowed) give(reg);
    return true;
  }
};

#if defined(_WIN32)
void* executable(const std::vector<uint8_t>& code, size_t& size) {
  size = code.size();
  void* memory = VirtualAlloc(nullptr, size, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
  if (!memory) return nullptr;
  std::memcpy(memory, code.data(), code.size());
  DWORD before = 0;
  if (VirtualProtect(memory, size, PAGE_EXECUTE_READ, &before)) {
    FlushInstructionCache(GetCurrentProcess(), memory, size);
    return memory;
  }
  VirtualFree(memory, 0, MEM_RELEASE);
  return nullptr;
}
void release(void* memory, size_t) { VirtualFree(memory, 0, MEM_RELEASE); }
#else
// Never writable and executable at once, which hardened systems forbid.
void* executable(const std::vector<uint8_t>& code, size_t& size) {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  size = (code.size() + page - 1) / page * page;
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  std::memcpy(memory, code.data(), code.size());
  if (mprotect(memory, size, PROT_READ | PROT_EXEC) == 0) return memory;
  munmap(memory, size);
  return nullptr;
}
void release(void* memory, size_t size) { munmap(memory, size); }
#endif

}  // namespace

CompiledMap::~CompiledMap() {
  if (code_) release(code_, size_);
}

bool CompiledMap::compile(const Program& program) {
  Compiler compiler(program);
  if (!compiler.compile()) return false;
  code_ = executable(compiler.bytes(), size_);
  std::copy(compiler.inputs.begin(), compiler.inputs.end(), inputs_);
  input_count_ = static_cast<int32_t>(compiler.inputs.size());
  output_count_ = static_cast<int32_t>(program.results.size());
  return code_ != nullptr;
}

void CompiledMap::run(const void* const* in, char* const* out, const char* memory, int64_t rows) const {
  Arguments a;
  a.end = rows * kLanes, a.memory = memory;
  for (int32_t i = 0; i < input_count_; ++i) a.tensors[i] = in[inputs_[i]];
  for (int32_t i = 0; i < output_count_; ++i) a.tensors[input_count_ + i] = out[i];
  reinterpret_cast<void (*)(const Arguments*)>(reinterpret_cast<uintptr_t>(code_))(&a);
}

}  // namespace thal
