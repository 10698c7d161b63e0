// A call of attention with all that it is beyond the four plain operators, as the dispatcher hands it over: the first six
// arguments of torchhal_cpu_x86::flex_attention, and of the operators that begin like it.
//
// The description is text, whole numbers with spaces between, which torchhal_cpu_x86/flex.py writes; its operands are
// the tensors beside query, key and value, in the order in which FlexCall::read_operands reads them.
#pragma once

#include <cmath>
#include <cstring>
#include <new>
#include <unordered_map>
#include <vector>

#include "torch_call.hpp"

namespace thal {

enum Layout : int64_t { kDense = 0, kVarlen = 1, kPaged = 2 };

struct Description {
  int64_t layout, is_causal, return_lse, has_mask, has_blocks, has_full_blocks, block_rows, block_keys;
  int64_t score_captured, mask_captured;  // -1: there is no such function
  int64_t dropout;                        // bits of the probability as a double, 0 without dropout
  int64_t quantized;                      // pages alone: stored numbers and their scales
  int64_t return_max_scores;
  std::vector<int64_t> score_words, mask_words;
};

inline bool parse(const char* text, size_t size, Description& d) {
  std::vector<int64_t> words;
  if (!parse_numbers(text, size, words) || words.size() < 15) return false;
  int64_t* const fields[] = {&d.layout,          &d.is_causal,  &d.return_lse, &d.has_mask,       &d.has_blocks,
                             &d.has_full_blocks, &d.block_rows, &d.block_keys, &d.score_captured, &d.mask_captured,
                             &d.dropout,         &d.quantized,  &d.return_max_scores};
  size_t at = 0;
  for (int64_t* field : fields) *field = words[at++];
  for (std::vector<int64_t>* program : {&d.score_words, &d.mask_words}) {
    if (at >= words.size()) return false;
    const int64_t count = words[at++];
    if (count < 0 || static_cast<uint64_t>(count) > words.size() - at) return false;
    program->assign(words.begin() + static_cast<int64_t>(at), words.begin() + static_cast<int64_t>(at) + count);
    at += static_cast<size_t>(count);
  }
  return at == words.size() && d.layout >= kDense && d.layout <= kPaged && d.score_captured >= -1 &&
         d.mask_captured >= -1 && (!d.quantized || d.layout == kPaged);
}

// What this thread has parsed; models make few different calls.
inline const Description* parsed(const char* text, size_t size) {
  static thread_local std::unordered_map<std::string, Description> known;
  std::string key(text, size);
  const auto found = known.find(key);
  if (found != known.end()) return &found->second;
  Description d;
  if (!parse(text, size, d)) return nullptr;
  if (known.size() >= 256) known.clear();
  return &known.emplace(std::move(key), std::move(d)).first->second;
}

class FlexCall : protected TorchCall {
 protected:
  List list_;
  String text_;
  std::vector<Tensor> operands_;
  size_t next_ = 0;
  const Description* d_ = nullptr;
  View query_, key_, value_, mask_;
  thal_attention c_ = {};
  thal_function score_mod_ = {}, mask_mod_ = {};
  std::vector<thal_captured> captured_[2];
  thal_blocks blocks_ = {};
  thal_dropout dropout_ = {};
  thal_ragged ragged_ = {};
  thal_quantized quantized_ = {};

  FlexCall(uint64_t* stack, const char* name)
      : TorchCall(stack, name), list_(reinterpret_cast<List>(stack[3])), text_(reinterpret_cast<String>(stack[4])) {}

  // Everything but the results.
  bool read_call() { return open_list() && read_description() && read_main() && read_operands() && check_shapes(); }

  void release_arguments() {
    for (Tensor t : operands_) torch.release(t);
    for (int i = 0; i < 3; ++i) torch.release(tensor(i));
    torch.release_list(list_);
    torch.release_string(text_);
  }

