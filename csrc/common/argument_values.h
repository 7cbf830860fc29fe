// What Arguments (entries.h) finds by name: filled by the caller of an entry.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace ciema {

struct ArgumentValues {
  std::map<std::string, void*> pointers;
  std::map<std::string, int64_t> integers;
  std::map<std::string, double> reals;
};

}  // namespace ciema
