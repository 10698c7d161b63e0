// The dispatcher operator torchhal_cpu_x86::foreach: a prepared function over lists of tensors that are plain memory, of one
// shape at each position, with nothing but the results written and no memory shared with them.
//
// Whether they are so is seen here, in a tenth of the time that Python takes; where they are not, nothing is written, and
// the caller, who gets False, looks closer.
#include <xmmintrin.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "map.hpp"
#include "torch_call.hpp"

namespace thal {
namespace {

class Foreach : TorchCall {
  enum { kTensors, kNumbers, kProgram };

  List tensors_, numbers_, made_ = nullptr;
  std::shared_ptr<MapProgram> program_;
  std::vector<Tensor> handles_;
  std::vector<int64_t> starts_;  // in `handles_`, of each input that is tensors and of each given output
  std::vector<double> values_;
  int64_t positions_ = 0;
  std::vector<int64_t> counts_;
  std::vector<const void*> data_;
  std::vector<void*> out_;

 public:
  explicit Foreach(uint64_t* stack)
      : TorchCall(stack, "foreach"), tensors_(reinterpret_cast<List>(stack[kTensors])),
        numbers_(reinterpret_cast<List>(stack[kNumbers])), program_(find_map_program(static_cast<int64_t>(stack[kProgram]))) {}

  void run() {
    bool ok = false, served = false;
    try {
      ok = open() && (!(served = fits()) || (make_results() && compute()));
    } catch (const std::bad_alloc&) {
      fail("no memory");
    }
    for (Tensor t : handles_) torch.release(t);
    torch.release_list(tensors_);
    torch.release_list(numbers_);
    if (!ok) {
      if (made_) torch.release_list(made_);
      torch.check(false, "foreach", "torchhal_cpu_x86", 0, message_);
      return;
    }
    stack_[0] = reinterpret_cast<uint64_t>(made_);
    stack_[1] = served;
  }

 private:
  static int64_t threads() {
    uint32_t count = 1;
    torch.num_threads(&count);
    return std::max(count, 1u);
  }

  bool open() {
    size_t tensors = 0, numbers = 0;
    if (!program_) return fail("program is none that was prepared");
    if (torch.list_size(tensors_, &tensors) || torch.list_size(numbers_, &numbers)) return fail("lists cannot be read");
    if (!divide(static_cast<int64_t>(tensors), static_cast<int64_t>(numbers)))
      return fail("%lld tensors and %lld numbers are not what the program takes", static_cast<long long>(tensors),
                  static_cast<long long>(numbers));
    handles_.reserve(tensors);
    for (size_t i = 0; i < tensors; ++i) {
      uint64_t item = 0;
      if (torch.list_item(tensors_, i, &item)) return fail("tensors cannot be read");
      handles_.push_back(reinterpret_cast<Tensor>(item));
    }
    values_.resize(numbers);
    for (size_t i = 0; i < numbers; ++i) {
      uint64_t item = 0;
      if (torch.list_item(numbers_, i, &item)) return fail("numbers cannot be read");
      std::memcpy(&values_[i], &item, sizeof(item));
    }
    return torch.new_list(0, &made_) == 0 || fail("no memory");
  }

  // How many positions there are, and where each list begins.
  bool divide(int64_t tensors, int64_t numbers) {
    int64_t lists = 0, single = 0, number_lists = 0, single_numbers = 0;
    for (int32_t kind : program_->kinds) {
      lists += kind == THAL_LIST, single += kind == THAL_SHARED;
      number_lists += kind == THAL_NUMBERS, single_numbers += kind == THAL_NUMBER;
    }
    lists += std::count(program_->targets.begin(), program_->targets.end(), THAL_GIVEN);
    if (!lists || tensors < single || (tensors - single) % lists) return false;
    positions_ = (tensors - single) / lists;
    if (numbers != single_numbers + number_lists * positions_) return false;
    int64_t at = 0;
    for (int32_t kind : program_->kinds) {
      if (kind != THAL_LIST && kind != THAL_SHARED) continue;
      starts_.push_back(at);
      at += kind == THAL_LIST ? positions_ : 1;
    }
    for (int32_t target : program_->targets) {
      if (target != THAL_GIVEN) continue;
      starts_.push_back(at);
      at += positions_;
    }
    return true;
  }

