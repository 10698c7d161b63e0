// Checks a fused matrix product, lays it out and runs it: what tiles share is packed first, then tiles are computed.
#include "matmul.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "map.hpp"
#include "packed.hpp"
#include "tasks.hpp"

namespace thal {
namespace {

constexpr int32_t kBatchDimsMost = 64;
// A tile is at most so large: 288 rows and 256 columns of float32 sums are 290 KB, as is a block of a, in an L2 cache of 1 MB.
// At 512 to 2048 cubed that was up to 5 % faster than half the height or twice the width.
constexpr int64_t kTilePanels = 24, kTileColumnBytes = 1024;
// Packing an operand once instead of in every tile saves this many elements, or is not worth a parallel region of its own.
constexpr double kSharedSaving = 40000;
// Below this many multiply-adds (about 10 us on one core) waking other threads costs more than it brings.
constexpr double kSerialProducts = 1e6;
// Reading an element of b takes about as long as multiplying it by so many rows.
constexpr double kRowsOfFew = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

bool is_known(int32_t type) { return type >= 0 && type < THAL_DTYPES; }

int check_sizes(const thal_matmul& c) {
  if (c.M < 0 || c.N < 0 || c.K < 0 || c.batches < 0) return THAL_BAD_SIZE;
  // Functions are told indices as int32.
  if (c.M > INT32_MAX || c.N > INT32_MAX || c.K > INT32_MAX || c.batches > INT32_MAX) return THAL_BAD_SIZE;
  if (c.batch_dims < 0 || c.batch_dims > kBatchDimsMost) return THAL_BAD_SIZE;
  if (c.outputs < 1 || (c.outputs > 1 && !c.epilogue)) return THAL_BAD_SIZE;
  if (c.batch_dims && (!c.batch_sizes || !c.a_batch_stride || !c.b_batch_stride)) return THAL_BAD_POINTER;
  int64_t batches = 1;
  for (int32_t d = 0; d < c.batch_dims; ++d) {
    if (c.batch_sizes[d] < 0 || c.batch_sizes[d] > INT32_MAX) return THAL_BAD_SIZE;
    batches *= c.batch_sizes[d];
    if (batches > INT32_MAX) return THAL_BAD_SIZE;
  }
  return batches == c.batches ? THAL_OK : THAL_BAD_SIZE;
}

int check(const thal_matmul& c) {
  if (c.struct_size != sizeof(thal_matmul)) return THAL_BAD_STRUCT;
  if (!is_known(c.a_type) || !is_known(c.b_type) || (c.bias && !is_known(c.bias_type))) return THAL_BAD_DTYPE;
  if (const int code = check_sizes(c)) return code;
  if (c.num_threads < 1 || (c.num_threads > 1 && !c.parallel)) return THAL_BAD_THREADS;
  if (!c.out || !c.out_types) return THAL_BAD_POINTER;
  if (c.M == 0 || c.N == 0 || c.batches == 0) return THAL_OK;
  if (c.K && (!c.a || (!c.b && !c.packed))) return THAL_BAD_POINTER;
  for (int32_t i = 0; i < c.outputs; ++i)
    if (!c.out[i]) return THAL_BAD_POINTER;
  return check_packed(c);
}

// A function of (value) or (value, batch, row, column), with lanes along columns.
int decode_one(const thal_function& f, Type value, Type wanted, Program& program) {
  constexpr Span spans[] = {Span::kBlock, Span::kOne, Span::kRows, Span::kLanes};
  constexpr int64_t kWithIndices = 4;
  const int64_t inputs = f.words && f.count > 1 && f.words[1] == 1 ? 1 : kWithIndices;
  if (const int code = decode(f.words, f.count, spans, inputs, wanted, program)) return code;
  for (int64_t i = 0; i < inputs; ++i)
    if (program.inputs[i] != (i == 0 ? value : Type::kI32)) return THAL_BAD_PROGRAM;
  return fit(program, f.captured, f.captured_count) ? THAL_OK : THAL_BAD_PROGRAM;
}

int decode_epilogue(MatmulPlan& p, Type value) {
  const thal_matmul& c = p.call;
  const int32_t first = c.out_types[0];
  if (first < 0 || first >= static_cast<int32_t>(Type::kTypes)) return THAL_BAD_DTYPE;
  if (!c.epilogue) {
    const auto type = static_cast<Type>(first);
    const bool good = p.real == 8 ? type == Type::kF64 : type == Type::kF32 || type == Type::kBF16 || type == Type::kF16;
    return good ? THAL_OK : THAL_BAD_DTYPE;
  }
  if (const int code = decode_one(*c.epilogue, value, static_cast<Type>(first), p.epilogue)) return code;
  if (static_cast<int64_t>(p.epilogue.results.size()) != c.outputs) return THAL_BAD_PROGRAM;
  for (int32_t i = 0; i < c.outputs; ++i)
    if (static_cast<int32_t>(p.epilogue.results[static_cast<size_t>(i)].type) != c.out_types[i]) return THAL_BAD_DTYPE;
  return THAL_OK;
}

int decode_functions(MatmulPlan& p) {
  const thal_matmul& c = p.call;
  const Type value = p.real == 8 ? Type::kF64 : Type::kF32;
  int code = decode_epilogue(p, value);
  if (!code && c.a_prologue) code = decode_one(*c.a_prologue, value, value, p.a_prologue);
  if (!code && c.b_prologue) code = decode_one(*c.b_prologue, value, value, p.b_prologue);
  return code;
}

double element(int32_t type, const void* data, int64_t i) {
  if (type == THAL_F64) return static_cast<const double*>(data)[i];
  if (type == THAL_F32) return static_cast<double>(static_cast<const float*>(data)[i]);
  const uint32_t half = static_cast<const uint16_t*>(data)[i];
  uint32_t bits = half << 16;
  if (type == THAL_F16) {
    // The exponent's bias is 112 more, which a product with 2^112 gives to subnormal numbers too.
    bits = (half & 0x7fff) << 13;
    float x;
    if ((half & 0x7c00) == 0x7c00) bits |= 0x7f800000;
    std::memcpy(&x, &bits, 4);
    if ((half & 0x7c00) != 0x7c00) x *= 5192296858534827628530496329220096.0f;
    return static_cast<double>(half & 0x8000 ? -x : x);
  }
  float x;
  std::memcpy(&x, &bits, 4);
  return static_cast<double>(x);
}

void widen_bias(MatmulPlan& p) {
  const thal_matmul& c = p.call;
  if (!c.bias) return;
  p.bias.resize(static_cast<size_t>(c.N * p.real));
  for (int64_t n = 0; n < c.N; ++n) {
    const double x = element(c.bias_type, c.bias, n * c.bias_stride);
    if (p.real == 8) reinterpret_cast<double*>(p.bias.data())[n] = x;
    else reinterpret_cast<float*>(p.bias.data())[n] = static_cast<float>(x);
  }
}

// The largest tiles that give every thread some; of equal size, as far as panels allow.
void set_tiles(MatmulPlan& p) {
  const thal_matmul& c = p.call;
  const int64_t panel_rows = p.kernels->panel_rows, panel_columns = p.kernels->panel_columns;
  const auto even = [](int64_t all, int64_t most, int64_t step) { return round_up(ceil_div(all, ceil_div(all, most)), step); };
  p.rows = even(c.M, kTilePanels * panel_rows, panel_rows);
  p.columns = even(c.N, kTileColumnBytes / p.real, panel_columns);
  const int64_t depth = kDepthMost * p.step;
  p.depth = c.K ? std::min(depth, even(c.K, depth, 32)) : depth;
  const double rows = p.few_rows ? kRowsOfFew : static_cast<double>(c.M);
  const double inner = static_cast<double>(std::max<int64_t>(c.K, 1));
  const double products = rows * static_cast<double>(c.N) * inner * static_cast<double>(c.batches);
  const int64_t threads = products < kSerialProducts ? 1 : c.num_threads;
  const auto tiles = [&] { return ceil_div(c.M, p.rows) * ceil_div(c.N, p.columns) * c.batches; };
  while (threads > 1 && tiles() < 2 * threads) {
    const bool wide = p.columns > panel_columns, high = p.rows > panel_rows;
    if (wide && (p.columns >= p.rows || !high)) p.columns = round_up(p.columns / 2, panel_columns);
    else if (high) p.rows = round_up(p.rows / 2, panel_rows);
    else break;
  }
  p.row_tiles = ceil_div(c.M, p.rows), p.column_tiles = ceil_div(c.N, p.columns);
  p.workers = std::max<int64_t>(1, std::min(threads, tiles()));
}

void set_shared(MatmulPlan& p) {
  const thal_matmul& c = p.call;
  const int64_t left = p.rows * p.words(c.K) * p.real, right = p.columns * p.words(c.K) * p.real;
  // Elements that tiles would pack again.
  const double again_left = static_cast<double>(c.M * c.K) * static_cast<double>(p.column_tiles - 1);
  const double again_right = static_cast<double>(c.N * c.K) * static_cast<double>(p.row_tiles - 1);
  p.share_left = !p.few_rows && again_left > (c.a_prologue ? 0 : kSharedSaving) && left <= kSharedLeftBytes;
  p.share_right = !p.few_rows && again_right > (c.b_prologue ? 0 : kSharedSaving) && right <= kSharedRightBytes;
  p.group_rows = p.share_left ? std::min(p.row_tiles, kSharedLeftBytes / left) : p.row_tiles;
  p.group_columns = p.share_right ? std::min(p.column_tiles, kSharedRightBytes / right) : p.column_tiles;
}

void set_scratch(MatmulPlan& p) {
  // What a prologue works on: up to kChunk rows of a, or the columns of a panel of b.
  const int64_t block = std::max({kChunk, 4 * p.kernels->panel_rows, p.kernels->panel_columns, kLanes}) * kDepthMost;
  Scratch layout;
  p.at_tile = layout.take(p.rows * p.tile_stride() * p.real);
  const int64_t left = p.few_rows ? p.call.M * round_up(p.call.K, kLanes) : p.rows * p.words(p.depth);
  p.at_left = layout.take(p.share_left ? 0 : left * p.real);
  p.at_right = layout.take(p.share_right || p.few_rows ? 0 : p.columns * p.words(p.depth) * p.real);
  p.at_block = layout.take(p.call.a_prologue || p.call.b_prologue ? block * p.real : 0);
  p.at_indices = layout.take(4 * (kChunk + kLanes));
  p.at_program = layout.take(std::max(p.epilogue.bytes, std::max(p.a_prologue.bytes, p.b_prologue.bytes)));
  p.at_buffer = layout.take(std::max<int64_t>(p.source.buffer_bytes, kLanes * kDepthMost * 8));
  p.scratch_bytes = layout.at;
}

int make_matmul_plan(const thal_matmul& call, MatmulPlan& p) {
  if (const int code = check(call)) return code;
  p.call = call;
  p.real = call.a_type == THAL_F64 || call.b_type == THAL_F64 ? 8 : 4;
  const bool bf16 = call.a_type == THAL_BF16 && call.b_type == THAL_BF16 && !call.a_prologue && !call.b_prologue && call.b;
  p.isa = find_isa(call.isa == THAL_ISA_AUTO ? thal_get_isa(p.real == 8 ? THAL_F64 : bf16 ? THAL_BF16 : THAL_F32) : call.isa);
  if (!p.isa) return THAL_BAD_ISA;
  // The set that is chosen for bf16 multiplies pairs only where that was measured to be the faster way.
  const bool pairs = bf16 && p.isa->bf16_pairs;
  p.kernels = &p.isa->matmul[pairs ? 2 : p.real == 8];
  p.step = pairs ? 2 : 1;
  const bool readable = call.b && !call.b_prologue && (call.b_stride[0] == 1 || call.b_stride[1] == 1);
  p.few_rows = call.M <= kFewRows && call.K > 0 && readable;
  if (const int code = decode_functions(p)) return code;
  p.source = p.kernels->source(p);
  if (call.M == 0 || call.N == 0 || call.batches == 0) return THAL_OK;
  widen_bias(p);
  set_tiles(p);
  if (is_skinny(p)) {
    plan_skinny(p);
    return THAL_OK;
  }
  set_shared(p);
  set_scratch(p);
  return THAL_OK;
}

// Everything a running call needs, allocated once.
class Run {
  const MatmulPlan& p_;
  std::unique_ptr<char, decltype(&std::free)> memory_;
  char *left_, *right_, *scratch_;

