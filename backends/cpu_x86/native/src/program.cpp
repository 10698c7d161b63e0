// Decoding of programs: every word is checked here, so that the machine can trust what it runs.
#include "program.hpp"

#include <algorithm>

namespace thal {
namespace {

constexpr int64_t kVersion = 1;
// Far beyond what people write, and small enough that offsets fit in 32 bits.
constexpr int64_t kNodesMost = 4096;
constexpr int64_t kDimsMost = 16;

enum class Rule { kLeaf, kAlike, kNumbers, kFloats, kIntegers, kBools, kCompared, kClassified, kSelected };

struct Word {
  int arity;
  Rule rule;
};

constexpr Word kWords[] = {
#define THAL_WORD(name, arity, rule) {arity, Rule::rule},
    THAL_PRIMITIVES(THAL_WORD)
#undef THAL_WORD
};

struct Node {
  Op op;
  Type type;
  int64_t attribute;
  std::vector<int32_t> operands;
  Span span = Span::kOne;
};

// Reads words and remembers whether one was missing or out of range.
class Reader {
  const int64_t* words_;
  int64_t left_;
  bool good_ = true;

 public:
  Reader(const int64_t* words, int64_t count) : words_(words), left_(count) {}
  bool good() const { return good_; }
  bool done() const { return good_ && left_ == 0; }
  int64_t any() {
    if (left_ <= 0) {
      good_ = false;
      return 0;
    }
    --left_;
    return *words_++;
  }
  // A word in [0, below), or 0 and a bad reader.
  int64_t below(int64_t bound) {
    const int64_t word = any();
    if (word >= 0 && word < bound) return word;
    good_ = false;
    return 0;
  }
  Type type() { return static_cast<Type>(below(static_cast<int64_t>(Type::kTypes))); }
};

Span join(Span a, Span b) { return static_cast<Span>(static_cast<int>(a) | static_cast<int>(b)); }
static_assert((static_cast<int>(Span::kLanes) | static_cast<int>(Span::kRows)) == static_cast<int>(Span::kBlock),
              "spans are sets of what a value varies with");

bool fits_rule(Rule rule, const Node& node, const std::vector<Type>& from) {
  const bool alike = std::all_of(from.begin(), from.end(), [&](Type t) { return t == from[0]; });
  switch (rule) {
    case Rule::kAlike:
      return node.type == from[0];
    case Rule::kNumbers:
      return alike && from[0] != Type::kBool && node.type == from[0];
    case Rule::kFloats:
      return alike && is_float(from[0]) && node.type == from[0];
    case Rule::kIntegers:
      return alike && is_integer(from[0]) && node.type == from[0];
    case Rule::kBools:
      return alike && from[0] == Type::kBool && node.type == Type::kBool;
    case Rule::kCompared:
      return alike && node.type == Type::kBool;
    case Rule::kClassified:
      return is_float(from[0]) && node.type == Type::kBool;
    case Rule::kSelected:
      return from[0] == Type::kBool && from[1] == from[2] && node.type == from[1];
    default:
      return true;
  }
}

class Decoder {
  Reader in_;
  const Span* spans_;
  Program& program_;
  std::vector<Node> nodes_;
  std::vector<int32_t> outputs_;

 public:
  Decoder(const int64_t* words, int64_t count, const Span* spans, Program& program)
      : in_(words, count), spans_(spans), program_(program) {}

  bool read(int64_t inputs) {
    if (in_.any() != kVersion || in_.any() != inputs) return false;
    for (int64_t i = 0; i < inputs; ++i) program_.inputs.push_back(in_.type());
    const int64_t captured = in_.below(kNodesMost);
    for (int64_t i = 0; i < captured && in_.good(); ++i) {
      const Type type = in_.type();
      program_.captured.push_back({type, static_cast<int32_t>(in_.below(kDimsMost + 1))});
    }
    const int64_t nodes = in_.below(kNodesMost);
    for (int64_t i = 0; i < nodes; ++i)
      if (!read_node(static_cast<int32_t>(i))) return false;
    const int64_t outputs = in_.below(kNodesMost);
    for (int64_t i = 0; i < outputs && in_.good(); ++i) outputs_.push_back(static_cast<int32_t>(in_.below(nodes)));
    return in_.done() && outputs > 0;
  }