 private:
  bool open_list() {
    size_t count = 0;
    if (torch.list_size(list_, &count)) return fail("operands cannot be read: a list of tensors is needed");
    operands_.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      uint64_t item = 0;
      if (torch.list_item(list_, i, &item)) return fail("operands cannot be read: a list of tensors is needed");
      operands_.push_back(reinterpret_cast<Tensor>(item));
    }
    return true;
  }

  bool read_description() {
    size_t size = 0;
    const char* text = nullptr;
    if (torch.string_size(text_, &size) || torch.string_text(text_, &text)) return fail("description cannot be read");
    d_ = parsed(text, size);
    return d_ || fail("description is not one that torchhal_cpu_x86.flex has written");
  }

  bool read_main() {
    const int64_t dim = d_->layout == kVarlen ? 3 : 4;
    if (!read(tensor(0), "query", dim, dim, query_) || !read(tensor(1), "key", dim, dim, key_) ||
        !read(tensor(2), "value", dim, dim, value_) || !describe_dtypes(c_, query_, key_, value_, d_->quantized))
      return false;
    double scale;
    std::memcpy(&scale, &stack_[5], sizeof(scale));
    c_.scale = scale;
    c_.is_causal = d_->is_causal != 0;
    return true;
  }

  bool next(const char* name, int64_t least, int64_t most, View& v) {
    if (next_ >= operands_.size())
      return fail("%s is missing: the description asks for more operands than the %zu there are", name, next_);
    return read(operands_[next_++], name, least, most, v);
  }

  bool next_int32(const char* name, int64_t dim, View& v) {
    if (!next(name, dim, dim, v)) return false;
    return v.dtype == torch.int32() || fail("%s must be int32", name);
  }

  bool read_operands() {
    if (d_->has_mask && (!next("attn_mask", 0, 4, mask_) || !describe_mask_dtype(c_, mask_))) return false;
    if (!read_function("score_mod", d_->score_captured, d_->score_words, 0, score_mod_)) return false;
    if (!read_function("mask_mod", d_->mask_captured, d_->mask_words, 1, mask_mod_)) return false;
    if (d_->score_captured >= 0) c_.score_mod = &score_mod_;
    if (d_->mask_captured >= 0) c_.mask_mod = &mask_mod_;
    if ((d_->has_blocks || d_->has_full_blocks) && !read_blocks()) return false;
    if (d_->layout != kDense && !(d_->layout == kVarlen ? read_starts() : read_pages())) return false;
    if (d_->quantized && !read_scales()) return false;
    if (d_->dropout && !read_dropout()) return false;
    return next_ == operands_.size() || fail("there are %zu operands and the description names %zu", operands_.size(), next_);
  }

  bool read_function(const char* name, int64_t count, const std::vector<int64_t>& words, int which, thal_function& f) {
    for (int64_t i = 0; i < count; ++i) {
      View v;
      const std::string whose = std::string("captured tensor ") + std::to_string(i) + " of " + name;
      if (!next(whose.c_str(), 0, 16, v)) return false;
      const int32_t type = type_of(v.dtype);
      if (type < 0) return fail("%s has a dtype that programs do not read", whose.c_str());
      captured_[which].push_back({v.data, type, static_cast<int32_t>(v.dim), v.sizes, v.strides});
    }
    f = {words.data(), static_cast<int64_t>(words.size()), captured_[which].data(), std::max<int64_t>(count, 0)};
    return true;
  }

  bool read_blocks() {
    blocks_.block_rows = d_->block_rows, blocks_.block_keys = d_->block_keys;
    if (d_->has_blocks && !read_lists("kv", blocks_.num, blocks_.indices, blocks_.num_stride, blocks_.indices_stride,
                                      blocks_.most))
      return false;
    if (d_->has_full_blocks && !read_lists("full_kv", blocks_.full_num, blocks_.full_indices, blocks_.full_num_stride,
                                           blocks_.full_indices_stride, blocks_.full_most))
      return false;
    c_.blocks = &blocks_;
    return true;
  }

