// Tasks handed out by an atomic counter. Which thread runs a task never changes what the task computes.
#pragma once

#include <atomic>
#include <cstdint>

#include "torchhal_cpu_x86.h"

namespace thal {

// f(i, worker) once for every i in [0, count), on at most `workers` threads of the call's; worker < workers.
template <class F>
int run_tasks(const thal_attention& call, int64_t count, int64_t workers, F f) {
  struct Run {
    std::atomic<int64_t> next;
    int64_t count;
    F& f;
  } run{{0}, count, f};
  const auto work = [](int64_t worker, void* ctx) {
    Run& r = *static_cast<Run*>(ctx);
    for (int64_t i; (i = r.next.fetch_add(1, std::memory_order_relaxed)) < r.count;) r.f(i, worker);
  };
  if (workers <= 1) {
    work(0, &run);
    return THAL_OK;
  }
  return call.parallel(workers, work, &run, call.parallel_user) ? THAL_PARALLEL_FAILED : THAL_OK;
}

// Start of the aligned part of a workspace.
inline char* aligned(void* workspace) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
}

}  // namespace thal
