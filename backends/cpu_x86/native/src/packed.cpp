// Checks packed weights, and lays out and runs products of few rows with them.
#include "packed.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "tasks.hpp"

namespace thal {
namespace {

// Columns of a tile of a weight in rows. Wider than most: shares of K are then pieces of memory that are read from end to end.
constexpr int64_t kRowColumns = 4096;
// Parts of a product, unless it has more tiles: enough to share out evenly among a few threads.
constexpr int64_t kParts = 8;
// The least of K in a part, and of columns in a tile.
constexpr int64_t kLeastDepth = 256, kLeastColumns = 16;
// Elements that rows of a are padded to, a block.
constexpr int64_t kPitchStep = 32;
// Multiply-adds below which one thread does it all: waking another takes as long.
constexpr double kAloneMost = 1e5;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Whether rows of a can be read where they are.
bool reads_in_place(const MatmulPlan& p) {
  const thal_matmul& c = p.call;
  const bool halves = c.packed->scheme == THAL_PACKED_I4;
  return c.a_type == THAL_F32 && c.a_stride[1] == 1 && !c.a_prologue && !(halves && c.K % 2);
}

int64_t pitch_of(const MatmulPlan& p) { return reads_in_place(p) ? p.call.a_stride[0] : round_up(p.call.K, kPitchStep); }

class Run {
  const MatmulPlan& p_;
  const int64_t pitch_;
  std::unique_ptr<char, decltype(&std::free)> memory_;
  float *rows_, *partials_;
  char* scratch_;

 public:
  explicit Run(const MatmulPlan& p) : p_(p), pitch_(pitch_of(p)), memory_(nullptr, &std::free) {
    Scratch layout;
    const int64_t at_rows = layout.take(reads_in_place(p) ? 0 : 4 * p.call.M * pitch_);
    const int64_t at_partials = layout.take(p.splits > 1 ? 4 * p.column_tiles * p.splits * partial() : 0);
    const int64_t at_scratch = layout.take(p.workers * p.scratch_bytes);
    memory_.reset(static_cast<char*>(std::malloc(static_cast<size_t>(layout.at + 64))));
    if (!memory_) throw std::bad_alloc();
    char* base = aligned(memory_.get());
    rows_ = reinterpret_cast<float*>(base + at_rows), partials_ = reinterpret_cast<float*>(base + at_partials);
    scratch_ = base + at_scratch;
  }

  int batch(int64_t b) const {
    const float* rows = rows_;
    if (reads_in_place(p_)) rows = static_cast<const float*>(p_.call.a) + batch_offset(p_.call, p_.call.a_batch_stride, b);
    else p_.isa->skinny.pack_rows(p_, b, rows_, pitch_, scratch_);
    if (p_.splits == 1) {
      return tasks(p_.column_tiles, [&](int64_t i, char* scratch) {
        float* tile = reinterpret_cast<float*>(scratch + p_.at_tile);
        sum(rows, i, 0, tile, scratch);
        finish(b, i, tile, scratch);
      });
    }
    const int code = tasks(p_.column_tiles * p_.splits, [&](int64_t i, char* scratch) {
      sum(rows, i / p_.splits, i % p_.splits, partials_ + i * partial(), scratch);
    });
    if (code) return code;
    return tasks(p_.column_tiles, [&](int64_t i, char* scratch) {
      float* tile = partials_ + i * p_.splits * partial();
      for (int64_t s = 1; s < p_.splits; ++s)
        for (int64_t j = 0; j < partial(); ++j) tile[j] += tile[s * partial() + j];
      finish(b, i, tile, scratch);
    });
  }

 private:
  int64_t partial() const { return p_.call.M * p_.tile_stride(); }
  int64_t columns_of(int64_t tile) const { return std::min(p_.columns, p_.call.N - tile * p_.columns); }

  template <class F>
  int tasks(int64_t count, F f) const {
    return run_tasks(p_.call.parallel, p_.call.parallel_user, count, p_.workers,
                     [&](int64_t i, int64_t worker) { f(i, scratch_ + worker * p_.scratch_bytes); });
  }