  bool read_lists(const char* prefix, const int32_t*& num, const int32_t*& indices, int64_t* num_stride,
                  int64_t* indices_stride, int64_t& most) {
    const std::string names[] = {std::string(prefix) + "_num_blocks", std::string(prefix) + "_indices"};
    View n, i;
    if (!next_int32(names[0].c_str(), 3, n) || !next_int32(names[1].c_str(), 4, i)) return false;
    if (!std::equal(n.sizes, n.sizes + 3, i.sizes))
      return fail("%s %s and %s %s do not belong together", names[0].c_str(), shape_of(n).c_str(), names[1].c_str(),
                  shape_of(i).c_str());
    if (blocks_.num && (n.sizes[0] != blocks_.batches || n.sizes[1] != blocks_.heads || n.sizes[2] != blocks_.rows))
      return fail("%s %s differs from kv_num_blocks", names[0].c_str(), shape_of(n).c_str());
    blocks_.batches = n.sizes[0], blocks_.heads = n.sizes[1], blocks_.rows = n.sizes[2];
    num = static_cast<const int32_t*>(n.data), indices = static_cast<const int32_t*>(i.data), most = i.sizes[3];
    std::copy(n.strides, n.strides + 3, num_stride);
    std::copy(i.strides, i.strides + 4, indices_stride);
    return true;
  }

  bool one_by_one(const char* name, const View& v) {
    return v.sizes[0] < 2 || v.strides[0] == 1 || fail("%s must be contiguous", name);
  }

  bool read_starts() {
    View q, k;
    if (!next_int32("cu_seqlens_q", 1, q) || !next_int32("cu_seqlens_k", 1, k)) return false;
    if (!one_by_one("cu_seqlens_q", q) || !one_by_one("cu_seqlens_k", k)) return false;
    if (q.sizes[0] < 1 || q.sizes[0] != k.sizes[0])
      return fail("cu_seqlens_q %s and cu_seqlens_k %s must have one length, B + 1", shape_of(q).c_str(), shape_of(k).c_str());
    ragged_.starts_q = static_cast<const int32_t*>(q.data), ragged_.starts_k = static_cast<const int32_t*>(k.data);
    ragged_.tokens_q = query_.sizes[0], ragged_.tokens_k = key_.sizes[0];
    c_.B = q.sizes[0] - 1;
    c_.ragged = &ragged_;
    return true;
  }

  bool read_pages() {
    View table, lengths;
    if (!next_int32("page_table", 2, table) || !next_int32("seq_lens", 1, lengths)) return false;
    if (!one_by_one("seq_lens", lengths)) return false;
    c_.B = query_.sizes[0];
    if (table.sizes[0] != c_.B || lengths.sizes[0] != c_.B)
      return fail("page_table %s and seq_lens %s must have the query's %lld sequences", shape_of(table).c_str(),
                  shape_of(lengths).c_str(), static_cast<long long>(c_.B));
    static const int32_t nothing = 0;  // lengths of no sequence
    ragged_.page_table = static_cast<const int32_t*>(table.data);
    ragged_.lengths = lengths.data ? static_cast<const int32_t*>(lengths.data) : &nothing;
    std::copy(table.strides, table.strides + 2, ragged_.page_table_stride);
    ragged_.columns = table.sizes[1], ragged_.pages = key_.sizes[0], ragged_.page_size = key_.sizes[2];
    c_.ragged = &ragged_;
    return true;
  }

  bool read_scales() {
    const bool bytes = key_.dtype == torch.int8();
    quantized_.type = bytes ? THAL_I8 : THAL_F8;
    if ((!bytes && key_.dtype != torch.float8_e4m3fn()) || value_.dtype != key_.dtype)
      return fail("quantised key and value must both be int8 or both float8_e4m3fn");
    c_.quantized = &quantized_;
    return read_scale("key_scale", quantized_.key_scale, quantized_.key_stride) &&
           read_scale("value_scale", quantized_.value_scale, quantized_.value_stride);
  }

