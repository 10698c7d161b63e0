// Maps a function over lists of tensors in one parallel region, whatever the number of tensors.
#include "map.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <unordered_map>

#include "tasks.hpp"

namespace thal {
namespace {

// Elements of a task: of float32 64 KB for each tensor, a few microseconds of work for the shortest functions.
constexpr int64_t kTask = 16384;
// Below this many elements (about 10 us on one core) waking other threads costs more than it brings.
constexpr int64_t kSerialElements = 16384;

std::mutex programs_mutex;
std::unordered_map<int64_t, std::shared_ptr<MapProgram>> programs;
int64_t last_program = 0;

int prepare(const thal_map_program& p, MapProgram& made) {
  if (p.struct_size != sizeof(p)) return THAL_BAD_STRUCT;
  if (p.inputs < 0 || p.inputs > kInputsMost || p.outputs < 1) return THAL_BAD_SIZE;
  if (p.reduction < THAL_KEEP || p.reduction > THAL_ANY) return THAL_BAD_SIZE;
  made.reduction = p.reduction;
  if (!p.words || !p.output_types || (p.inputs && !p.kinds)) return THAL_BAD_POINTER;
  Span spans[kInputsMost];
  for (int64_t i = 0; i < p.inputs; ++i) {
    if (p.kinds[i] < THAL_LIST || p.kinds[i] > THAL_NUMBERS) return THAL_BAD_SIZE;
    const bool shared = p.kinds[i] != THAL_LIST;
    spans[i] = shared ? Span::kOne : Span::kBlock;
    made.shared.push_back(shared);
    made.kinds.push_back(p.kinds[i]);
  }
  const int32_t first = p.output_types[0];
  if (first < 0 || first >= static_cast<int32_t>(Type::kTypes)) return THAL_BAD_DTYPE;
  Program& program = made.program;
  if (const int code = decode(p.words, p.word_count, spans, p.inputs, static_cast<Type>(first), program)) return code;
  if (static_cast<int64_t>(program.results.size()) != p.outputs) return THAL_BAD_PROGRAM;
  for (int64_t i = 0; i < p.outputs; ++i) {
    if (static_cast<int32_t>(program.results[static_cast<size_t>(i)].type) != p.output_types[i]) return THAL_BAD_DTYPE;
    const int32_t target = p.targets ? p.targets[i] : THAL_NEW;
    if (p.reduction && target != THAL_NEW) return THAL_BAD_SIZE;
    if (target < THAL_GIVEN || target >= p.inputs || (target >= 0 && p.kinds[target] != THAL_LIST)) return THAL_BAD_SIZE;
    made.targets.push_back(target);
  }
  if (thal_supported_isas() >> THAL_ISA_AVX512 & 1) made.compiled.compile(program);
  return THAL_OK;
}

int check(const thal_map& m, const MapProgram& program) {
  const auto inputs = static_cast<int64_t>(program.shared.size()), outputs = static_cast<int64_t>(program.targets.size());
  if (m.positions < 0) return THAL_BAD_SIZE;
  if (m.num_threads < 1 || (m.num_threads > 1 && !m.parallel)) return THAL_BAD_THREADS;
  if (m.positions && (!m.counts || !m.out || (inputs && !m.data))) return THAL_BAD_POINTER;
  for (int64_t p = 0; p < m.positions; ++p) {
    if (m.counts[p] < 0) return THAL_BAD_SIZE;
    if (m.counts[p] == 0) continue;
    for (int64_t i = 0; i < inputs; ++i)
      if (!m.data[i * m.positions + p]) return THAL_BAD_POINTER;
  }
  for (int64_t i = 0; i < outputs * m.positions; ++i)
    if (!m.out[i] && (program.reduction || m.counts[i % m.positions])) return THAL_BAD_POINTER;
  return fit(program.program, m.captured, m.captured_count) ? THAL_OK : THAL_BAD_PROGRAM;
}

void run_task(const MapPlan& m, int64_t task, char* scratch, Partial* partials) {
  const auto after = std::upper_bound(m.first_task.begin(), m.first_task.end(), task);
  const int64_t position = after - m.first_task.begin() - 1;
  const int64_t first = (task - *(after - 1)) * kTask, count = std::min(kTask, m.map.counts[position] - first);
  if (m.reduction) return m.isa->reduce_map(m, position, first, count, scratch, partials + task * m.outputs);
  m.isa->run_map(m, position, first, count, scratch);
}

// Tasks in their order, whoever did them.
void join_partials(const MapPlan& m, const Partial* partials) {
  for (int64_t i = 0; i < m.outputs; ++i) {
    const Type type = m.program->results[static_cast<size_t>(i)].type;
    const bool whole = reduces_to_whole(m.reduction, type);
    for (int64_t p = 0; p < m.map.positions; ++p) {
      Partial sum = nothing_reduced(m.reduction, type);
      for (int64_t task = m.first_task[static_cast<size_t>(p)]; task < m.first_task[static_cast<size_t>(p + 1)]; ++task)
        join(m.reduction, whole, sum, partials[task * m.outputs + i]);
      std::memcpy(m.output(i, p), &sum, sizeof(sum));
    }
  }
}

}  // namespace

Partial nothing_reduced(int32_t reduction, Type t) {
  Partial none;
  none.whole = 0;
  if (reduction != THAL_MAX) return none;  // the bits of 0.0 are those of 0
  if (is_float(t)) {
    none.real = -std::numeric_limits<double>::infinity();
  } else if (t != Type::kBool) {
    none.whole = std::numeric_limits<int64_t>::min();
  }
  return none;
}

std::shared_ptr<MapProgram> find_map_program(int64_t id) {
  std::lock_guard<std::mutex> hold(programs_mutex);
  const auto found = programs.find(id);
  return found == programs.end() ? nullptr : found->second;
}

int lay_out_map(const thal_map& map, const MapProgram& program, MapPlan& m) {
  m.map = map, m.program = &program.program, m.shared = program.shared.data();
  m.isa = find_isa(map.isa == THAL_ISA_AUTO ? thal_get_isa(THAL_F32) : map.isa);
  if (!m.isa) return THAL_BAD_ISA;
  m.compiled = program.compiled && m.isa->lanes == kLanes ? &program.compiled : nullptr;
  m.reduction = program.reduction;
  m.inputs = static_cast<int64_t>(program.shared.size()), m.outputs = static_cast<int64_t>(program.targets.size());
  Scratch layout;
  layout.take(program.program.bytes);
  m.at_tail = layout.take((m.inputs + m.outputs) * kLanes * 8);
  m.at_rows = layout.take(m.reduction ? m.outputs * kReducedRows * kLanes * 8 : 0);
  m.scratch_bytes = layout.at;
  m.first_task.resize(static_cast<size_t>(map.positions + 1));
  for (int64_t p = 0; p < map.positions; ++p)
    m.first_task[static_cast<size_t>(p + 1)] = m.first_task[static_cast<size_t>(p)] + (map.counts[p] + kTask - 1) / kTask;
  return THAL_OK;
}

int run_map_plan(const MapPlan& m) {
  int64_t elements = 0;
  for (int64_t p = 0; p < m.map.positions; ++p) elements += m.map.counts[p];
  const int64_t tasks = m.first_task.back();
  const int64_t workers = elements <= kSerialElements ? 1 : std::max<int64_t>(1, std::min<int64_t>(m.map.num_threads, tasks));
  std::vector<char> memory(static_cast<size_t>(64 + workers * m.scratch_bytes));
  char* scratch = aligned(memory.data());
  const thal_map& map = m.map;
  std::vector<Partial> partials(static_cast<size_t>(m.reduction ? tasks * m.outputs : 0));
  const int code = run_tasks(map.parallel, map.parallel_user, tasks, workers, [&](int64_t task, int64_t worker) {
    run_task(m, task, scratch + worker * m.scratch_bytes, partials.data());
  });
  if (!code && m.reduction) join_partials(m, partials.data());
  return code;
}

}  // namespace thal

extern "C" int thal_map_program_new(const thal_map_program* description, int64_t* id) {
  if (!description || !id) return THAL_BAD_POINTER;
  try {
    auto made = std::make_shared<thal::MapProgram>();
    if (const int code = thal::prepare(*description, *made)) return code;
    std::lock_guard<std::mutex> hold(thal::programs_mutex);
    *id = ++thal::last_program;
    thal::programs.emplace(*id, std::move(made));
    return THAL_OK;
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}

extern "C" void thal_map_program_free(int64_t id) {
  std::lock_guard<std::mutex> hold(thal::programs_mutex);
  thal::programs.erase(id);
}

extern "C" int thal_map_run(const thal_map* map) {
  if (!map) return THAL_BAD_POINTER;
  if (map->struct_size != sizeof(thal_map)) return THAL_BAD_STRUCT;
  try {
    const auto program = thal::find_map_program(map->program);
    if (!program) return THAL_BAD_PROGRAM;
    if (const int code = thal::check(*map, *program)) return code;
    thal::MapPlan plan;
    const int code = thal::lay_out_map(*map, *program, plan);
    return code ? code : thal::run_map_plan(plan);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
