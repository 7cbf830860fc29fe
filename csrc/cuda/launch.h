// The CUDA library's one op, as the dispatcher calls it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace ciema::cuda {

using torch::stable::Tensor;

// Runs an entry on the device of the first buffer, on its current stream. `names`: of the buffers,
// integers and reals in this order, separated by blanks. An empty buffer is a null pointer.
void launch(std::string entry, std::string names, std::vector<Tensor> buffers,
            std::vector<int64_t> integers, std::vector<double> reals);

}  // namespace ciema::cuda
