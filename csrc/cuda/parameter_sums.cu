// The entry of the sums over partial results: up to 16 parameters a launch.
#include "parameter_sums.cuh"

#include <cstdio>

#include "launch.cuh"

namespace ciema {
namespace {

using namespace parameter_sums;

// The name of a job's argument, as "rows3".
struct Name {
  char text[32];
  Name(const char* what, int job) { std::snprintf(text, sizeof(text), "%s%d", what, job); }
};

void entry(const Arguments& a) {
  Params params{};
  const auto jobs = static_cast<int>(a.integer("jobs"));
  if (jobs < 1 || jobs > kJobs) fail_launch("parameter_sums", "takes 1 to 16 parameters");
  int64_t largest = 1;
  for (int j = 0; j < jobs; ++j) {
    Job& job = params.job[j];
    job.partials = a.pointer<const float>(Name("partials", j).text);
    job.out = a.pointer<void>(Name("out", j).text);
    job.rows = a.integer(Name("rows", j).text);
    job.columns = a.integer(Name("columns", j).text);
    job.first = a.integer(Name("first", j).text);
    job.size = a.integer(Name("size", j).text);
    job.taps = a.integer(Name("taps", j).text);
    job.kind = static_cast<Kind>(a.integer(Name("kind", j).text));
    if (job.size > largest) largest = job.size;
  }
  launch(a, "parameter_sums", dim3(grid_size(blocks(largest, kWarp)), jobs), dim3(kThreads), 0,
         sum_kernel, params);
}

const Entry kEntries[] = {{"parameter_sums_float32", entry}};

}  // namespace
}  // namespace ciema
