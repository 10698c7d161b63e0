// Which sequences a call has, how long they are and where they lie, and the numbering of their items.
#include <algorithm>

#include "plan.hpp"

namespace thal {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool good_starts(const int32_t* starts, int64_t batch, int64_t tokens) {
  if (!starts || starts[0] != 0 || starts[batch] != tokens) return false;
  for (int64_t b = 0; b < batch; ++b)
    if (starts[b] > starts[b + 1]) return false;
  return true;
}

int packed_sequences(Plan& p) {
  const thal_attention& c = p.call;
  const thal_ragged& r = *c.ragged;
  if (!good_starts(r.starts_q, c.B, r.tokens_q) || !good_starts(r.starts_k, c.B, r.tokens_k)) return THAL_BAD_LENGTHS;
  for (int64_t b = 0; b < c.B; ++b) {
    const int64_t q = r.starts_q[b], k = r.starts_k[b];
    Sequence s = sequence_of(c, b);
    s.L = r.starts_q[b + 1] - q, s.S = r.starts_k[b + 1] - k;
    s.q = q * c.q_stride[2], s.out = q * c.out_stride[2], s.lse = q * c.lse_stride[2];
    s.k = k * c.k_stride[2], s.v = k * c.v_stride[2];
    s.first_q = q, s.first_k = k;
    p.ragged.push_back(s);
  }
  return THAL_OK;
}

int paged_sequences(Plan& p) {
  const thal_attention& c = p.call;
  const thal_ragged& r = *c.ragged;
  if (!r.lengths || r.page_size < 1 || r.columns < 0 || r.pages < 0) return THAL_BAD_LENGTHS;
  for (int64_t b = 0; b < c.B; ++b) {
    Sequence s = sequence_of(c, b);
    s.S = r.lengths[b];
    if (s.S < 0 || s.S > r.columns * r.page_size) return THAL_BAD_LENGTHS;
    s.k = s.v = 0, s.first = s.S - c.L;
    const int64_t used = ceil_div(s.S, r.page_size);
    if (used && !r.page_table) return THAL_BAD_POINTER;
    for (int64_t i = 0; i < used; ++i) {
      const int64_t page = r.page_table[b * r.page_table_stride[0] + i * r.page_table_stride[1]];
      if (page < 0 || page >= r.pages) return THAL_BAD_PAGES;
    }
    p.ragged.push_back(s);
  }
  return THAL_OK;
}

bool blocks_cover(const Plan& p) {
  const thal_blocks& m = *p.call.blocks;
  if (m.block_rows < 1 || m.block_keys < 1 || m.most < 0 || m.full_most < 0 || !m.num != !m.indices) return false;
  if ((m.batches != 1 && m.batches < p.call.B) || (m.heads != 1 && m.heads != p.call.Hq)) return false;
  return std::all_of(p.sequences(), p.sequences() + p.sequence_count(),
                     [&](const Sequence& s) { return s.first + s.L <= m.rows * m.block_rows; });
}

}  // namespace

Sequence sequence_of(const thal_attention& c, int64_t b) {
  Sequence s{};
  s.b = b, s.L = c.L, s.S = c.S;
  s.q = b * c.q_stride[0], s.k = b * c.k_stride[0], s.v = b * c.v_stride[0];
  s.out = b * c.out_stride[0], s.lse = b * c.lse_stride[0], s.mask = b * c.mask_stride[0];
  return s;
}

const Sequence& sequence_at(const Plan& p, int64_t index, int64_t Sequence::*first) {
  const Sequence* begin = p.sequences();
  const auto after = std::upper_bound(begin, begin + p.sequence_count(), index,
                                      [&](int64_t i, const Sequence& s) { return i < s.*first; });
  return *(after - 1);
}

int make_sequences(Plan& p) {
  const thal_attention& c = p.call;
  p.ragged.clear();
  int code = THAL_OK;
  if (!c.ragged) {
    p.uniform = sequence_of(c, 0);
  } else {
    p.ragged.reserve(static_cast<size_t>(c.B));
    code = c.ragged->lengths ? paged_sequences(p) : packed_sequences(p);
  }
  if (code) return code;
  p.most_rows = p.most_keys = 0;
  for (int64_t i = 0; i < p.sequence_count(); ++i) {
    const Sequence& s = p.sequences()[i];
    p.most_rows = std::max(p.most_rows, s.L * p.group);
    p.most_keys = std::max(p.most_keys, s.S);
  }
  return c.blocks && !blocks_cover(p) ? THAL_BAD_BLOCKS : THAL_OK;
}

void number_items(Plan& p) {
  const int64_t copies = p.call.ragged ? 1 : p.call.B;
  p.items = p.parts = p.partial_count = 0;
  for (int64_t i = 0; i < p.sequence_count(); ++i) {
    Sequence& s = p.sequences()[i];
    s.tiles = ceil_div(s.L * p.group, p.tile_rows);
    s.splits = std::max<int64_t>(1, ceil_div(s.S, p.split_keys));
    s.item0 = p.items, s.part0 = p.parts, s.partial0 = p.partial_count;
    const int64_t parts = copies * p.call.Hkv * s.tiles;
    p.parts += parts;
    p.items += parts * s.splits;
    p.partial_count += s.splits > 1 ? parts * s.splits : 0;
  }
  p.partial_bytes = p.partial_count ? ceil_div(p.tile_rows * (p.call.Ev + 2), 16) * 16 * p.real : 0;
}

namespace {

// Consecutive items share keys and values. Within a head the last tiles come first: under a causal limit they are the
// heaviest, and whatever a thread starts last should be light.
Item item_of(const Plan& p, const Sequence& s, int64_t index) {
  Item it;
  const int64_t split = index % s.splits, part = index / s.splits, head = part / s.tiles;
  it.sequence = s;
  if (!p.call.ragged) {
    const int64_t b = head / p.call.Hkv;
    const Sequence own = sequence_of(p.call, b);
    it.sequence.b = b, it.sequence.q = own.q, it.sequence.k = own.k, it.sequence.v = own.v;
    it.sequence.out = own.out, it.sequence.lse = own.lse, it.sequence.mask = own.mask;
  }
  it.b = it.sequence.b;
  it.kv_head = head % p.call.Hkv;
  it.row0 = (s.tiles - 1 - part % s.tiles) * p.tile_rows;
  it.rows = std::min(p.tile_rows, s.L * p.group - it.row0);
  it.key0 = split * p.split_keys;
  it.key1 = std::min(s.S, it.key0 + p.split_keys);
  it.partial = s.splits > 1 ? p.partials + (s.partial0 + index) * p.partial_bytes : nullptr;
  return it;
}

}  // namespace

Item item_at(const Plan& p, int64_t index) {
  const Sequence& s = sequence_at(p, index, &Sequence::item0);
  return item_of(p, s, index - s.item0);
}

Item part_at(const Plan& p, int64_t part) {
  const Sequence& s = sequence_at(p, part, &Sequence::part0);
  return item_of(p, s, (part - s.part0) * s.splits);
}

}  // namespace thal
