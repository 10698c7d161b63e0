// Runs a planned call: its items, then the partial results of split calls are merged, in a fixed order.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "plan.hpp"
#include "row_state.hpp"
#include "tasks.hpp"

namespace thal {
namespace {

void run_item(const Plan& p, int64_t i, char* scratch) {
  // Tiles are of float32, or float64, where keys and values are dequantised before the products.
  const auto kernel = p.row_kernel ? p.isa->run_rows[p.stored_type]
                                   : p.isa->run_tile[p.call.quantized && p.real == 4 ? THAL_F32 : p.call.dtype];
  kernel(p, item_at(p, i), scratch);
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t to_f16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) {  // subnormal: adding 2^-1 puts the rounding where the last half-precision bit is
    float y;
    std::memcpy(&y, &size, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t rounded = size + 0xfff + (size >> 13 & 1) - 0x38000000;
  return static_cast<uint16_t>(sign | rounded >> 13);
}

void store(int32_t dtype, void* base, int64_t at, float x) {
  if (dtype == THAL_F32) static_cast<float*>(base)[at] = x;
  if (dtype == THAL_BF16) static_cast<uint16_t*>(base)[at] = to_bf16(x);
  if (dtype == THAL_F16) static_cast<uint16_t*>(base)[at] = to_f16(x);
}
void store(int32_t, void* base, int64_t at, double x) { static_cast<double*>(base)[at] = x; }

float power(const Plan& p, float d) { return std::exp2(d * static_cast<float>(p.exp_factor)); }
double power(const Plan& p, double d) { return static_cast<double>(std::exp(static_cast<long double>(d) * p.lse_factor)); }

// Row i of a tile, from its first split on; `sums` has room for Ev elements.
template <class T>
void merge_row(const Plan& p, int64_t i, const Item& it, T* sums) {
  const thal_attention& c = p.call;
  constexpr T inf = std::numeric_limits<T>::infinity();
  const int64_t splits = it.sequence.splits;
  const auto partial = [&](int64_t s) { return reinterpret_cast<const T*>(it.partial + s * p.partial_bytes); };
  const auto state = [&](int64_t s) { return partial(s) + p.tile_rows * c.Ev; };
  T top = -inf;
  for (int64_t s = 0; s < splits; ++s) top = std::max(top, state(s)[i]);
  const T safe = top == -inf ? T(0) : top;
  std::fill(sums, sums + c.Ev, T(0));
  T total = 0;
  for (int64_t s = 0; s < splits; ++s) {
    const T weight = power(p, state(s)[i] - safe), sum = state(s)[p.tile_rows + i];
    if (sum == T(0)) continue;  // no live key in this range
    total += weight * sum;
    const T* o = partial(s) + i * c.Ev;
    for (int64_t e = 0; e < c.Ev; ++e) sums[e] += weight * o[e];
  }
  const int64_t row = it.row0 + i, l = row / p.group, h = it.kv_head * p.group + row % p.group;
  const T inverse = total == T(0) ? T(0) : static_cast<T>(p.kept()) / total;
  const int64_t at = it.sequence.out + h * c.out_stride[1] + l * c.out_stride[2];
  for (int64_t e = 0; e < c.Ev; ++e) store(c.dtype, c.out, at + e * c.out_stride[3], sums[e] * inverse);
  store_row_state(p, it, i, safe, total);
}

template <class T>
void merge_rows(const Plan& p, const Item& it, char* scratch) {
  for (int64_t i = 0; i < it.rows; ++i) merge_row(p, i, it, reinterpret_cast<T*>(scratch));
}

void merge_part(const Plan& p, int64_t part, char* scratch) {
  const Item it = part_at(p, part);
  if (!it.partial) return;
  p.real == 8 ? merge_rows<double>(p, it, scratch) : merge_rows<float>(p, it, scratch);
}

bool pointers_missing(const Plan& p) {
  const thal_attention& c = p.call;
  if ((c.Ev > 0 && !c.out) || !c.q) return true;
  const thal_quantized* scaled = c.quantized;
  if (p.most_keys > 0 && scaled && (!scaled->key_scale || !scaled->value_scale)) return true;
  return p.most_keys > 0 && (!c.k || (c.Ev > 0 && !c.v) || (c.mask_kind != THAL_MASK_NONE && !c.mask));
}

}  // namespace

double work_of(const Plan& p) {
  double pairs = 0;
  for (int64_t i = 0; i < p.sequence_count(); ++i)
    pairs += static_cast<double>(p.sequences()[i].L) * static_cast<double>(p.sequences()[i].S);
  const int64_t heads = p.call.Hq * (p.call.ragged ? 1 : p.call.B);
  return pairs * static_cast<double>(heads) * static_cast<double>(p.call.E + p.call.Ev);
}

int run_plan(Plan& plan, void* workspace) {
  if (plan.items == 0) return THAL_OK;
  if (pointers_missing(plan)) return THAL_BAD_POINTER;
  if (!workspace) return THAL_BAD_WORKSPACE;
  const int64_t reserved = std::max<int64_t>(1, std::min<int64_t>(plan.call.num_threads, plan.items));
  const int64_t workers = work_of(plan) < kSerialWork ? 1 : reserved;
  plan.scratch = aligned(workspace);
  plan.partials = plan.scratch + reserved * plan.scratch_bytes;
  const auto scratch = [&plan](int64_t worker) { return plan.scratch + worker * plan.scratch_bytes; };
  const auto attend = [&](int64_t i, int64_t worker) { run_item(plan, i, scratch(worker)); };
  if (const int code = run_tasks(plan.call, plan.items, workers, attend)) return code;
  if (!plan.partial_count) return THAL_OK;
  return run_tasks(plan.call, plan.parts, workers, [&](int64_t i, int64_t worker) { merge_part(plan, i, scratch(worker)); });
}

}  // namespace thal

extern "C" int thal_attention_run(const thal_attention* call) {
  if (!call) return THAL_BAD_POINTER;
  try {
    thal::Plan plan;
    const int64_t needed = thal::make_plan(*call, plan);
    if (needed < 0) return static_cast<int>(-needed);
    return thal::run_plan(plan, call->workspace_size < needed ? nullptr : call->workspace);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