  // ------------------------------------------------------------------------ whether the tensors are of the plain kind

  bool fits() {
    if (!positions_) return false;
    counts_.resize(static_cast<size_t>(positions_));
    data_.resize(program_->kinds.size() * static_cast<size_t>(positions_));
    out_.resize(program_->targets.size() * static_cast<size_t>(positions_));
    return read_inputs() && place_outputs() && nothing_overlaps();
  }

  bool read_inputs() {
    const Tensor* like = nullptr;
    size_t list = 0;
    const double* number = values_.data();
    for (size_t i = 0; i < program_->kinds.size(); ++i) {
      const void** data = data_.data() + i * static_cast<size_t>(positions_);
      const Type type = program_->program.inputs[i];
      if (program_->kinds[i] == THAL_LIST) {
        const Tensor* items = handles_.data() + starts_[list++];
        if (!read_list(items, like, type, const_cast<void**>(data))) return false;
        if (!like) like = items;
      } else if (program_->kinds[i] == THAL_SHARED) {
        int64_t dim = -1;
        void* found = nullptr;
        const Tensor tensor = handles_[static_cast<size_t>(starts_[list++])];
        if (!read_plain(tensor, type, found) || torch.dim(tensor, &dim) || dim) return false;
        std::fill(data, data + positions_, found);
      } else {
        for (int64_t p = 0; p < positions_; ++p) data[p] = program_->kinds[i] == THAL_NUMBER ? number : number + p;
        number += program_->kinds[i] == THAL_NUMBER ? 1 : positions_;
      }
    }
    return true;
  }

  // Tensors with dimensions, of the shapes of those of `like`.
  bool read_list(const Tensor* items, const Tensor* like, Type type, void** data) {
    for (int64_t p = 0; p < positions_; ++p) {
      expect(items, p);
      int64_t dim = 0, *sizes = nullptr;
      if (!read_plain(items[p], type, data[p]) || torch.dim(items[p], &dim) || !dim || torch.sizes(items[p], &sizes)) return false;
      int64_t& count = counts_[static_cast<size_t>(p)];
      if (like) {
        int64_t other = 0, *wanted = nullptr;
        if (torch.dim(like[p], &other) || other != dim || torch.sizes(like[p], &wanted)) return false;
        if (!std::equal(sizes, sizes + dim, wanted)) return false;
      } else {
        count = 1;
        for (int64_t d = 0; d < dim; ++d) count *= sizes[d];
      }
      if (!data[p] && count) return false;
    }
    return true;
  }

  // Fetches what torch will read of tensors that come soon, which in a training step has long left the caches: a handle
  // points to a tensor, which begins with a pointer to what it is, where the third word points to its memory. Were that
  // otherwise, lines that nobody needs would be fetched, and nothing else would happen.
  void expect(const Tensor* items, int64_t p) const {
    constexpr int64_t kSoon = 8;
    const auto first_word = [](const void* memory) { return *static_cast<const char* const*>(memory); };
    if (p + 2 * kSoon < positions_) {
      const char* tensor = first_word(items[p + 2 * kSoon]);
      for (int line = 0; line < 3; ++line) _mm_prefetch(tensor + 64 * line, _MM_HINT_T0);
    }
    if (p + kSoon < positions_) _mm_prefetch(first_word(first_word(items[p + kSoon]) + 16), _MM_HINT_T0);
  }

  // Reading is left to one thread: two take turns at torch's counts of references, and longer (1.6 ms for 4000 tensors
  // instead of 0.85). torch calls this kernel where all tensors are dense ones on the CPU, and the declining ones elsewhere.
  static bool read_plain(Tensor tensor, Type type, void*& data) {
    int32_t dtype = -1;
    bool contiguous = false;
    return !torch.dtype(tensor, &dtype) && dtype == dtype_of(type) && !torch.is_contiguous(tensor, &contiguous) && contiguous &&
           !torch.data(tensor, &data);
  }

