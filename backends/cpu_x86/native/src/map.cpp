// Maps a function over lists of tensors in one parallel region, whatever the number of tensors.
#include "map.hpp"

#include <algorithm>
#include <new>

#include "tasks.hpp"

namespace thal {
namespace {

// Elements of a task: of float32 64 KB for each tensor, a few microseconds of work for the shortest functions.
constexpr int64_t kTask = 16384;
// Below this many elements (about 10 us on one core) waking other threads costs more than it brings.
constexpr int64_t kSerialElements = 16384;

int check(const thal_map& m) {
  if (m.struct_size != sizeof(thal_map)) return THAL_BAD_STRUCT;
  if (m.inputs < 0 || m.inputs > kInputsMost || m.outputs < 1 || m.positions < 0) return THAL_BAD_SIZE;
  if (m.num_threads < 1 || (m.num_threads > 1 && !m.parallel)) return THAL_BAD_THREADS;
  if (!m.words || !m.output_types || (m.inputs && !m.shared)) return THAL_BAD_POINTER;
  if (m.positions && (!m.counts || !m.out || (m.inputs && !m.data))) return THAL_BAD_POINTER;
  for (int64_t p = 0; p < m.positions; ++p) {
    if (m.counts[p] < 0) return THAL_BAD_SIZE;
    if (m.counts[p] == 0) continue;
    for (int64_t i = 0; i < m.inputs; ++i)
      if (!m.data[i * m.positions + p]) return THAL_BAD_POINTER;
    for (int64_t i = 0; i < m.outputs; ++i)
      if (!m.out[i * m.positions + p]) return THAL_BAD_POINTER;
  }
  return THAL_OK;
}

int make_map_plan(const thal_map& map, MapPlan& m) {
  if (const int code = check(map)) return code;
  m.map = map;
  m.isa = find_isa(map.isa == THAL_ISA_AUTO ? thal_get_isa(THAL_F32) : map.isa);
  if (!m.isa) return THAL_BAD_ISA;
  Span spans[kInputsMost];
  for (int64_t i = 0; i < map.inputs; ++i) spans[i] = map.shared[i] ? Span::kOne : Span::kBlock;
  const int32_t first = map.output_types[0];
  if (first < 0 || first >= static_cast<int32_t>(Type::kTypes)) return THAL_BAD_DTYPE;
  if (const int code = decode(map.words, map.word_count, spans, map.inputs, static_cast<Type>(first), m.program)) return code;
  if (!fit(m.program, map.captured, map.captured_count)) return THAL_BAD_PROGRAM;
  if (static_cast<int64_t>(m.program.results.size()) != map.outputs) return THAL_BAD_PROGRAM;
  for (int64_t i = 0; i < map.outputs; ++i)
    if (static_cast<int32_t>(m.program.results[static_cast<size_t>(i)].type) != map.output_types[i]) return THAL_BAD_DTYPE;
  Scratch layout;
  layout.take(m.program.bytes);
  m.at_tail = layout.take((map.inputs + map.outputs) * kLanes * 8);
  m.scratch_bytes = layout.at;
  m.first_task.resize(static_cast<size_t>(map.positions + 1));
  for (int64_t p = 0; p < map.positions; ++p)
    m.first_task[static_cast<size_t>(p + 1)] = m.first_task[static_cast<size_t>(p)] + (map.counts[p] + kTask - 1) / kTask;
  return THAL_OK;
}

void run_task(const MapPlan& m, int64_t task, char* scratch) {
  const auto after = std::upper_bound(m.first_task.begin(), m.first_task.end(), task);
  const int64_t position = after - m.first_task.begin() - 1;
  const int64_t first = (task - *(after - 1)) * kTask;
  m.isa->run_map(m, position, first, std::min(kTask, m.map.counts[position] - first), scratch);
}

int run_map_plan(const MapPlan& m) {
  int64_t elements = 0;
  for (int64_t p = 0; p < m.map.positions; ++p) elements += m.map.counts[p];
  const int64_t tasks = m.first_task.back();
  const int64_t workers = elements <= kSerialElements ? 1 : std::max<int64_t>(1, std::min<int64_t>(m.map.num_threads, tasks));
  std::vector<char> memory(static_cast<size_t>(64 + workers * m.scratch_bytes));
  char* scratch = aligned(memory.data());
  const thal_map& map = m.map;
  return run_tasks(map.parallel, map.parallel_user, tasks, workers,
                   [&](int64_t task, int64_t worker) { run_task(m, task, scratch + worker * m.scratch_bytes); });
}

}  // namespace
}  // namespace thal

extern "C" int thal_map_run(const thal_map* map) {
  if (!map) return THAL_BAD_POINTER;
  try {
    thal::MapPlan plan;
    const int code = thal::make_map_plan(*map, plan);
    return code ? code : thal::run_map_plan(plan);
  } catch (const std::bad_alloc&) {
    return THAL_NO_MEMORY;
  }
}
