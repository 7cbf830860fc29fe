// The Python module `_emulator`: buffers in, launches by name, findings and counters out. The
// Python face is tests/emulator; this file knows no kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../common/argument_values.h"
#include "../common/entries.h"
#include "findings.h"
#include "launch.h"
#include "machine.h"
#include "memory.h"
#include "traffic.h"

namespace py = pybind11;

namespace emulator {

namespace {

py::list* dry_launches = nullptr;  // where launches are noted instead of made

template <class Value>
Value by_name(const std::map<std::string, Value>& values, const std::string& name,
              const std::string& what) {
  const auto found = values.find(name);
  if (found != values.end()) return found->second;
  std::string known;
  for (const auto& [key, value] : values) known += (known.empty() ? "" : ", ") + key;
  throw std::invalid_argument("no " + what + " named " + name + "; there are: " + known);
}

void configure(const std::string& order, uint32_t seed, int planted) {
  static const std::map<std::string, Order> orders{{"forward", Order::kForward},
                                                   {"reverse", Order::kReverse},
                                                   {"shuffled", Order::kShuffled},
                                                   {"interleaved", Order::kInterleaved}};
  machine().configure(by_name(orders, order, "thread order"), seed, planted);
  findings().clear();
  traffic().clear();
  memory().release_all();
}

uintptr_t allocate(const std::string& name, const py::bytes& storage, const py::bytes& inside,
                   size_t element_bytes, const std::string& role, size_t address_modulo_256) {
  static const std::map<std::string, Role> roles{
      {"input", Role::kInput},
      {"output", Role::kOutput},
      {"inout", Role::kInOut},
      {"scratch", Role::kScratch}};
  const std::string data = storage;
  const std::string mask = inside;
  if (element_bytes == 0 || data.size() != mask.size() * element_bytes) {
    throw std::invalid_argument(name + ": storage of " + std::to_string(data.size()) +
                                " bytes for " + std::to_string(mask.size()) + " elements of " +
                                std::to_string(element_bytes) + " bytes");
  }
  Region& region = memory().allocate(name, data.size(), element_bytes, by_name(roles, role, "role"),
                                     address_modulo_256);
  std::memcpy(reinterpret_cast<void*>(region.begin), data.data(), data.size());
  for (size_t i = 0; i < mask.size(); ++i) region.cells[i].inside = mask[i] != 0;
  return region.begin;
}

py::bytes read(uintptr_t address) {
  const Region* region = memory().find(address);
  if (region == nullptr) throw std::invalid_argument("no buffer at that address");
  return {reinterpret_cast<const char*>(region->begin), region->end - region->begin};
}

void launch_entry(const std::string& name, const std::map<std::string, uintptr_t>& pointers,
                  const std::map<std::string, int64_t>& integers,
                  const std::map<std::string, double>& reals) {
  const ciema::Entry::Function entry = ciema::find_entry(name.c_str());
  if (entry == nullptr) throw std::invalid_argument("no entry named " + name);
  ciema::ArgumentValues values;
  for (const auto& [key, value] : pointers) {
    values.pointers[key] = reinterpret_cast<void*>(value);
  }
  values.integers = integers;
  values.reals = reals;
  entry({values});
}

// What an entry would launch with these arguments: (name, place of the kernel's code, grid, block,
// bytes of dynamic shared memory, the kernel's parameters) each. No kernel runs, so the pointers may lead nowhere.
py::list launch_dry(const std::string& name, const std::map<std::string, uintptr_t>& pointers,
                    const std::map<std::string, int64_t>& integers,
                    const std::map<std::string, double>& reals) {
  py::list launches;
  dry_launches = &launches;
  try {
    launch_entry(name, pointers, integers, reals);
  } catch (...) {
    dry_launches = nullptr;
    throw;
  }
  dry_launches = nullptr;
  return launches;
}

py::list all_findings() {
  memory().check_outputs();
  py::list result;
  for (const Finding& finding : findings().all()) {
    result.append(py::make_tuple(finding.kind, finding.text, finding.count));
  }
  return result;
}

// Buffer → (bytes read, bytes written), each byte once a launch: what passes between the device's
// memory and a cache that holds all of it.
py::dict touched() {
  py::dict result;
  for (const Region& region : memory().regions()) {
    if (region.role == Role::kShared) continue;
    result[py::str(region.name)] = py::make_tuple(region.touched_read, region.touched_written);
  }
  return result;
}

py::list site_traffic() {
  static const char* kinds[] = {"read", "write", "atomic"};
  py::list result;
  for (const SiteTraffic& site : traffic().sites()) {
    py::dict row;
    row["site"] = site.site.text();
    row["space"] = site.shared ? "shared" : "global";
    row["kind"] = kinds[static_cast<int>(site.kind)];
    row["bytes_per_lane"] = site.bytes_per_lane;
    row["requests"] = site.requests;
    row["bytes"] = site.bytes;
    row["units"] = site.units;
    row["ideal_units"] = site.ideal_units;
    result.append(row);
  }
  return result;
}

}  // namespace

void launch_body(const char* name, const void* kernel, dim3 grid, dim3 block,
                 size_t dynamic_shared_bytes, void (*body)(const void*), const void* closure,
                 const Parameter* parameters) {
  if (dry_launches != nullptr) {
    py::list values;
    for (; parameters->value != nullptr; ++parameters) {
      values.append(py::bytes(static_cast<const char*>(parameters->value), parameters->bytes));
    }
    const std::string place = Site::at_return_address(static_cast<const char*>(kernel) + 1).text();
    dry_launches->append(py::make_tuple(name, place, py::make_tuple(grid.x, grid.y, grid.z),
                                        py::make_tuple(block.x, block.y, block.z),
                                        dynamic_shared_bytes, values));
    return;
  }
  machine().launch(name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                   dynamic_shared_bytes, body, closure);
}

}  // namespace emulator

PYBIND11_MODULE(_emulator, module) {
  module.doc() = "CUDA kernels on the CPU, with checks; only tests build this.";
  module.def("configure", &emulator::configure, py::arg("order"), py::arg("seed"),
             py::arg("planted"));
  module.def("allocate", &emulator::allocate, py::arg("name"), py::arg("storage"),
             py::arg("inside"), py::arg("element_bytes"), py::arg("role"),
             py::arg("address_modulo_256"));
  module.def("read", &emulator::read, py::arg("address"));
  module.def("launch", &emulator::launch_entry, py::arg("name"), py::arg("pointers"),
             py::arg("integers"), py::arg("reals"));
  module.def("launch_dry", &emulator::launch_dry, py::arg("name"), py::arg("pointers"),
             py::arg("integers"), py::arg("reals"));
  module.def("findings", &emulator::all_findings);
  module.def("totals", [] { return emulator::traffic().totals(); });
  module.def("touched", &emulator::touched);
  module.def("sites", &emulator::site_traffic);
}