  void cast_first(Type wanted) {
    const int32_t id = outputs_[0];
    int32_t found = id;
    if (nodes_[id].type != wanted) found = add({Op::k_cast, wanted, 0, {id}, nodes_[id].span});
    outputs_[0] = found;
  }

  void lay_out();

 private:
  bool read_node(int32_t id) {
    Node node;
    node.op = static_cast<Op>(in_.below(static_cast<int64_t>(Op::kPrimitives)));
    node.type = in_.type();
    node.attribute = in_.any();
    const int64_t operands = in_.below(kDimsMost + 1);
    std::vector<Type> from;
    for (int64_t i = 0; i < operands && in_.good(); ++i) {
      node.operands.push_back(static_cast<int32_t>(in_.below(id)));
      if (!in_.good()) return false;
      from.push_back(nodes_[node.operands.back()].type);
      node.span = join(node.span, nodes_[node.operands.back()].span);
    }
    if (!in_.good() || !fits(node, from)) return false;
    if (node.op == Op::k_input) node.span = spans_[node.attribute];
    nodes_.push_back(std::move(node));
    return true;
  }

  bool fits(const Node& node, const std::vector<Type>& from) const {
    const Word& word = kWords[static_cast<int>(node.op)];
    const auto count = static_cast<int64_t>(from.size());
    if (word.arity >= 0 && word.arity != count) return false;
    if (node.op == Op::k_input)
      return node.attribute >= 0 && node.attribute < static_cast<int64_t>(program_.inputs.size()) &&
             program_.inputs[node.attribute] == node.type;
    if (node.op == Op::k_gather) {
      if (node.attribute < 0 || node.attribute >= static_cast<int64_t>(program_.captured.size())) return false;
      const CapturedSpec& spec = program_.captured[node.attribute];
      return spec.type == node.type && spec.dims == count &&
             std::all_of(from.begin(), from.end(), [](Type t) { return t == Type::kI64 || t == Type::kI32; });
    }
    return word.rule == Rule::kLeaf || fits_rule(word.rule, node, from);
  }

  int32_t add(Node node) {
    nodes_.push_back(std::move(node));
    return static_cast<int32_t>(nodes_.size() - 1);
  }

  void spread_operands();
};

// A block-wide instruction reads operands of whole rows only: what varies from row to row alone is copied to whole rows
// first, once for each value. The indices of a gather are read as they are.
void Decoder::spread_operands() {
  std::vector<Node> before;
  std::vector<int32_t> moved(nodes_.size()), spread(nodes_.size(), -1);
  before.swap(nodes_);
  for (size_t i = 0; i < before.size(); ++i) {
    Node node = before[i];
    for (int32_t& operand : node.operands) {
      const int32_t old = operand;
      operand = moved[old];
      if (node.op == Op::k_gather || node.span != Span::kBlock || before[old].span != Span::kRows) continue;
      if (spread[old] < 0) spread[old] = add({Op::k_spread, before[old].type, 0, {operand}, Span::kBlock});
      operand = spread[old];
    }
    moved[i] = node.op == Op::k_detach ? node.operands[0] : add(node);
  }
  for (int32_t& id : outputs_) id = moved[id];
}

class Memory {
  int64_t top_ = 0;
  std::vector<int32_t> free_[2];  // block-wide places of 4 and of 8 bytes an element

