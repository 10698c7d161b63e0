// Strides of new tensors with four dimensions, by the rules of torch.empty_like.
#ifndef THAL_STRIDES_HPP
#define THAL_STRIDES_HPP

#include <algorithm>
#include <cstdint>

namespace thal {

inline void contiguous_strides(const int64_t size[4], int64_t out[4]) {
  int64_t step = 1;
  for (int i = 3; i >= 0; --i) {
    out[i] = step;
    step *= std::max<int64_t>(size[i], 1);
  }
}

// Whether the elements fill one piece of memory, each place once; dimensions of one element may have any stride.
inline bool is_packed(const int64_t size[4], const int64_t stride[4]) {
  int order[4] = {0, 1, 2, 3};
  std::stable_sort(order, order + 4, [&](int a, int b) {
    if ((size[a] < 2) != (size[b] < 2)) return size[b] < 2;
    return size[a] >= 2 && stride[a] < stride[b];
  });
  int64_t step = 1;
  for (int i : order) {
    if (size[i] < 2) return true;
    if (stride[i] != step) return false;
    step *= size[i];
  }
  return true;
}

// The order of torch's TensorIterator, innermost dimension first. A stride of 0 says nothing about the order, so this is
// no weak ordering and the insertion sort has to be the very one.
inline void order_of(const int64_t size[4], const int64_t stride[4], int order[4]) {
  for (int i = 0; i < 4; ++i) order[i] = 3 - i;
  const auto compare = [&](int a, int b) -> int64_t {
    if (!stride[a] || !stride[b]) return 0;
    return stride[a] != stride[b] ? stride[a] - stride[b] : std::max<int64_t>(size[a] - size[b], 0);
  };
  for (int i = 1; i < 4; ++i)
    for (int at = i, left = i - 1; left >= 0; --left) {
      const int64_t difference = compare(order[left], order[at]);
      if (difference < 0) break;
      if (difference == 0) continue;
      std::swap(order[left], order[at]);
      at = left;
    }
}

inline void strides_like(const int64_t size[4], const int64_t stride[4], int64_t out[4]) {
  if (is_packed(size, stride)) {
    std::copy(stride, stride + 4, out);
    return;
  }
  int order[4];
  order_of(size, stride, order);
  int64_t step = 1;
  for (int i : order) {
    out[i] = step;
    step *= std::max<int64_t>(size[i], 1);
  }
}

}  // namespace thal

#endif