  void sum(const float* rows, int64_t tile, int64_t split, float* sums, char* scratch) const {
    const int64_t k0 = split * p_.split_depth;
    p_.isa->skinny.sum_part(
        p_, {rows, pitch_, tile * p_.columns, columns_of(tile), k0, std::min(p_.split_depth, p_.call.K - k0), sums}, scratch);
  }

  void finish(int64_t b, int64_t tile, float* sums, char* scratch) const {
    p_.isa->skinny.finish(p_, {b, 0, p_.call.M, tile * p_.columns, columns_of(tile), nullptr, nullptr}, sums, scratch);
  }
};

}  // namespace

int check_packed(const thal_matmul& c) {
  if (!c.packed) return THAL_OK;
  const thal_packed& w = *c.packed;
  if (w.scheme < 0 || w.scheme >= THAL_PACKED_SCHEMES) return THAL_BAD_DTYPE;
  if (w.rows != (w.transposed ? c.N : c.K) || w.columns != (w.transposed ? c.K : c.N)) return THAL_BAD_SIZE;
  if (is_blocks(w.scheme) ? w.rows % kBlockElements != 0 : w.group < 1) return THAL_BAD_SIZE;
  if (w.rows && w.columns && (!w.data || (!is_blocks(w.scheme) && !w.scale))) return THAL_BAD_POINTER;
  return THAL_OK;
}

bool is_skinny(const MatmulPlan& p) {
  const thal_matmul& c = p.call;
  if (!c.packed || c.packed->transposed || c.b_prologue || p.real == 8 || c.M > kSkinnyRows || c.K == 0) return false;
  // Two rows of int4 share their bytes, and have to share their scale.
  return c.packed->scheme != THAL_PACKED_I4 || c.packed->group % 2 == 0 || c.packed->group >= c.K;
}

void plan_skinny(MatmulPlan& p) {
  const thal_matmul& c = p.call;
  int64_t tiles = ceil_div(c.N, kRowColumns);
  if (is_blocks(c.packed->scheme)) tiles = std::max<int64_t>(1, std::min(kParts, c.N / kLeastColumns));
  else if (c.K < kLeastDepth * kParts / 2) tiles = std::max(tiles, std::min(kParts / 2, c.N / kLeastColumns));
  tiles = std::max<int64_t>(tiles, 1);
  p.rows = c.M, p.row_tiles = 1, p.share_left = p.share_right = false;
  p.columns = round_up(ceil_div(c.N, tiles), kLanes);
  p.column_tiles = ceil_div(c.N, p.columns);
  p.splits = std::max<int64_t>(1, std::min(kParts / 2 / p.column_tiles, c.K / kLeastDepth));
  p.split_depth = round_up(ceil_div(c.K, p.splits), kLeastDepth / 2);
  p.splits = ceil_div(c.K, p.split_depth);
  const bool alone = static_cast<double>(c.M * c.N) * static_cast<double>(c.K) < kAloneMost;
  p.workers = alone ? 1 : std::min<int64_t>(c.num_threads, p.column_tiles * p.splits);
  Scratch layout;
  p.at_tile = layout.take((2 * p.rows + 1) * p.tile_stride() * p.real);  // and the sums and zeros of a group
  p.at_left = layout.take(c.M * kDepthMost * p.real);
  p.at_indices = layout.take(4 * (kRowsMost + 2 * kLanes));
  p.at_program = layout.take(std::max(p.epilogue.bytes, p.a_prologue.bytes));
  p.at_buffer = layout.take(kLanes * kDepthMost * 8);
  p.scratch_bytes = layout.at;
}

int run_skinny(const MatmulPlan& p) {
  const Run run(p);
  for (int64_t b = 0; b < p.call.batches; ++b)
    if (const int code = run.batch(b)) return code;
  return THAL_OK;
}

}  // namespace thal
