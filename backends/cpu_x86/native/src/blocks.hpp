// What a BlockMask says of the rows of one item, key block by key block.
#pragma once

#include "pack.hpp"

namespace {

class BlockRows {
 public:
  // Of a row and a key block. Of all rows of the item kMixed too.
  enum State : uint8_t { kEmpty = 0, kPartial = 1, kFull = 2, kMixed = 3 };

  struct Segment {
    int64_t end;  // of keys in one state
    State state;
  };

  // `memory` has room for block_table_bytes. Of a call without a BlockMask there is nothing to ask.
  BlockRows(const Plan& p, const Item& it, void* memory)
      : p_(p), it_(it), mask_(p.call.blocks ? *p.call.blocks : kNone), table_(static_cast<uint8_t*>(memory)) {
    if (!p.call.blocks) return;
    columns_ = (it.sequence.S + mask_.block_keys - 1) / mask_.block_keys;
    heads_ = mask_.heads == 1 ? 1 : p.group;
    first_ = larger(0, position(it.row0)) / mask_.block_rows;
    const int64_t last = larger(0, position(it.row0 + it.rows - 1)) / mask_.block_rows;
    slots_ = (last - first_ + 1) * heads_;
    std::memset(table_, kEmpty, static_cast<size_t>((slots_ + 1) * columns_));
    for (int64_t slot = 0; slot < slots_; ++slot) read(slot);
    summarise();
  }

  // f(begin, end, state) for the parts of [begin, end) that are not empty.
  template <class F>
  void visit(int64_t begin, int64_t end, F f) const {
    while (begin < end) {
      const Segment part = segment(begin, end);
      if (part.state != kEmpty) f(begin, part.end, part.state);
      begin = part.end;
    }
  }

  // The keys from `key` on, before `end`, that are in one state for the whole item. Mixed blocks come one by one.
  Segment segment(int64_t key, int64_t end) const {
    const uint8_t* summary = table_ + (slots_ + 1) * columns_;
    int64_t column = key / mask_.block_keys;
    const auto state = static_cast<State>(summary[column]);
    for (++column; column < columns_ && state != kMixed && summary[column] == state;) ++column;
    return {smaller(end, column * mask_.block_keys), state};
  }

  // For row `row` of the sequence and the block of `key`.
  State state(int64_t row, int64_t key) const {
    return static_cast<State>(table_[slot_of(row) * columns_ + key / mask_.block_keys]);
  }

 private:
  int64_t position(int64_t row) const { return it_.sequence.first + row / p_.group; }

  // Rows before position 0, which see nothing, have the last slot.
  int64_t slot_of(int64_t row) const {
    const int64_t at = position(row);
    if (at < 0) return slots_;
    return (at / mask_.block_rows - first_) * heads_ + (heads_ == 1 ? 0 : row % p_.group);
  }

  void read(int64_t slot) {
    const int64_t at[3] = {mask_.batches == 1 ? 0 : it_.b,
                           mask_.heads == 1 ? 0 : it_.kv_head * p_.group + slot % heads_, first_ + slot / heads_};
    if (mask_.num) mark(slot, kPartial, mask_.num, mask_.num_stride, mask_.indices, mask_.indices_stride, mask_.most, at);
    if (mask_.full_num)
      mark(slot, kFull, mask_.full_num, mask_.full_num_stride, mask_.full_indices, mask_.full_indices_stride,
           mask_.full_most, at);
  }

  void mark(int64_t slot, State state, const int32_t* num, const int64_t* num_stride, const int32_t* indices,
            const int64_t* stride, int64_t most, const int64_t* at) {
    const int64_t count = smaller(most, num[at[0] * num_stride[0] + at[1] * num_stride[1] + at[2] * num_stride[2]]);
    const int32_t* row = indices + at[0] * stride[0] + at[1] * stride[1] + at[2] * stride[2];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = row[i * stride[3]];
      if (column >= 0 && column < columns_) table_[slot * columns_ + column] = state;
    }
  }

  void summarise() {
    uint8_t* summary = table_ + (slots_ + 1) * columns_;
    const bool blind = position(it_.row0) < 0;
    for (int64_t column = 0; column < columns_; ++column) {
      uint8_t state = table_[column];
      for (int64_t slot = 1; slot < slots_ + blind; ++slot)
        if (table_[slot * columns_ + column] != state) state = kMixed;
      summary[column] = state;
    }
  }

  static constexpr thal_blocks kNone = {};

  const Plan& p_;
  const Item& it_;
  const thal_blocks& mask_;
  uint8_t* table_;  // slots of rows that share a block and a head, then the summary
  int64_t columns_ = 0, heads_ = 0, first_ = 0, slots_ = 0;
};

}  // namespace
