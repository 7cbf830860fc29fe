// What instrumented kernel code calls: the functions of device.h, and the callbacks that g++ puts
// in for -fsanitize=thread and -fsanitize=bounds. libtsan and libubsan are not linked: these are
// ours.
#include <cstring>
#include <string>

#include "device.h"
#include "findings.h"
#include "machine.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

namespace {

uint3 to_uint3(const Dim3& d) { return {d.x, d.y, d.z}; }
dim3 to_dim3(const Dim3& d) { return {d.x, d.y, d.z}; }

void record(const void* address, size_t bytes, Kind kind, const Site& site, bool vector) {
  if (!machine().running()) return;  // host code of an instrumented file
  memory().access(reinterpret_cast<uintptr_t>(address), bytes, kind, site, vector);
}

}  // namespace

uint3 thread_index() { return to_uint3(machine().current().index); }
uint3 block_index() { return to_uint3(machine().block_index()); }
dim3 block_dim() { return to_dim3(machine().block_dim()); }
dim3 grid_dim() { return to_dim3(machine().grid_dim()); }
int planted() { return machine().planted(); }
unsigned lane() { return machine().current().lane; }
void block_barrier(const Where& where) { machine().block_barrier(Site::at(where)); }
void sync_warp(unsigned mask, const Where& where) { machine().sync_warp(mask, Site::at(where)); }

unsigned ballot(unsigned mask, bool predicate, const char* operation, const Where& where) {
  const unsigned char vote = predicate ? 1 : 0;
  const Exchange& all = machine().exchange(mask, operation, &vote, 1, Site::at(where));
  unsigned result = 0;
  for (unsigned i = 0; i < kLanes; ++i) {
    if ((all.lanes >> i & 1u) != 0 && all.slot[i][0] != 0) result |= 1u << i;
  }
  return result;
}

void shuffle(unsigned mask, void* value, size_t bytes, int source, const char* operation,
             const Where& where) {
  const Site site = Site::at(where);
  const Exchange& all = machine().exchange(mask, operation, value, bytes, site);
  const auto from = static_cast<unsigned>(source) % kLanes;
  if ((all.lanes >> from & 1u) == 0) {
    findings().add("divergence", "shuffle source", site, {},
                   std::string(operation) + " at " + site.text() + " reads lane " +
                       std::to_string(from) + ", which takes no part" + machine().where());
  }
  std::memcpy(value, all.slot[from].data(), bytes);
}

bool arrive_last(int* counter, int expected, const Where& where) {
  return machine().arrive_last(counter, expected, Site::at(where));
}

void record_read(const void* address, size_t bytes, const Where& where) {
  record(address, bytes, Kind::kRead, Site::at(where), true);
}
void record_write(const void* address, size_t bytes, const Where& where) {
  record(address, bytes, Kind::kWrite, Site::at(where), true);
}
void record_atomic(const void* address, size_t bytes, const Where& where) {
  record(address, bytes, Kind::kAtomic, Site::at(where), true);
}
void* shared_array(const char* name, size_t bytes, const Where& where) {
  return machine().shared_array(name, bytes, Site::at(where));
}
void* dynamic_shared() { return machine().dynamic_shared(); }

}  // namespace emulator

// ---- callbacks of the compiler ----------------------------------------------------------------

namespace {

using emulator::Kind;
using emulator::Site;

// As a GPU would: a block copy of the compiler is made of accesses of at most 4 bytes.
void record_range(const char* address, size_t bytes, Kind kind, const Site& site) {
  for (size_t done = 0; done < bytes;) {
    const size_t step = bytes - done < 4 ? bytes - done : 4;
    emulator::record(address + done, step, kind, site, false);
    done += step;
  }
}

// Layouts fixed by the compiler (libsanitizer/ubsan/ubsan_value.h, ubsan_handlers.h).
struct SourceLocation {
  const char* file;
  uint32_t line;
  uint32_t column;
};
struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;
  char name[1];
};
struct OutOfBoundsData {
  SourceLocation location;
  const TypeDescriptor* array_type;
  const TypeDescriptor* index_type;
};

}  // namespace

#define CALLBACK extern "C" __attribute__((visibility("hidden")))
#define HERE Site::at_return_address(__builtin_return_address(0))
#define ACCESS_CALLBACKS(bytes)                           \
  CALLBACK void __tsan_read##bytes(void* p) {             \
    emulator::record(p, bytes, Kind::kRead, HERE, true);  \
  }                                                       \
  CALLBACK void __tsan_write##bytes(void* p) {            \
    emulator::record(p, bytes, Kind::kWrite, HERE, true); \
  }                                                       \
  CALLBACK void __tsan_volatile_read##bytes(void* p) {    \
    emulator::record(p, bytes, Kind::kRead, HERE, true);  \
  }                                                       \
  CALLBACK void __tsan_volatile_write##bytes(void* p) {   \
    emulator::record(p, bytes, Kind::kWrite, HERE, true); \
  }
ACCESS_CALLBACKS(1)
ACCESS_CALLBACKS(2)
ACCESS_CALLBACKS(4)
ACCESS_CALLBACKS(8)
ACCESS_CALLBACKS(16)

CALLBACK void __tsan_read_range(void* p, unsigned long bytes) {
  record_range(static_cast<const char*>(p), bytes, Kind::kRead, HERE);
}
CALLBACK void __tsan_write_range(void* p, unsigned long bytes) {
  record_range(static_cast<const char*>(p), bytes, Kind::kWrite, HERE);
}
CALLBACK void __tsan_init() {}
CALLBACK void __tsan_func_entry(void*) {}
CALLBACK void __tsan_func_exit() {}

CALLBACK void __ubsan_handle_out_of_bounds(const OutOfBoundsData* data, uintptr_t index) {
  if (!emulator::machine().running()) return;
  const Site site{data->location.file, data->location.line, 0};
  emulator::findings().add("out-of-bounds", data->array_type->name, site, {},
                           "index " + std::to_string(static_cast<intptr_t>(index)) +
                               " of an array " + data->array_type->name + " at " + site.text() +
                               emulator::machine().where());
  emulator::machine().abandon_launch();  // the access that follows could destroy anything
}