 public:
  explicit Run(const MatmulPlan& p) : p_(p), memory_(nullptr, &std::free) {
    Scratch layout;
    const int64_t bytes = p.words(p.call.K) * p.real;
    const int64_t at_left = layout.take(p.share_left ? p.group_rows * p.rows * bytes : 0);
    const int64_t at_right = layout.take(p.share_right ? p.group_columns * p.columns * bytes : 0);
    const int64_t at_scratch = layout.take(p.workers * p.scratch_bytes);
    memory_.reset(static_cast<char*>(std::malloc(static_cast<size_t>(layout.at + 64))));
    if (!memory_) throw std::bad_alloc();
    char* base = aligned(memory_.get());
    left_ = base + at_left, right_ = base + at_right, scratch_ = base + at_scratch;
  }

  int all() const {
    if (!p_.share_left && !p_.share_right) return tiles(0, p_.call.batches, 0, p_.row_tiles, 0, p_.column_tiles);
    for (int64_t batch = 0; batch < p_.call.batches; ++batch)
      for (int64_t column = 0; column < p_.column_tiles; column += p_.group_columns) {
        const int64_t columns = std::min(p_.group_columns, p_.column_tiles - column);
        for (int64_t row = 0; row < p_.row_tiles; row += p_.group_rows) {
          const int64_t rows = std::min(p_.group_rows, p_.row_tiles - row);
          const MatmulKernels& kernels = *p_.kernels;
          // What is still there from the part before is not packed again.
          const int64_t lefts = p_.share_left && (column == 0 || p_.group_rows < p_.row_tiles) ? rows : 0;
          const int64_t rights = p_.share_right && row == 0 ? columns : 0;
          const Shared left{row, lefts, p_.rows, p_.call.M, kernels.panel_rows, left_, kernels.pack_left};
          const Shared right{column, rights, p_.columns, p_.call.N, kernels.panel_columns / 2, right_, kernels.pack_right};
          if (const int code = pack(batch, left, right)) return code;
          if (const int code = tiles(batch, 1, row, rows, column, columns)) return code;
        }
      }
    return THAL_OK;
  }

