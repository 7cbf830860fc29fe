// The emulated GPU: blocks one after another, every thread of a block a fiber, scheduled by hand.
//
// Fibers change only at barriers, warp operations and the end of a thread, in one of four orders;
// the shadow memory (memory.h) finds races between those points whatever the order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "copies.h"
#include "fiber.h"
#include "site.h"

namespace emulator {

constexpr unsigned kLanes = 32;
constexpr size_t kMaxThreads = 1024;  // of a block

struct Dim3 {
  unsigned x = 1;
  unsigned y = 1;
  unsigned z = 1;
  size_t count() const { return size_t{x} * y * z; }
};

enum class Order {
  kForward,
  kReverse,
  kShuffled,     // drawn anew from the seed at every turn
  kInterleaved,  // lane 0 of every warp, then lane 1, ...; blocks with odd numbers first
};

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct Thread {
  Dim3 index;
  unsigned linear = 0;
  unsigned lane = 0;
  unsigned warp = 0;
  State state = State::kReady;
  Site waits_at;
  // What this lane knows of the other lanes' progress: a vector clock, joined by __syncwarp.
  std::array<uint32_t, kLanes> clock{};
  Copies copies;
  Fiber* fiber = nullptr;
};

// What the lanes of a warp exchanged in one warp operation.
struct Exchange {
  static constexpr size_t kSlotBytes = 128;
  uint32_t lanes = 0;  // that took part
  std::array<std::array<unsigned char, kSlotBytes>, kLanes> slot{};
};

class Machine {
 public:
  using Body = void (*)(const void* closure);

  void configure(Order order, uint32_t seed);
  void launch(const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
              Body body, const void* closure);

  bool running() const { return current_ != nullptr; }
  const Thread& current() const { return *current_; }
  Copies& copies() { return current_->copies; }  // of the running thread
  int32_t block_linear() const { return block_linear_; }
  uint32_t epoch() const { return epoch_; }
  Dim3 block_index() const { return block_index_; }
  Dim3 block_dim() const { return block_dim_; }
  Dim3 grid_dim() const { return grid_dim_; }
  // Whether that block was in that epoch before something the running block has waited for.
  bool knows(int32_t block, uint32_t epoch) const;
  bool is_any_stack(uintptr_t address) const;
  std::string where() const;  // " (thread 3 of block 0, kernel scale)"

  // ---- what device code calls ----
  void block_barrier(const Site& site);
  // Waits for all lanes of `mask`, then gives what each of them brought. The answer stands until
  // the caller's next warp operation.
  const Exchange& exchange(uint32_t mask, const char* operation, const void* value, size_t bytes,
                           const Site& site);
  void sync_warp(uint32_t mask, const Site& site);
  // ciema::arrive_last: the whole block arrives at a counter in global memory.
  bool arrive_last(int* counter, int expected, const Site& site);
  void* shared_array(const std::string& name, size_t bytes, const Site& site);
  void* dynamic_shared();
  [[noreturn]] void abandon_launch();  // after an error that can't be survived

 private:
  struct Meeting {  // of the lanes of one mask in one warp
    uint32_t arrived = 0;
    const char* operation = nullptr;
    Site site;
    unsigned turn = 0;
    std::array<Exchange, 2> exchanges;  // a lane may enter the next before all have read this one
  };
  // For blocks that arrived at a counter, the epoch before which all is done: what is known to
  // whoever comes last.
  using Arrivals = std::unordered_map<int32_t, uint32_t>;
  using MeetingKey = std::pair<unsigned, uint32_t>;  // warp, mask

  void run_block();
  void start_threads();
  std::vector<unsigned> thread_order();
  std::vector<size_t> block_order();
  bool open_barrier();    // when all live threads have come; false: they haven't
  bool release_exited();  // completes warp operations whose missing lanes have ended
  void report_deadlock();
  void check_counters();
  void complete(const MeetingKey& key, Meeting& meeting);
  uint32_t existing_lanes(unsigned warp) const;
  static void thread_entry();

  Order order_ = Order::kForward;
  std::mt19937 random_;
  std::string kernel_;
  Dim3 grid_dim_, block_dim_, block_index_;
  int32_t block_linear_ = -1;
  uint32_t epoch_ = 0;
  size_t dynamic_shared_bytes_ = 0;
  Body body_ = nullptr;
  const void* closure_ = nullptr;
  bool abandoned_ = false;
  Thread* current_ = nullptr;
  std::map<int*, Arrivals> counters_;  // of this launch, not complete
  Arrivals known_;                     // to the running block
  bool is_last_ = false;               // the running block's latest arrive_last
  std::vector<Thread> threads_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::map<MeetingKey, Meeting> meetings_;
  std::map<std::pair<std::string, Site>, void*> shared_arrays_;
  void* dynamic_shared_ = nullptr;
};

Machine& machine();

}  // namespace emulator
