// Plans and runs the gradients of one call.
#include "gradient.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "tasks.hpp"

namespace thal {
namespace {

// Items that keep many cores busy, and how many may share the keys of one head: each has sums of its own for them.
constexpr int64_t kItemsWanted = 32, kSharesMost = 8;
// Groups of items that sum over pairs, and what their copies of the sums may take together.
constexpr int64_t kCopiesMost = 16, kCopyBytes = int64_t{32} << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool sums_fit(const GradientPlan& g, const thal_contribution& c) {
  const thal_function& f = *g.p.call.score_mod;
  const auto results = static_cast<int64_t>(g.score_gradient.results.size());
  if (c.captured < 0 || c.captured >= f.captured_count || c.offset < 0) return false;
  const thal_captured& t = f.captured[c.captured];
  if (c.index < 0 || c.value < 0 || c.index > results - t.dims || c.value >= results) return false;
  if (!is_float(g.score_gradient.results[static_cast<size_t>(c.value)].type)) return false;
  for (int32_t d = 0; d < t.dims; ++d) {
    const Type type = g.score_gradient.results[static_cast<size_t>(c.index + d)].type;
    if (type != Type::kI64 && type != Type::kI32) return false;
  }
  int64_t left = g.g.sum_count - c.offset;  // divided down, as a product of sizes may overflow
  if (is_empty(t)) return left >= 0;
  for (int32_t d = 0; d < t.dims; ++d) left /= t.sizes[d];
  return left >= 1;
}

bool mask_sum_fits(const GradientPlan& g) {
  const thal_attention& c = g.p.call;
  if (c.mask_kind <= THAL_MASK_BOOL || c.ragged) return false;
  const int64_t sizes[4] = {c.B, c.Hq, c.L, c.S};
  if (std::count(sizes, sizes + 4, 0)) return true;
  int64_t left = g.g.sum_count - 1 - g.g.mask_sum;  // taken from step by step, as the last place may overflow
  for (int d = 0; d < 4; ++d) {
    const int64_t steps = sizes[d] - 1, stride = g.g.mask_sum_stride[d];
    if (stride < 0 || left < 0 || (steps && stride > left / steps)) return false;
    left -= steps * stride;
  }
  return left >= 0;
}

int decode_gradient(GradientPlan& g) {
  const thal_attention& c = g.p.call;
  if (!c.score_mod) return g.g.contribution_count ? THAL_BAD_PROGRAM : THAL_OK;
  const Span spans[] = {Span::kBlock, Span::kOne, Span::kLanes, Span::kLanes, Span::kRows, Span::kBlock};
  const Type real = c.dtype == THAL_F64 ? Type::kF64 : Type::kF32;
  if (const int code = decode(g.g.words, g.g.word_count, spans, 6, real, g.score_gradient)) return code;
  const std::vector<Type> wanted = {real, Type::kI32, Type::kI32, Type::kI32, Type::kI32, real};
  if (g.score_gradient.inputs != wanted) return THAL_BAD_PROGRAM;
  if (!fit(g.score_gradient, c.score_mod->captured, c.score_mod->captured_count)) return THAL_BAD_PROGRAM;
  for (int32_t i = 0; i < g.g.contribution_count; ++i)
    if (!sums_fit(g, g.g.contributions[i])) return THAL_BAD_PROGRAM;
  return THAL_OK;
}

int check(const thal_attention& c, const thal_gradients& g) {
  if (g.struct_size != sizeof(thal_gradients)) return THAL_BAD_STRUCT;
  if (c.quantized) return THAL_BAD_DTYPE;
  if (g.contribution_count < 0 || g.sum_count < 0 || (g.contribution_count && !g.contributions)) return THAL_BAD_SIZE;
  if (c.score_mod && (!g.words || g.word_count < 0)) return THAL_BAD_PROGRAM;
  return THAL_OK;
}

// Whether other items add to the gradients of the keys that an item of this sequence sees. Sequences may share pages.
bool shares_keys(const Plan& p, const Sequence& s) { return s.splits > 1 || p.paged(); }

// Of the sums of as many keys, and the values behind them.
int64_t key_bytes(const GradientPlan& g, int64_t keys) {
  return (keys + kSpareKeys) * (g.key_width + g.value_width) * g.p.real;
}

// Shares of the tiles of each head, fewer where there are heads enough.
void number_items(GradientPlan& g) {
  Plan& p = g.p;
  const int64_t copies = p.call.ragged ? 1 : p.call.B;
  const int64_t heads = std::max<int64_t>(1, p.sequence_count() * copies * p.call.Hkv);
  const int64_t wanted = std::min(kSharesMost, ceil_div(kItemsWanted, heads));
  g.items = g.partial_count = 0;
  int64_t own_keys = -1;  // most of a head whose tiles are not shared
  for (int64_t i = 0; i < p.sequence_count(); ++i) {
    Sequence& s = p.sequences()[i];
    s.tiles = ceil_div(s.L * p.group, p.tile_rows);
    const int64_t each = std::max<int64_t>(1, ceil_div(s.tiles, wanted));
    s.splits = std::max<int64_t>(1, ceil_div(s.tiles, each));
    s.item0 = g.items, s.partial0 = g.partial_count;
    const int64_t items = copies * p.call.Hkv * s.splits;
    g.items += items;
    g.partial_count += shares_keys(p, s) ? items : 0;
    if (!shares_keys(p, s)) own_keys = std::max(own_keys, s.S);
  }
  g.own_bytes = own_keys < 0 ? 0 : key_bytes(g, own_keys);
  g.partial_bytes = key_bytes(g, p.most_keys);
}

GradientItem item_at(const GradientPlan& g, int64_t index) {
  const Plan& p = g.p;
  GradientItem item;
  const Sequence& s = sequence_at(p, index, &Sequence::item0);
  const int64_t own = index - s.item0, share = s.splits - 1 - own % s.splits, head = own / s.splits;
  const int64_t each = std::max<int64_t>(1, ceil_div(s.tiles, s.splits));
  item.sequence = p.call.ragged ? s : sequence_of(p.call, head / p.call.Hkv);
  item.sequence.splits = s.splits, item.sequence.tiles = s.tiles;
  item.kv_head = head % p.call.Hkv;
  item.tile0 = std::min(s.tiles, share * each);
  item.tiles = std::min(s.tiles, item.tile0 + each) - item.tile0;
  item.partial = shares_keys(p, s) ? g.partials + (s.partial0 + own) * g.partial_bytes : nullptr;
  item.sums = g.g.sums;
  return item;
}

// Which items may add to the same sums, and so may not run at the same time.
void group_items(GradientPlan& g) {
  const thal_attention& c = g.p.call;
  const int64_t* stride = g.g.mask_sum_stride;
  const bool heads_apart = !g.g.contribution_count && (stride[1] != 0 || c.Hq == 1);
  const bool all_apart = heads_apart && (stride[0] != 0 || c.B == 1) && (stride[2] != 0 || c.L == 1);
  g.copies = 1, g.groups = g.items, g.by_head = false;
  if (!g.sums() || all_apart) return;
  const int64_t room = kCopyBytes / 8 / std::max<int64_t>(1, g.g.sum_count);
  const int64_t copies = std::max<int64_t>(1, std::min({kCopiesMost, g.items, room}));
  g.by_head = heads_apart && c.Hkv >= copies;
  if (!g.by_head) g.copies = copies;
  g.groups = g.by_head ? c.Hkv : copies;
}

void set_scratch(GradientPlan& g) {
  const Plan& p = g.p;
  const thal_attention& c = p.call;
  const int64_t real = p.real;
  Scratch layout{p.scratch_bytes};
  const int64_t rows = ceil_div(p.tile_rows, p.panel) * p.panel, pairs = rows * kKeyBlock * p.real;
  g.at_weights = layout.take(pairs);
  g.at_gradients = layout.take(pairs);
  const bool pairs_of_bf16 = p.isa->bf16_pairs && c.dtype == THAL_BF16;
  g.at_narrow_weights = layout.take(pairs_of_bf16 ? pairs / 2 : 0);
  g.at_narrow_gradients = layout.take(pairs_of_bf16 ? pairs / 2 : 0);
  g.at_key_pairs = layout.take(pairs_of_bf16 ? kKeyBlock * p.panel * 2 : 0);
  g.at_query_rows = layout.take(rows * g.key_width * real);
  g.at_above = layout.take(rows * c.Ev * real);
  g.at_above_rows = layout.take(rows * g.value_width * real);
  g.at_delta = layout.take(rows * real);
  g.at_shift = layout.take(rows * real);
  g.at_out = layout.take(p.panel * c.Ev * real);
  g.at_clean = layout.take(kKeyBlock * g.key_width * real);
  g.at_kept = layout.take(c.dropout ? kKeyBlock * p.panel * real : 0);
  g.at_program = layout.take(g.score_gradient.bytes);
  g.at_keys = layout.take(g.own_bytes);
  g.scratch_bytes = layout.at;
}

int64_t copy_doubles(const GradientPlan& g) { return g.copies > 1 ? g.copies * g.g.sum_count : 0; }

int64_t workers_of(const GradientPlan& g) { return std::max<int64_t>(1, std::min<int64_t>(g.p.call.num_threads, g.groups)); }

bool pointers_missing(const GradientPlan& g) {
  const thal_attention& c = g.p.call;
  const thal_gradients& d = g.g;
  if (g.sums() && d.sum_count > 0 && !d.sums) return true;
  if (g.items == 0) return false;
  const bool rows = g.p.most_rows > 0, values = rows && c.Ev > 0, keys = g.p.most_keys > 0;
  if (rows && (!c.q || !c.lse || !d.grad_q)) return true;
  if (values && (!c.out || !d.grad_out)) return true;
  if (keys && (!c.k || !d.grad_k || (c.Ev > 0 && (!c.v || !d.grad_v)))) return true;
  return rows && keys && c.mask_kind != THAL_MASK_NONE && !c.mask;
}

void run_group(const GradientPlan& g, const Isa& isa, int64_t group, char* scratch) {
  const auto run = [&](int64_t i) {
    GradientItem item = item_at(g, i);
    if (g.copies > 1) item.sums = g.copy_sums + group * g.g.sum_count;
    isa.run_gradient[g.p.call.dtype](g, item, scratch);
  };
  if (g.by_head) {
    for (int64_t i = 0; i < g.items; ++i)
      if (item_at(g, i).kv_head == group) run(i);
  } else {
    for (int64_t i = group * g.items / g.groups; i < (group + 1) * g.items / g.groups; ++i) run(i);
  }
}

// Adds the sums of all items of one key head to the pages, sequence by sequence.
template <class T>
void add_to_pages(const GradientPlan& g, int64_t head) {
  const thal_attention& c = g.p.call;
  const thal_ragged& r = *c.ragged;
  for (int64_t i = 0; i < g.items; ++i) {
    const GradientItem item = item_at(g, i);
    if (item.kv_head != head) continue;
    const T* keys = reinterpret_cast<const T*>(item.partial);
    const T* values = keys + (item.sequence.S + kSpareKeys) * g.key_width;
    for (int64_t j = 0; j < item.sequence.S; ++j) {
      const int64_t page = r.page_table[item.sequence.b * r.page_table_stride[0] + j / r.page_size * r.page_table_stride[1]];
      const auto add = [&](void* to, const int64_t* stride, const T* sums, int64_t columns, double factor) {
        T* row = static_cast<T*>(to) + page * stride[0] + head * stride[1] + j % r.page_size * stride[2];
        for (int64_t e = 0; e < columns; ++e) row[e * stride[3]] += sums[e] * static_cast<T>(factor);
      };
      add(g.g.grad_k, g.g.grad_k_stride, keys + j * g.key_width, c.E, g.p.scale);
      add(g.g.grad_v, g.g.grad_v_stride, values + j * g.value_width, c.Ev, g.p.kept());
    }
  }
}

// Adds up the sums of the items that share keys, in order, and stores them.
template <class T>
void merge_item(const GradientPlan& g, int64_t i) {
  const GradientItem item = item_at(g, i);
  if (!item.partial || (i - sequence_at(g.p, i, &Sequence::item0).item0) % item.sequence.splits) return;
  const int64_t count = key_bytes(g, item.sequence.S) / g.p.real;
  T* sums = reinterpret_cast<T*>(item.partial);
  for (int64_t share = 1; share < item.sequence.splits; ++share) {
    const T* more = reinterpret_cast<const T*>(item.partial + share * g.partial_bytes);
    for (int64_t f = 0; f < count; ++f) sums[f] += more[f];
  }
  g.p.isa->store_key_gradients[g.p.call.dtype](g, item, item.partial);
}

template <class T>
int merge_items(const GradientPlan& g, int64_t workers) {
  if (g.p.paged())
    return run_tasks(g.p.call, g.p.call.Hkv, workers, [&](int64_t head, int64_t) { add_to_pages<T>(g, head); });
  return run_tasks(g.p.call, g.items, workers, [&](int64_t i, int64_t) { merge_item<T>(g, i); });
}

void merge_sums(const GradientPlan& g) {
  if (g.copies < 2) return;
  for (int64_t i = 0; i < g.g.sum_count; ++i)
    for (int64_t copy = 0; copy < g.copies; ++copy) g.g.sums[i] += g.copy_sums[copy * g.g.sum_count + i];
}

}  // namespace

Item tile_item(const GradientPlan& g, const GradientItem& item, int64_t tile) {
  const Sequence& s = item.sequence;
  Item it;
  it.sequence = s;
  it.b = s.b, it.kv_head = item.kv_head;
  it.row0 = tile * g.p.tile_rows;
  it.rows = std::min(g.p.tile_rows, s.L * g.p.group - it.row0);
  it.key0 = 0, it.key1 = s.S;
  it.partial = nullptr;
  return it;
}

int64_t make_gradient_plan(const thal_attention& call, const thal_gradients& gradients, GradientPlan& g) {
  if (call.struct_size != sizeof(thal_attention)) return -THAL_BAD_STRUCT;
  if (const int code = check(call, gradients)) return -code;
  g.g = gradients;
  g.p.whole_rows = true;
  if (const int64_t needed = make_plan(call, g.p); needed < 0) return needed;
  if (const int code = decode_gradient(g)) return -code;
  if (gradients.mask_sum >= 0 && !mask_sum_fits(g)) return -THAL_BAD_SIZE;
  g.key_width = chunked_columns(call.E, g.p.lanes), g.value_width = chunked_columns(call.Ev, g.p.lanes);
  number_items(g);
  group_items(g);
  set_scratch(g);
  return 64 + workers_of(g) * g.scratch_bytes + g.partial_count * g.partial_bytes + copy_doubles(g) * 8;
}

int run_gradient_plan(GradientPlan& g, void* workspace) {
  if (pointers_missing(g)) return THAL_BAD_POINTER;
  if (g.items && !workspace) return THAL_BAD_WORKSPACE;
  if (g.sums() && g.g.sum_count) std::fill(g.g.sums, g.g.sums + g.g.sum_count, 0.0);
  if (g.items == 0) return THAL_OK;
  char* scratch = aligned(workspace);
  const int64_t reserved = workers_of(g), workers = work_of(g.p) < kSerialWork ? 1 : reserved;
  g.copy_sums = reinterpret_cast<double*>(scratch + reserved * g.scratch_bytes);
  g.partials = reinterpret_cast<char*>(g.copy_sums + copy_doubles(g));
  std::fill(g.copy_sums, g.copy_sums + copy_doubles(g), 0.0);
  const Isa& isa = *g.p.isa;
  const auto run = [&](int64_t i, int64_t worker) { run_group(g, isa, i, scratch + worker * g.scratch_bytes); };
  if (const int code = run_tasks(g.p.call, g.groups, workers, run)) return code;
  merge_sums(g);
  if (!g.partial_count) return THAL_OK;
  return g.p.real == 8 ? merge_items<double>(g, workers) : merge_items<float>(g, workers);
}

}  // namespace thal

namespace {

template <class F>
int guarded(const thal_attention* call, const thal_gradients* gradients, F f) {
  if (!call || !gradients) return THAL_BAD_POINTER;
  try {
    thal::GradientPlan plan;
    const int64_t needed = thal::make_gradient_plan(*call, *gradients, plan);
    return needed < 0 ? static_cast<int>(-needed) : f(plan, needed);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}

}  // namespace

extern "C" int64_t thal_gradients_workspace(const thal_attention* call, const thal_gradients* gradients) {
  int64_t found = 0;
  const int code = guarded(call, gradients, [&found](thal::GradientPlan&, int64_t needed) {
    found = needed;
    return THAL_OK;
  });
  return code ? -code : found;
}

extern "C" int thal_gradients_run(const thal_attention* call, const thal_gradients* gradients) {
  return guarded(call, gradients, [call](thal::GradientPlan& plan, int64_t needed) {
    return thal::run_gradient_plan(plan, call->workspace_size < needed ? nullptr : call->workspace);
  });
}
