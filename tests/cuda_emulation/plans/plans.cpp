// Goes through the plans of partition.h, which is plain C++, for many shapes and devices, and prints what is wrong with
// them: nothing, unless slabs do not hold each value once, or a merge would take a wrong count for them, or the cut of
// columns is not the best one that there is.
#include <cstdio>

#include "cuda/partition.h"

using namespace precisebn::cuda;

static double use_of(const Block& block, int64_t total) {
  const int64_t blocks = (total + block.columns - 1) / block.columns;
  return static_cast<double>(total) / (blocks * block.columns) * (block.columns * block.thread_rows) / block.threads;
}

static bool is_best(int64_t total, int64_t unit, int64_t least, int64_t most) {
  const Block cut = cut_columns(total, unit, least, most);
  for (int64_t columns = unit; columns <= most && columns < total + unit; columns += unit) {
    if (columns < least && columns < total) continue;
    const auto width = static_cast<int>(columns);
    const int thread_rows = std::max(1, kThreads / width);
    const double use = use_of({width, thread_rows, (width * thread_rows + 31) / 32 * 32}, total);
    if (use > use_of(cut, total) || (use == use_of(cut, total) && width > cut.columns)) return false;
  }
  return true;
}

static bool is_right(const View& view, int vector, int num_groups, int multiprocessors) {
  const ReductionPlan plan = plan_reduction(view, vector, 16 / vector, 8, num_groups, multiprocessors);
  double values = 0;
  for (int64_t i = 0; i < plan.slabs.count; ++i) {
    if (plan.values_before(i) != values) return false;
    const Slab slab = plan.slabs[i];
    values += static_cast<double>(slab.samples) * slab.rows * plan.geometry.inner + plan.edges_of(slab, slab.samples);
  }
  if (plan.edge > 0 && plan.edge + plan.between() != view.length) return false;
  return values == static_cast<double>(view.batch * view.length) && plan.all_values == values &&
         plan.values_before(plan.slabs.count + plan.fan_in) == values;
}

int main() {
  int64_t checked = 0;
  for (const int64_t batch : {1, 2, 28, 33, 100}) {
    for (const int64_t channels : {1, 3, 64}) {
      for (const int64_t length : {1, 49, 64, 256, 289, 1225, 3025, 21609, 262144}) {
        for (const int vector : {1, 4, 8}) {
          for (const int settings : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) {
            const bool planes = settings % 2 == 0, grouped = settings % 4 >= 2;
            const int multiprocessors[] = {1, 16, 132};
            const View view = simplified({batch, channels, length, planes}, grouped);
            ++checked;
            if (!is_right(view, vector, grouped ? 3 : 0, multiprocessors[settings / 4])) {
              std::printf("%ld x %ld x %ld, vector %d, settings %d: slabs do not add up\n", view.batch, view.channels,
                          view.length, vector, settings);
            }
          }
        }
      }
    }
  }
  for (const int64_t length : {(int64_t{1} << 31) + 9, (int64_t{3} << 31) + 8}) {  // beyond the numbers of an int
    for (const int vector : {1, 4, 8}) {
      ++checked;
      if (!is_right({2, 1, length, true}, vector, 0, 132)) std::printf("planes of %ld are cut badly\n", length);
    }
  }
  for (int64_t total = 1; total < 3000; total += 7) {
    for (const int64_t unit : {1, 2, 7, 49}) {
      for (const int64_t least : {1, 16, 128}) {
        for (const int64_t most : {64, 256}) {
          if (total % unit != 0 || least > most) continue;
          ++checked;
          if (!is_best(total, unit, least, most)) std::printf("%ld columns are cut badly\n", total);
        }
      }
    }
  }
  std::fprintf(stderr, "%ld plans", checked);
}
