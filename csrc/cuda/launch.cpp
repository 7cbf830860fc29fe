// The op through which Python starts entries: device guard, current stream, arguments by name.
#include "launch.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../common/argument_values.h"
#include "../common/entries.h"

namespace ciema::cuda {

void launch(std::string entry, std::string names, std::vector<Tensor> buffers,
            std::vector<int64_t> integers, std::vector<double> reals) {
  const Entry::Function run = find_entry(entry.c_str());
  STD_TORCH_CHECK(run != nullptr, "this build has no CUDA entry named ", entry);
  STD_TORCH_CHECK(!buffers.empty(), entry, ": no tensors");
  ArgumentValues values;
  Arguments arguments{values};
  size_t start = 0;
  const auto next_name = [&]() {
    const size_t end = names.find(' ', start);
    const std::string name = names.substr(start, end - start);
    start = end == std::string::npos ? names.size() : end + 1;
    return name;
  };
  const auto device = buffers[0].get_device_index();
  for (const Tensor& buffer : buffers) {
    const std::string name = next_name();
    STD_TORCH_CHECK(buffer.is_cuda() && buffer.get_device_index() == device, entry, ": ",
                    name, " is on another device than the first tensor");
    values.pointers[name] = buffer.numel() == 0 ? nullptr : buffer.mutable_data_ptr();
  }
  for (const int64_t integer : integers) values.integers[next_name()] = integer;
  for (const double real : reals) values.reals[next_name()] = real;
  const torch::stable::accelerator::DeviceGuard guard(device);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(device, &arguments.stream));
  run(arguments);
}

}  // namespace ciema::cuda