  static int32_t dtype_of(Type type) {
    switch (type) {
      case Type::kF64:
        return torch.float64();
      case Type::kF32:
        return torch.float32();
      case Type::kBF16:
        return torch.bfloat16();
      case Type::kF16:
        return torch.float16();
      case Type::kI64:
        return torch.int64();
      case Type::kI32:
        return torch.int32();
      case Type::kI16:
        return torch.int16();
      case Type::kI8:
        return torch.int8();
      case Type::kU8:
        return torch.uint8();
      default:
        return torch.boolean();
    }
  }

  Type result_type(size_t i) const { return program_->program.results[i].type; }
  const Tensor* first_list() const {
    size_t list = 0;
    for (int32_t kind : program_->kinds) {
      if (kind == THAL_LIST) return handles_.data() + starts_[list];
      list += kind == THAL_SHARED;
    }
    return nullptr;
  }

  bool place_outputs() {
    size_t given = starts_.size() - static_cast<size_t>(std::count(program_->targets.begin(), program_->targets.end(), THAL_GIVEN));
    for (size_t i = 0; i < program_->targets.size(); ++i) {
      const int32_t target = program_->targets[i];
      void** out = out_.data() + i * static_cast<size_t>(positions_);
      if (target == THAL_GIVEN && !read_list(handles_.data() + starts_[given++], first_list(), result_type(i), out)) return false;
      if (target < 0) continue;
      if (program_->program.inputs[static_cast<size_t>(target)] != result_type(i)) return false;
      const void* const* from = data_.data() + static_cast<size_t>(target) * static_cast<size_t>(positions_);
      for (int64_t p = 0; p < positions_; ++p) out[p] = const_cast<void*>(from[p]);
    }
    return true;
  }

  // Whether no tensor that is written shares memory with any other. One list may be written over and read from.
  bool nothing_overlaps() {
    if (std::all_of(program_->targets.begin(), program_->targets.end(), [](int32_t t) { return t == THAL_NEW; })) return true;
    std::lock_guard<std::mutex> hold(program_->mutex);
    std::vector<const void*> memory(data_);
    for (size_t i = 0; i < program_->targets.size(); ++i)
      if (program_->targets[i] == THAL_GIVEN) memory.insert(memory.end(), row(i), row(i) + positions_);
    // Numbers have no memory of the caller's, and their addresses are others in each call.
    for (size_t i = 0; i < program_->kinds.size(); ++i)
      if (program_->kinds[i] >= THAL_NUMBER) std::fill_n(memory.begin() + static_cast<int64_t>(i) * positions_, positions_, nullptr);
    if (memory == program_->disjoint && counts_ == program_->disjoint_counts) return true;
    if (!disjoint()) return false;
    program_->disjoint = std::move(memory), program_->disjoint_counts = counts_;
    return true;
  }

  void** row(size_t i) { return out_.data() + i * static_cast<size_t>(positions_); }

  struct Extent {
    const char *begin, *end;
  };