 public:
  int64_t bytes() const { return top_; }
  int32_t take(Type type, Span span) {
    auto& list = free_[width_of(type) == 8];
    if (span == Span::kBlock && !list.empty()) {
      const int32_t at = list.back();
      list.pop_back();
      return at;
    }
    const int64_t elements = span == Span::kBlock ? kChunk * kLanes : span == Span::kRows ? kRowsMost : kLanes;
    const auto at = static_cast<int32_t>(top_);
    top_ += elements * width_of(type);
    return at;
  }
  void give_back(int32_t at, Type type) { free_[width_of(type) == 8].push_back(at); }
};

void Decoder::lay_out() {
  spread_operands();
  const auto count = static_cast<int32_t>(nodes_.size());
  std::vector<int32_t> last(nodes_.size(), -1), at(nodes_.size());
  for (int32_t i = 0; i < count; ++i)
    for (int32_t operand : nodes_[i].operands) last[operand] = i;
  for (int32_t id : outputs_) last[id] = count;  // kept to the end
  Memory memory;
  for (int32_t i = 0; i < count; ++i) {
    const Node& node = nodes_[i];
    at[i] = memory.take(node.type, node.span);
    Instruction out{};
    out.op = node.op, out.type = out.from = node.type, out.span = node.span;
    out.result = at[i], out.attribute = node.attribute;
    if (node.op == Op::k_gather) {
      out.index = static_cast<int32_t>(program_.indices.size());
      out.indices = static_cast<int32_t>(node.operands.size());
      for (int32_t id : node.operands) program_.indices.push_back({at[id], nodes_[id].type, nodes_[id].span});
    } else {
      for (size_t j = 0; j < node.operands.size(); ++j) {
        const int32_t id = node.operands[j];
        out.operand[j] = at[id], out.operand_span[j] = nodes_[id].span, out.from = nodes_[id].type;
      }
    }
    auto& phase = node.span == Span::kBlock ? program_.block : node.span == Span::kRows ? program_.rows : program_.once;
    phase.push_back(out);
    for (int32_t id : node.operands) {
      if (last[id] != i || nodes_[id].span != Span::kBlock) continue;
      memory.give_back(at[id], nodes_[id].type);
      last[id] = -1;  // an operand that is named twice is given back once
    }
    // A result nobody reads keeps its place: such nodes are not in a canonical graph.
  }
  for (int32_t id : outputs_) program_.results.push_back({at[id], nodes_[id].type, nodes_[id].span});
  program_.bytes = memory.bytes();
}

}  // namespace

int decode(const int64_t* words, int64_t count, const Span* spans, int64_t inputs, Type wanted, Program& program) {
  program = Program();
  if (!words || count < 0 || inputs < 0 || inputs > kInputsMost) return THAL_BAD_PROGRAM;
  Decoder decoder(words, count, spans, program);
  if (!decoder.read(inputs)) return THAL_BAD_PROGRAM;
  decoder.cast_first(wanted);
  decoder.lay_out();
  return THAL_OK;
}

bool fit(const Program& program, const thal_captured* captured, int64_t count) {
  if (count != static_cast<int64_t>(program.captured.size()) || (count && !captured)) return false;
  for (int64_t i = 0; i < count; ++i) {
    const thal_captured& c = captured[i];
    if (c.type != static_cast<int32_t>(program.captured[i].type) || c.dims != program.captured[i].dims) return false;
    if (c.dims && (!c.sizes || !c.strides)) return false;
    if (std::any_of(c.sizes, c.sizes + c.dims, [](int64_t size) { return size < 0; })) return false;
    if (!c.data && !is_empty(c)) return false;
  }
  return true;
}

}  // namespace thal

extern "C" int32_t thal_primitive_count(void) { return static_cast<int32_t>(thal::Op::kPrimitives); }

extern "C" const char* thal_primitive_name(int32_t code) {
  static const char* const names[] = {
#define THAL_NAME(name, arity, rule) #name,
      THAL_PRIMITIVES(THAL_NAME)
#undef THAL_NAME
  };
  return code >= 0 && code < thal_primitive_count() ? names[code] : nullptr;
}