  // Of each head, or of each token and head.
  bool read_scale(const char* name, const float*& data, int64_t* stride) {
    View v;
    if (!next(name, 1, 3, v)) return false;
    if (v.dtype != torch.float32()) return fail("%s must be float32", name);
    const int64_t* k = key_.sizes;
    if (v.dim == 1 ? v.sizes[0] != k[1] : v.dim != 3 || !std::equal(k, k + 3, v.sizes))
      return fail("%s %s must be (Hkv,) or (P, Hkv, page_size) of key %s", name, shape_of(v).c_str(),
                  shape_of(key_).c_str());
    data = static_cast<const float*>(v.data);
    std::fill(stride, stride + 3, 0);
    std::copy(v.strides, v.strides + v.dim, stride + (v.dim == 1));
    return true;
  }

  bool read_dropout() {
    double p;
    std::memcpy(&p, &d_->dropout, sizeof(p));
    View seed;
    if (!next("seed", 0, 0, seed)) return false;
    if (seed.dtype != torch.int64()) return fail("seed must be int64");
    if (!(p >= 0.0 && p <= 1.0)) return fail("the probability of dropout must be from 0 to 1");
    std::memcpy(&dropout_.seed, seed.data, sizeof(dropout_.seed));
    dropout_.threshold = static_cast<uint64_t>(std::nearbyint(p * 4294967296.0));
    dropout_.kept = p < 1.0 ? 1.0 / (1.0 - p) : 1.0;
    c_.dropout = &dropout_;
    return true;
  }

  bool check_shapes() {
    const bool packed = d_->layout == kVarlen;
    const int64_t *q = query_.sizes, *k = key_.sizes, *v = value_.sizes;
    const int last = packed ? 2 : 3;
    c_.Hq = q[1], c_.Hkv = k[1], c_.E = q[last], c_.Ev = v[last];
    if (!packed) c_.L = q[2];
    if (d_->layout == kDense) c_.B = q[0], c_.S = k[2];
    const char* wrong = nullptr;
    if (d_->layout == kDense && k[0] != q[0]) wrong = "batch sizes differ";
    if (k[last] != q[last]) wrong = "query and key have different head sizes";
    if (!std::equal(k, k + last, v)) wrong = "key and value differ beyond the head size";
    if (k[1] ? q[1] % k[1] : q[1]) wrong = "query heads must be a multiple of key heads";
    if (q[last] < 1) wrong = "the head size of query and key must be at least 1";
    if (wrong)
      return fail("%s: query %s, key %s, value %s", wrong, shape_of(query_).c_str(), shape_of(key_).c_str(),
                  shape_of(value_).c_str());
    set_strides(query_, c_.q_stride), set_strides(key_, c_.k_stride), set_strides(value_, c_.v_stride);
    return true;
  }

 protected:
  // Tokens of the packed layout are rows of the others.
  static void set_strides(const View& v, int64_t* out) {
    if (v.dim == 4) {
      std::copy(v.strides, v.strides + 4, out);
    } else {
      out[0] = 0, out[1] = v.strides[1], out[2] = v.strides[0], out[3] = v.strides[2];
    }
  }

  bool describe_mask(const Plan& plan) {
    const bool dense = d_->layout == kDense;
    const int64_t full[4] = {c_.B, c_.Hq, dense || !plan.group ? c_.L : plan.most_rows / plan.group,
                             dense ? c_.S : plan.most_keys};
    for (int i = 0; i < 4; ++i) {
      const int64_t j = i - (4 - mask_.dim);
      if (j < 0) continue;  // a missing leading dimension is broadcast: stride 0
      const int64_t size = mask_.sizes[j];
      if (size != 1 && (dense || i == 1 ? size != full[i] : size < full[i]))
        return fail("mask %s does not broadcast to (B, Hq, L, S) = (%lld, %lld, %lld, %lld)", shape_of(mask_).c_str(),
                    static_cast<long long>(full[0]), static_cast<long long>(full[1]), static_cast<long long>(full[2]),
                    static_cast<long long>(full[3]));
      c_.mask_stride[i] = size == 1 ? 0 : mask_.strides[j];
    }
    return true;
  }
};

}  // namespace thal
