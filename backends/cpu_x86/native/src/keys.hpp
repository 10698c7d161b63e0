// Where the keys and values of an item lie: at one stride, or page by page.
#pragma once

#include "pack.hpp"

namespace {

struct KeyRun {
  const char *keys, *values;
  int64_t count;
};

class KeySource {
  const thal_attention& c_;
  const Item& it_;
  const thal_ragged* pages_;
  int64_t size_;
  int shift_ = -1;  // of a page size that is a power of 2, for which nothing is divided

 public:
  KeySource(const Plan& p, const Item& it, int64_t size)
      : c_(p.call), it_(it), pages_(p.call.ragged && p.call.ragged->lengths ? p.call.ragged : nullptr), size_(size) {
    for (int shift = 0; pages_ && shift < 31; ++shift)
      if (pages_->page_size == int64_t{1} << shift) shift_ = shift;
  }

  bool paged() const { return pages_; }

  // At most `most` keys from `key` on that lie at k_stride[2] from each other, and their values likewise.
  KeyRun run(int64_t key, int64_t most) const {
    int64_t k = it_.sequence.k + it_.kv_head * c_.k_stride[1], v = it_.sequence.v + it_.kv_head * c_.v_stride[1];
    int64_t row = key, count = most;
    if (pages_) {
      const int64_t column = shift_ >= 0 ? key >> shift_ : key / pages_->page_size;
      const int64_t page =
          pages_->page_table[it_.b * pages_->page_table_stride[0] + column * pages_->page_table_stride[1]];
      row = key - column * pages_->page_size;
      count = smaller(most, pages_->page_size - row);
      k += page * c_.k_stride[0], v += page * c_.v_stride[0];
    }
    return {static_cast<const char*>(c_.k) + (k + row * c_.k_stride[2]) * size_,
            static_cast<const char*>(c_.v) + (v + row * c_.v_stride[2]) * size_, count};
  }
};

// n rows copied to contiguous ones.
template <int64_t SIZE>
void copy_rows(const char* src, const int64_t* stride, int64_t n, int64_t columns, char* dst) {
  for (int64_t j = 0; j < n; ++j, dst += columns * SIZE) {
    const char* row = src + j * stride[2] * SIZE;
    if (stride[3] == 1) {
      std::memcpy(dst, row, static_cast<size_t>(columns * SIZE));
    } else {
      for (int64_t e = 0; e < columns; ++e) std::memcpy(dst + e * SIZE, row + e * stride[3] * SIZE, SIZE);
    }
  }
}

}  // namespace
