// Where the keys and values of an item lie: at one stride, or page by page.
#pragma once

#include "pack.hpp"

namespace {

struct KeyRun {
  const char *keys, *values;
  int64_t count;
  const float *key_scale, *value_scale;  // of the first key, where they are quantised
};

class KeySource {
  const thal_attention& c_;
  const Item& it_;
  const thal_ragged* pages_;
  int64_t size_;
  int shift_ = -1;  // of a page size that is a power of 2, for which nothing is divided

 public:
  KeySource(const Plan& p, const Item& it)
      : c_(p.call), it_(it), pages_(p.call.ragged && p.call.ragged->lengths ? p.call.ragged : nullptr),
        size_(p.call.quantized ? 1 : thal::bytes_of(p.call.dtype)) {
    for (int shift = 0; pages_ && shift < 31; ++shift)
      if (pages_->page_size == int64_t{1} << shift) shift_ = shift;
  }

  bool paged() const { return pages_; }

  // At most `most` keys from `key` on that lie at k_stride[2] from each other, and their values likewise.
  KeyRun run(int64_t key, int64_t most) const {
    int64_t k = it_.sequence.k + it_.kv_head * c_.k_stride[1], v = it_.sequence.v + it_.kv_head * c_.v_stride[1];
    int64_t row = key, count = most;
    const float *key_scale = nullptr, *value_scale = nullptr;
    if (pages_) {
      const int64_t column = shift_ >= 0 ? key >> shift_ : key / pages_->page_size;
      const int64_t page =
          pages_->page_table[it_.b * pages_->page_table_stride[0] + column * pages_->page_table_stride[1]];
      row = key - column * pages_->page_size;
      count = smaller(most, pages_->page_size - row);
      k += page * c_.k_stride[0], v += page * c_.v_stride[0];
      if (c_.quantized) {
        key_scale = c_.quantized->key_scale + scale_at(c_.quantized->key_stride, page, row);
        value_scale = c_.quantized->value_scale + scale_at(c_.quantized->value_stride, page, row);
      }
    }
    return {static_cast<const char*>(c_.k) + (k + row * c_.k_stride[2]) * size_,
            static_cast<const char*>(c_.v) + (v + row * c_.v_stride[2]) * size_, count, key_scale, value_scale};
  }

 private:
  int64_t scale_at(const int64_t* stride, int64_t page, int64_t row) const {
    return page * stride[0] + it_.kv_head * stride[1] + row * stride[2];
  }
};

// n scales `stride` apart.
inline void copy_scales(const float* scale, int64_t stride, int64_t n, float* dst) {
  for (int64_t j = 0; j < n; ++j) dst[j] = scale[j * stride];
}

// Rows of `columns`, each times its scale.
template <class V>
void scale_rows(Real<V>* rows, const float* scale, int64_t stride, int64_t n, int64_t columns) {
  for (int64_t j = 0; j < n; ++j, rows += columns) {
    const typename V::F factor = V::set1(scale[j * stride]);
    int64_t e = 0;
    for (; e + V::N <= columns; e += V::N) V::store(rows + e, V::mul(V::load(rows + e), factor));
    for (; e < columns; ++e) rows[e] *= scale[j * stride];
  }
}

// The keys and values of a block as contiguous rows of what is computed with.
template <class V, int DT>
void dequantize_rows(const thal_attention& c, const KeyRun& run, Real<V>* keys, Real<V>* values, char* buffer) {
  widen_rows<V, DT>(run.keys, c.k_stride, run.count, c.E, keys, buffer);
  widen_rows<V, DT>(run.values, c.v_stride, run.count, c.Ev, values, buffer);
  scale_rows<V>(keys, run.key_scale, c.quantized->key_stride[2], run.count, c.E);
  scale_rows<V>(values, run.value_scale, c.quantized->value_stride[2], run.count, c.Ev);
}

template <class V>
void dequantize_block(const thal_attention& c, const KeySource& source, int64_t key0, int64_t count, char* keys, char* values,
                      char* buffer) {
  for (int64_t j = 0; j < count;) {
    const KeyRun run = source.run(key0 + j, count - j);
    Real<V>* to[] = {reinterpret_cast<Real<V>*>(keys) + j * c.E, reinterpret_cast<Real<V>*>(values) + j * c.Ev};
    if (c.quantized->type == THAL_I8) {
      dequantize_rows<V, THAL_I8>(c, run, to[0], to[1], buffer);
    } else {
      dequantize_rows<V, THAL_F8>(c, run, to[0], to[1], buffer);
    }
    j += run.count;
  }
}

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
