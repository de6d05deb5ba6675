// How a pass over the rows of all lanes is cut into tasks for the threads.
#pragma once
#include <omp.h>

#include "bias.h"
#include "dispatch.h"

namespace longspan::LONGSPAN_SET {

struct Pass {
  const longspan_attention& call;
  int64_t rows_per_task = 1024;
  int64_t most_columns[VIEWS] = {};  // of any lane
  int64_t most_reach = 0;            // before and after a row of the band, of any lane

  template <class Tiles>
  int64_t slots() const {
    return divide_up(rows_per_task, Tiles::ROWS);
  }
};

ALWAYS_INLINE int64_t limited(int64_t reach) { return smaller(reach, UNLIMITED); }

ALWAYS_INLINE int64_t tokens_of_residue(int64_t tokens, int64_t residue, int64_t dilation) {
  return residue < tokens ? divide_up(tokens - residue, dilation) : 0;
}

// Few enough that the sums of a task's blocks stay in the second-level cache and that every thread finds work; many
// enough that what is packed for one block serves others.
ALWAYS_INLINE int64_t choose_rows_per_task(int64_t all_rows, int64_t threads) {
  constexpr int64_t MOST = 1024, FEWEST = 128, TASKS_PER_THREAD = 4;
  int64_t rows = MOST;
  while (rows > FEWEST && all_rows < rows * threads * TASKS_PER_THREAD) rows /= 2;
  return rows;
}

// Worker has, as static members, rows(lane) and dilation(lane), which takes the rows apart into grids, and
// columns(lane, view), the most that a row may meet. Each thread makes a Worker(arena, pass) of its own, for whose
// run(lane, residue, begin, end) the rows `begin` to `end` of one grid are a task; all of them where TAKES_GRIDS. Where
// SUMS_BIAS, each task is also given where to sum up the gradient of the bias, null if nobody wants it.
template <class Worker>
int run_pass(const longspan_attention& call, const longspan_lane* lanes, int64_t num_lanes) {
  const int64_t threads = omp_get_max_threads();
  Pass pass{call};
  int64_t all_rows = 0;
  for (int64_t i = 0; i < num_lanes; ++i) {
    all_rows += Worker::rows(lanes[i]);
    for (int64_t v = 0; v < VIEWS; ++v) {
      pass.most_columns[v] = larger(pass.most_columns[v], Worker::columns(lanes[i], v));
    }
    pass.most_reach = larger(pass.most_reach, limited(lanes[i].before) + limited(lanes[i].after));
  }
  pass.rows_per_task = choose_rows_per_task(all_rows, threads);
  const int64_t rows_of_task = Worker::TAKES_GRIDS ? UNLIMITED : pass.rows_per_task;
  int64_t tasks_per_lane = 0;  // of the lane with most; others leave some empty
  const auto num_grids = [](const longspan_lane& lane) { return smaller(Worker::dilation(lane), Worker::rows(lane)); };
  for (int64_t i = 0; i < num_lanes; ++i) {
    const int64_t in_grid = divide_up(Worker::rows(lanes[i]), Worker::dilation(lanes[i]));
    tasks_per_lane = larger(tasks_per_lane, num_grids(lanes[i]) * divide_up(in_grid, rows_of_task));
  }
  const int64_t num_tasks = num_lanes * tasks_per_lane;
  if (num_tasks == 0) return LONGSPAN_OK;

  BiasSums sums;
  if (Worker::SUMS_BIAS && !sums.allocate(lanes, num_lanes, num_tasks)) return LONGSPAN_NO_MEMORY;
  Arena needed;
  { Worker worker(needed, pass); }
  int64_t next_task = 0;
  int64_t working = 0;
#pragma omp parallel num_threads(static_cast<int>(smaller(threads, num_tasks)))
  {
    Arena arena{static_cast<char*>(thread_workspace(needed.used))};
    if (arena.memory) {  // the tasks of a thread without memory are done by the others
      __atomic_fetch_add(&working, 1, __ATOMIC_RELAXED);
      Worker worker(arena, pass);
      Worker::Tiles::begin();
      // All lanes of some rows before the next rows: heads lie side by side in memory.
      for (int64_t task; (task = __atomic_fetch_add(&next_task, 1, __ATOMIC_RELAXED)) < num_tasks;) {
        const longspan_lane& lane = lanes[task % num_lanes];
        const int64_t grids = num_grids(lane), within = task / num_lanes;
        if (grids == 0) continue;
        const int64_t residue = within % grids, begin = within / grids * rows_of_task;
        const int64_t rows = tokens_of_residue(Worker::rows(lane), residue, Worker::dilation(lane));
        if (begin >= rows) continue;
        const int64_t end = smaller(rows, begin + rows_of_task);
        if constexpr (Worker::SUMS_BIAS) worker.run(lane, residue, begin, end, sums.of_task(task));
        if constexpr (!Worker::SUMS_BIAS) worker.run(lane, residue, begin, end);
      }
      Worker::Tiles::end();
    }
  }
  if (Worker::SUMS_BIAS) sums.add_to(lanes, num_lanes, num_tasks);
  return working > 0 ? LONGSPAN_OK : LONGSPAN_NO_MEMORY;
}

}  // namespace longspan::LONGSPAN_SET
