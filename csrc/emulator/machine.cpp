#include "machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "findings.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

namespace {
constexpr size_t kMaxDynamicShared = 227 * 1024;  // of sm_90, the largest we compile for
}  // namespace

void Machine::configure(Order order, uint32_t seed) {
  order_ = order;
  random_.seed(seed);
}

void Machine::launch(const std::string& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes,
                     Body body, const void* closure) {
  const std::string what = "launch of " + kernel + ": ";
  if (block.count() == 0 || block.count() > kMaxThreads) {
    throw std::invalid_argument(what + "block of " + std::to_string(block.count()) +
                                " threads, legal are 1 to " + std::to_string(kMaxThreads));
  }
  if (grid.count() == 0 || grid.y > 65535 || grid.z > 65535) {
    throw std::invalid_argument(what + "grid " + std::to_string(grid.x) + "x" +
                                std::to_string(grid.y) + "x" + std::to_string(grid.z) +
                                " is not legal (y and z from 1 to 65535)");
  }
  if (dynamic_shared_bytes > kMaxDynamicShared) {
    throw std::invalid_argument(what + std::to_string(dynamic_shared_bytes) +
                                " bytes of dynamic shared memory, at most " +
                                std::to_string(kMaxDynamicShared));
  }
  kernel_ = kernel;
  grid_dim_ = grid;
  block_dim_ = block;
  dynamic_shared_bytes_ = dynamic_shared_bytes;
  body_ = body;
  closure_ = closure;
  abandoned_ = false;
  counters_.clear();
  memory().forget_accesses();
  traffic().count("launches");
  for (const size_t linear : block_order()) {
    block_linear_ = static_cast<int32_t>(linear);
    block_index_ = {static_cast<unsigned>(linear % grid.x),
                    static_cast<unsigned>(linear / grid.x % grid.y),
                    static_cast<unsigned>(linear / grid.x / grid.y)};
    run_block();
    traffic().end_block();
    memory().release_shared();
    shared_arrays_.clear();
    dynamic_shared_ = nullptr;
    if (abandoned_) return;
  }
  check_counters();
}

std::vector<size_t> Machine::block_order() {
  std::vector<size_t> order(grid_dim_.count());
  std::iota(order.begin(), order.end(), size_t{0});
  if (order_ == Order::kReverse) std::reverse(order.begin(), order.end());
  if (order_ == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  if (order_ == Order::kInterleaved) {
    std::stable_partition(order.begin(), order.end(), [](size_t i) { return i % 2 == 1; });
  }
  return order;
}

std::vector<unsigned> Machine::thread_order() {
  std::vector<unsigned> order(threads_.size());
  std::iota(order.begin(), order.end(), 0u);
  if (order_ == Order::kReverse) std::reverse(order.begin(), order.end());
  if (order_ == Order::kShuffled) std::shuffle(order.begin(), order.end(), random_);
  if (order_ == Order::kInterleaved) {
    std::stable_sort(order.begin(), order.end(),
                     [](unsigned a, unsigned b) { return a % kLanes < b % kLanes; });
  }
  return order;
}

void Machine::start_threads() {
  const size_t count = block_dim_.count();
  while (fibers_.size() < count) fibers_.push_back(std::make_unique<Fiber>());
  threads_.assign(count, Thread{});
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread.index = {i % block_dim_.x, i / block_dim_.x % block_dim_.y,
                    i / block_dim_.x / block_dim_.y};
    thread.linear = i;
    thread.lane = i % kLanes;
    thread.warp = i / kLanes;
    thread.clock[thread.lane] = 1;
    thread.fiber = fibers_[i].get();
    thread.fiber->start(&Machine::thread_entry);
  }
}

void Machine::thread_entry() {
  Machine& gpu = machine();
  gpu.body_(gpu.closure_);
  gpu.current_->copies.end_thread();
  gpu.current_->state = State::kDone;
  gpu.current_->fiber->suspend();
  __builtin_unreachable();
}

void Machine::run_block() {
  epoch_ = 0;
  meetings_.clear();
  known_.clear();
  start_threads();
  std::vector<unsigned> order = thread_order();
  size_t live = threads_.size();
  while (live != 0 && !abandoned_) {
    bool progress = false;
    if (order_ == Order::kShuffled) order = thread_order();
    for (const unsigned i : order) {
      if (threads_[i].state != State::kReady) continue;
      current_ = &threads_[i];
      current_->fiber->resume();
      current_ = nullptr;
      if (abandoned_) return;
      progress = true;
      live -= threads_[i].state == State::kDone;
    }
    if (progress || live == 0) continue;
    if (open_barrier() || release_exited()) continue;
    report_deadlock();
    abandoned_ = true;
  }
}

void Machine::abandon_launch() {
  abandoned_ = true;
  current_->fiber->suspend();
  __builtin_unreachable();
}

bool Machine::is_any_stack(uintptr_t address) const {
  return std::any_of(fibers_.begin(), fibers_.end(),
                     [&](const auto& fiber) { return fiber->owns(address); });
}

std::string Machine::where() const {
  std::string text = " (";
  if (current_ != nullptr) text += "thread " + std::to_string(current_->linear) + " of ";
  return text + "block " + std::to_string(block_linear_) + ", kernel " + kernel_ + ")";
}

void* Machine::shared_array(const std::string& name, size_t bytes, const Site& site) {
  void*& array = shared_arrays_[{name, site}];
  if (array == nullptr) {
    const Region& region =
        memory().allocate(name, bytes, Memory::kSharedElementBytes, Role::kShared, 0);
    array = reinterpret_cast<void*>(region.begin);
  }
  return array;
}

void* Machine::dynamic_shared() {
  if (dynamic_shared_ == nullptr) {
    const Region& region = memory().allocate("dynamic", dynamic_shared_bytes_,
                                             Memory::kSharedElementBytes, Role::kShared, 0);
    dynamic_shared_ = reinterpret_cast<void*>(region.begin);
  }
  return dynamic_shared_;
}

Machine& machine() {
  static Machine gpu;
  return gpu;
}

}  // namespace emulator
