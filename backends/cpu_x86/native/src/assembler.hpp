// An assembler for what a compiled map needs of AVX-512: whole vectors of 64 bytes, EVEX encoded, and one loop.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace thal {

// A vector register, or 64 bytes of memory: base + (index << scale) + offset.
struct Place {
  int reg = -1;
  int base = 0, index = -1, scale = 0;
  int32_t offset = 0;

  static Place of(int reg) {
    Place p;
    p.reg = reg;
    return p;
  }
  static Place at(int base, int32_t offset) {
    Place p;
    p.base = base, p.offset = offset;
    return p;
  }
  static Place indexed(int base, int index, int scale) {
    Place p;
    p.base = base, p.index = index, p.scale = scale;
    return p;
  }
  bool is_memory() const { return reg < 0; }
};

enum Prefix { kNone = 0, k66 = 1, kF3 = 2 };
enum Map { k0F = 1, k0F38 = 2, k0F3A = 3 };

struct Code {
  Prefix prefix;
  Map map;
  uint8_t opcode;
  bool wide = false;  // EVEX.W
};

class Assembler {
 public:
  enum General { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };

  std::vector<uint8_t> bytes;

  // dst = code(left, right); `mask`: the register of truth values that merges (1 to 7), 0 for all lanes.
  void vector(Code code, int dst, int left, Place right, int mask = 0) {
    const int x = right.is_memory() ? (right.index < 0 ? 0 : right.index >> 3 & 1) : right.reg >> 4 & 1;
    const int b = right.is_memory() ? right.base >> 3 & 1 : right.reg >> 3 & 1;
    byte(0x62);
    byte((~(dst >> 3) & 1) << 7 | (x ^ 1) << 6 | (b ^ 1) << 5 | (~(dst >> 4) & 1) << 4 | code.map);
    byte(code.wide << 7 | (~left & 15) << 3 | 1 << 2 | code.prefix);
    byte(2 << 5 | (~(left >> 4) & 1) << 3 | mask);
    byte(code.opcode);
    operand(dst, right);
  }
  // The same with an operand in the instruction itself.
  void vector(Code code, int dst, int left, Place right, uint8_t immediate, int mask = 0) {
    vector(code, dst, left, right, mask);
    byte(immediate);
  }

  void push(int r) {
    if (r >> 3) byte(0x41);
    byte(0x50 | (r & 7));
  }
  void pop(int r) {
    if (r >> 3) byte(0x41);
    byte(0x58 | (r & 7));
  }
  // r = the 64-bit word at base + offset.
  void load(int r, int base, int32_t offset) {
    byte(0x48 | (r >> 3) << 2 | (base >> 3));
    byte(0x8b);
    operand(r, Place::at(base, offset));
  }
  void move(int to, int from) {
    byte(0x48 | (from >> 3) << 2 | (to >> 3));
    byte(0x89);
    byte(0xc0 | (from & 7) << 3 | (to & 7));
  }
  void clear(int r) {
    byte(0x48 | (r >> 3) << 2 | (r >> 3));
    byte(0x31);
    byte(0xc0 | (r & 7) << 3 | (r & 7));
  }
  void add(int r, int32_t number) {
    byte(0x48 | (r >> 3));
    byte(0x81);
    byte(0xc0 | (r & 7));
    word(number);
  }
  // Back to `target` while r < bound, as signed numbers.
  void loop_while_less(int r, int bound, size_t target) {
    byte(0x48 | (bound >> 3) << 2 | (r >> 3));
    byte(0x39);
    byte(0xc0 | (bound & 7) << 3 | (r & 7));
    byte(0x0f);
    byte(0x8c);
    word(static_cast<int32_t>(static_cast<int64_t>(target) - static_cast<int64_t>(bytes.size()) - 4));
  }
  // Fetches the line at p into all caches.
  void prefetch(Place p) {
    byte(0x40 | (p.index >= 0 ? p.index >> 3 & 1 : 0) << 1 | (p.base >> 3 & 1));
    byte(0x0f), byte(0x18);
    operand(1, p);
  }
  void finish() {
    byte(0xc5), byte(0xf8), byte(0x77);  // vzeroupper
  }
  void ret() { byte(0xc3); }

 private:
  void byte(int value) { bytes.push_back(static_cast<uint8_t>(value)); }
  void word(int32_t value) {
    uint8_t raw[4];
    std::memcpy(raw, &value, 4);
    bytes.insert(bytes.end(), raw, raw + 4);
  }
  void operand(int reg, Place p) {
    if (!p.is_memory()) {
      byte(0xc0 | (reg & 7) << 3 | (p.reg & 7));
      return;
    }
    byte(0x80 | (reg & 7) << 3 | 4);  // a displacement of 32 bits is not scaled
    byte(p.scale << 6 | (p.index < 0 ? 4 : p.index & 7) << 3 | (p.base & 7));
    word(p.offset);
  }
};

}  // namespace thal
