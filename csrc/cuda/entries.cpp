// The table of entries and their arguments; one in each library that holds kernels.
#include "../common/entries.h"

#include <stdexcept>

#include "../common/argument_values.h"

namespace ciema {
namespace {

std::map<std::string, Entry::Function>& table() {
  static std::map<std::string, Entry::Function> entries;
  return entries;
}

template <class Value>
Value need(const std::map<std::string, Value>& values, const char* name) {
  const auto found = values.find(name);
  if (found == values.end()) throw std::invalid_argument(std::string("no argument named ") + name);
  return found->second;
}

}  // namespace

int64_t Arguments::integer(const char* name) const { return need(values.integers, name); }

float Arguments::real(const char* name) const { return static_cast<float>(need(values.reals, name)); }

void* Arguments::address(const char* name) const {
  const auto found = values.pointers.find(name);
  return found == values.pointers.end() ? nullptr : found->second;
}

Entry::Entry(const char* name, Function function) { table()[name] = function; }

Entry::Function find_entry(const char* name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : found->second;
}

unsigned grid_size(int64_t count, int64_t limit) {
  if (count < 1 || count > limit) {
    throw std::invalid_argument("a launch of " + std::to_string(count) + " blocks, limit " +
                                std::to_string(limit));
  }
  return static_cast<unsigned>(count);
}

void fail_launch(const char* kernel, const char* message) {
  throw std::runtime_error(std::string(kernel) + ": " + message);
}

}  // namespace ciema