 private:
  // Tiles of an operand that has `all` rows or columns in tiles of `size`, to be packed into shared memory.
  struct Shared {
    int64_t first, count, size, all, step;
    char* memory;
    void (*pack)(const MatmulPlan&, const MatmulBlock&, void*, char*);
  };

  template <class F>
  int tasks(int64_t count, F f) const {
    return run_tasks(p_.call.parallel, p_.call.parallel_user, count, p_.workers,
                     [&](int64_t i, int64_t worker) { f(i, scratch_ + worker * p_.scratch_bytes); });
  }

  char* shared_at(char* memory, int64_t tile, int64_t size) const {
    return memory + tile * size * p_.words(p_.call.K) * p_.real;
  }

  // Both operands in one parallel region, block by block.
  int pack(int64_t batch, const Shared& left, const Shared& right) const {
    if (left.count + right.count == 0) return THAL_OK;
    const int64_t blocks = ceil_div(p_.call.K, p_.depth), lefts = left.count * blocks;
    return tasks(lefts + right.count * blocks, [&](int64_t i, char* scratch) {
      const Shared& s = i < lefts ? left : right;
      const int64_t at = i < lefts ? i : i - lefts, tile = at / blocks, k = at % blocks * p_.depth;
      const int64_t first = (s.first + tile) * s.size, some = std::min(s.size, s.all - first);
      char* to = shared_at(s.memory, tile, s.size) + p_.words(k) * round_up(some, s.step) * p_.real;
      s.pack(p_, {batch, first, some, k, std::min(p_.depth, p_.call.K - k)}, to, scratch);
    });
  }

