// Tasks shared out among threads. Which thread runs a task never changes what the task computes.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "torchhal_cpu_x86.h"

namespace thal {

// The tasks of one worker that nobody has taken yet.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

// f(i, worker) once for every i in [0, count), on at most `workers` threads; worker < workers.
//
// Each worker begins with an equal share of neighbouring tasks, so that call after call a thread reads the memory that
// it read before and that is near to it; what masks make uneven is evened out, as who is done takes from the others.
template <class F>
int run_tasks(thal_parallel parallel, void* user, int64_t count, int64_t workers, F f) {
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i, 0);
    return THAL_OK;
  }
  struct Run {
    std::vector<Share> shares;
    F& f;
  } run{std::vector<Share>(static_cast<size_t>(workers)), f};
  for (int64_t w = 0; w < workers; ++w) {
    Share& share = run.shares[static_cast<size_t>(w)];
    share.next.store(w * count / workers, std::memory_order_relaxed);
    share.end = (w + 1) * count / workers;
  }
  const auto work = [](int64_t worker, void* ctx) {
    Run& r = *static_cast<Run*>(ctx);
    const size_t n = r.shares.size();
    for (size_t k = 0; k < n; ++k) {
      Share& share = r.shares[(static_cast<size_t>(worker) + k) % n];
      for (int64_t i; (i = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) r.f(i, worker);
    }
  };
  return parallel(workers, work, &run, user) ? THAL_PARALLEL_FAILED : THAL_OK;
}

template <class F>
int run_tasks(const thal_attention& call, int64_t count, int64_t workers, F f) {
  return run_tasks(call.parallel, call.parallel_user, count, workers, f);
}

// Start of the aligned part of a workspace.
inline char* aligned(void* workspace) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) & ~uintptr_t{63});
}

}  // namespace thal
