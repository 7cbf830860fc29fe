// Where in the kernel's source something happened: a file and line, or a return address that the
// Python face turns into one with addr2line.
#pragma once

#include <compare>
#include <cstdint>
#include <source_location>
#include <string>

namespace emulator {

struct Site {
  const char* file = nullptr;
  uint32_t line = 0;
  uintptr_t pc = 0;

  static Site at(const std::source_location& where) { return {where.file_name(), where.line(), 0}; }
  static Site at_return_address(const void* pc) {
    return {nullptr, 0, reinterpret_cast<uintptr_t>(pc)};
  }
  auto operator<=>(const Site&) const = default;

  // "channel_statistics.cuh:42", or "@0x1f3a", an offset into the loaded library.
  std::string text() const;
};

}  // namespace emulator