  int tiles(int64_t batch0, int64_t batches, int64_t row0, int64_t rows, int64_t column0, int64_t columns) const {
    return tasks(batches * rows * columns, [&](int64_t i, char* scratch) {
      // Rows vary fastest: threads get as many of the last, lower tiles, and neighbours read the same columns of b.
      const int64_t row = row0 + i % rows, column = column0 + i / rows % columns, batch = batch0 + i / rows / columns;
      MatmulTile t{batch, row * p_.rows, 0, column * p_.columns, 0, nullptr, nullptr};
      t.rows = std::min(p_.rows, p_.call.M - t.m0), t.columns = std::min(p_.columns, p_.call.N - t.n0);
      if (p_.share_left) t.left = shared_at(left_, row - row0, p_.rows);
      if (p_.share_right) t.right = shared_at(right_, column - column0, p_.columns);
      p_.kernels->run_tile(p_, t, scratch);
    });
  }
};

}  // namespace
}  // namespace thal

extern "C" int thal_matmul_run(const thal_matmul* call) {
  if (!call) return THAL_BAD_POINTER;
  try {
    thal::MatmulPlan plan;
    if (const int code = thal::make_matmul_plan(*call, plan)) return code;
    if (call->M == 0 || call->N == 0 || call->batches == 0) return THAL_OK;
    return thal::is_skinny(plan) ? thal::run_skinny(plan) : thal::Run(plan).all();
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