  bool disjoint() const {
    std::vector<Extent> all;
    const auto add = [&](const void* memory, int64_t count, Type type) {
      const auto* begin = static_cast<const char*>(memory);
      if (count) all.push_back({begin, begin + count * storage_of(type)});
    };
    for (size_t i = 0; i < program_->kinds.size(); ++i) {
      const void* const* items = data_.data() + i * static_cast<size_t>(positions_);
      if (program_->kinds[i] == THAL_SHARED) add(items[0], 1, program_->program.inputs[i]);
      if (program_->kinds[i] != THAL_LIST) continue;
      for (int64_t p = 0; p < positions_; ++p) add(items[p], counts_[static_cast<size_t>(p)], program_->program.inputs[i]);
    }
    for (size_t i = 0; i < program_->targets.size(); ++i) {
      void* const* items = out_.data() + i * static_cast<size_t>(positions_);
      if (program_->targets[i] == THAL_GIVEN)
        for (int64_t p = 0; p < positions_; ++p) add(items[p], counts_[static_cast<size_t>(p)], result_type(i));
      // Two outputs over one input.
      for (size_t j = 0; j < i; ++j)
        if (program_->targets[i] >= 0 && program_->targets[i] == program_->targets[j]) return false;
    }
    std::sort(all.begin(), all.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    for (size_t i = 1; i < all.size(); ++i)
      if (all[i].begin < all[i - 1].end) return false;
    return true;
  }

  // ------------------------------------------------------------------------ results

  // One element of 8 bytes at each position, for each output.
  bool make_reduced() {
    const int64_t one = 1;
    for (size_t i = 0; i < program_->targets.size(); ++i) {
      Tensor made = nullptr;
      void* data = nullptr;
      const int32_t dtype = reduces_to_whole(program_->reduction, result_type(i)) ? torch.int64() : torch.float64();
      if (torch.empty(1, &positions_, &one, dtype, torch.cpu(), 0, &made) || torch.data(made, &data)) return fail("no memory for results");
      if (torch.list_append(made_, reinterpret_cast<uint64_t>(made))) return fail("no memory for results");
      for (int64_t p = 0; p < positions_; ++p) row(i)[p] = static_cast<char*>(data) + 8 * p;
    }
    return true;
  }

  bool make_results() {
    if (program_->reduction) return make_reduced();
    const Tensor* like = first_list();
    for (size_t i = 0; i < program_->targets.size(); ++i) {
      if (program_->targets[i] != THAL_NEW) continue;
      for (int64_t p = 0; p < positions_; ++p) {
        int64_t dim = 0, *sizes = nullptr, *strides = nullptr;
        Tensor made = nullptr;
        torch.dim(like[p], &dim), torch.sizes(like[p], &sizes), torch.strides(like[p], &strides);
        if (torch.empty(dim, sizes, strides, dtype_of(result_type(i)), torch.cpu(), 0, &made)) return fail("no memory for results");
        if (torch.data(made, row(i) + p)) return fail("no memory for results");
        if (torch.list_append(made_, reinterpret_cast<uint64_t>(made))) return fail("no memory for results");
      }
    }
    return true;
  }

  bool compute() {
    thal_map map = {};
    map.struct_size = sizeof(map), map.positions = positions_, map.counts = counts_.data();
    map.data = data_.data(), map.out = out_.data();
    map.num_threads = is_forked() ? 1 : static_cast<int32_t>(threads()), map.parallel = thal_torch_parallel;
    MapPlan plan;
    int code = lay_out_map(map, *program_, plan);
    if (!code) code = run_map_plan(plan);
    if (code) return fail("%s", thal_error_text(code));
    note_writes();
    return true;
  }

  // So that autograd sees that what it has saved was overwritten.
  void note_writes() {
    if (!torch.bump_version) return;
    size_t given = starts_.size() - static_cast<size_t>(std::count(program_->targets.begin(), program_->targets.end(), THAL_GIVEN));
    for (int32_t target : program_->targets) {
      if (target == THAL_NEW) continue;
      size_t list = 0;
      for (int32_t i = 0; i < target; ++i) list += program_->kinds[static_cast<size_t>(i)] <= THAL_SHARED;
      const int64_t start = starts_[target == THAL_GIVEN ? given++ : list];
      for (int64_t p = 0; p < positions_; ++p) bump(handles_[static_cast<size_t>(start + p)]);
    }
  }

  // Tensors of inference mode have no version, which torch says by an exception.
  static void bump(Tensor tensor) {
    try {
      torch.bump_version(tensor);
    } catch (...) {
    }
  }
};

}  // namespace

void foreach_kernel(uint64_t* stack, uint64_t, uint64_t) { Foreach(stack).run(); }

// Of tensors that are to be negated, conjugated or are zero without memory: they are not plain.
void foreach_declined(uint64_t* stack, uint64_t, uint64_t) {
  torch.release_list(reinterpret_cast<List>(stack[0]));
  torch.release_list(reinterpret_cast<List>(stack[1]));
  List none = nullptr;
  torch.new_list(0, &none);
  stack[0] = reinterpret_cast<uint64_t>(none), stack[1] = 0;
}

}  // namespace thal
