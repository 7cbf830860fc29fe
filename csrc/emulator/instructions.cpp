// The instructions of csrc/cuda/ptx.cuh: a warp's matrix loads and products are one exchange of all
// of its lanes each, after which every lane takes its own part of the result.
#include "instructions.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "findings.h"
#include "machine.h"
#include "memory.h"
#include "traffic.h"

namespace emulator {

namespace {

constexpr size_t kRowBytes = 16;

// What one lane brings to a product: its registers of A and B, as floats.
struct Operands {
  std::array<float, 8> a;
  std::array<float, 4> b;
};

// All 32 lanes of the warp, or a finding.
const Exchange& exchange_whole_warp(const char* operation, const void* value, size_t bytes,
                                    const Site& site) {
  const Exchange& all = machine().exchange(~0u, operation, value, bytes, site);
  if (all.lanes != ~0u) {
    findings().add("divergence", operation, site, {},
                   std::string(operation) + " at " + site.text() +
                       " needs all 32 lanes of the warp" + machine().where());
  }
  return all;
}

// The values of registers; returns how many there are in each.
int unpack(const uint32_t* registers, int count, Operand operand, float* values) {
  for (int i = 0; i < count; ++i) {
    const uint32_t bits = registers[i];
    const auto low = static_cast<uint16_t>(bits), high = static_cast<uint16_t>(bits >> 16);
    switch (operand) {
      case Operand::kFloat16:
        values[2 * i] = half_bits_to_float(low);
        values[2 * i + 1] = half_bits_to_float(high);
        break;
      case Operand::kBfloat16:
        values[2 * i] = bfloat16_bits_to_float(low);
        values[2 * i + 1] = bfloat16_bits_to_float(high);
        break;
      case Operand::kTf32:
        values[i] = __uint_as_float(bits & ~0x1FFFu);
        break;
    }
  }
  return operand == Operand::kTf32 ? 1 : 2;
}

constexpr int kExtraBits = 1;  // kept of an addend below a float's last, as on the A100

// The exponent of a double's leading bit, biased by 1023.
int biased_exponent(double value) {
  return static_cast<int>(std::bit_cast<uint64_t>(value) >> 52 & 0x7FF);
}

double power_of_two(int biased) {
  return std::bit_cast<double>(static_cast<uint64_t>(biased) << 52);
}

float truncate_to_float(double value) {
  const auto nearest = static_cast<float>(value);
  if (std::fabs(double{nearest}) <= std::fabs(value) || std::isinf(nearest)) return nearest;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - 1);  // towards zero
}

// d + the products, as the tensor cores add: exact products, cut off where the largest addend's
// float ends, and a cut-off sum. Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA
// tensor cores", PeerJ Computer Science 7:e330, 2021.
float add_products(float d, const double* products, unsigned count) {
  int largest = biased_exponent(d);
  for (unsigned i = 0; i < count; ++i) largest = std::max(largest, biased_exponent(products[i]));
  if (largest == 0 || largest == 0x7FF) {  // zeros; infinities and NaNs
    double sum = d;
    for (unsigned i = 0; i < count; ++i) sum += products[i];
    return static_cast<float>(sum);
  }
  constexpr int kBits = 23 + kExtraBits;
  const double scale = power_of_two(2 * 1023 + kBits - largest);
  auto sum = static_cast<int64_t>(d * scale);
  for (unsigned i = 0; i < count; ++i) sum += static_cast<int64_t>(products[i] * scale);
  return truncate_to_float(static_cast<double>(sum) * power_of_two(largest - kBits));
}

Operands operands_of(const Exchange& all, unsigned lane) {
  Operands operands;
  std::memcpy(&operands, all.slot[lane].data(), sizeof operands);
  return operands;
}

const char* name_of(Operand operand) {
  return operand == Operand::kFloat16    ? "mma_float16"
         : operand == Operand::kBfloat16 ? "mma_bfloat16"
                                         : "mma_tf32";
}

}  // namespace

void copy_async(void* shared, const void* global, bool inside) {
  const Site site = Site::at_return_address(__builtin_return_address(0));
  const auto source = reinterpret_cast<uintptr_t>(global);
  const auto destination = reinterpret_cast<uintptr_t>(shared);
  std::array<unsigned char, Copies::kBytes> data{};
  if (inside) {
    memory().check_space(source, false, "source of copy_async", site);
    memory().access(source, kRowBytes, Kind::kRead, site, true);
    std::memcpy(data.data(), global, data.size());
    traffic().count("copy_async_bytes", Copies::kBytes);
  }
  memory().check_space(destination, true, "destination of copy_async", site);
  memory().access(destination, kRowBytes, Kind::kWrite, site, true);
  machine().copies().start(destination, data, site);
  traffic().count("copy_async");
}

void copy_async_commit() { machine().copies().commit(); }

void copy_async_wait(unsigned pending) { machine().copies().wait(pending); }

void load_matrices(uint32_t* registers, const void* row, bool transposed, const Where& where) {
  const Site site = Site::at_return_address(__builtin_return_address(0));
  const auto address = reinterpret_cast<uintptr_t>(row);
  memory().check_space(address, true, "row of ldmatrix", site);
  memory().access(address, kRowBytes, Kind::kRead, site, true);
  const Exchange& all =
      exchange_whole_warp(transposed ? "ldmatrix.trans" : "ldmatrix", row, kRowBytes,
                          Site::at(where));
  const unsigned lane = machine().current().lane;
  const unsigned g = lane / 4, q = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    if (!transposed) {
      std::memcpy(&registers[i], &all.slot[8 * i + g][4 * q], 4);
      continue;
    }
    uint16_t low, high;
    std::memcpy(&low, &all.slot[8 * i + 2 * q][2 * g], 2);
    std::memcpy(&high, &all.slot[8 * i + 2 * q + 1][2 * g], 2);
    registers[i] = low | static_cast<uint32_t>(high) << 16;
  }
  if (lane == 0) traffic().count("ldmatrix");
}

void multiply_add(float* d, const uint32_t* a, const uint32_t* b, Operand operand,
                  const Where& where) {
  Operands mine;
  unpack(a, 4, operand, mine.a.data());
  const auto values = static_cast<unsigned>(unpack(b, 2, operand, mine.b.data()));
  const char* name = name_of(operand);
  const Exchange& all = exchange_whole_warp(name, &mine, sizeof mine, Site::at(where));
  const unsigned lane = machine().current().lane;
  const unsigned g = lane / 4, q = lane % 4;
  // products[i][half]: of d[i], by halves of the depth, which the A100 adds one after the other.
  double products[4][2][8];
  for (unsigned p = 0; p < 4; ++p) {  // the lanes of rows g and g + 8, of columns 2q and 2q + 1
    const Operands rows = operands_of(all, 4 * g + p);
    const Operands columns[2] = {operands_of(all, 8 * q + p), operands_of(all, 8 * q + 4 + p)};
    for (unsigned i = 0; i < 4; ++i) {
      for (unsigned half = 0; half < 2; ++half) {
        for (unsigned v = 0; v < values; ++v) {
          products[i][half][p * values + v] = double{rows.a[(2 * half + i / 2) * values + v]} *
                                              double{columns[i % 2].b[half * values + v]};
        }
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (const auto& half : products[i]) d[i] = add_products(d[i], half, 4 * values);
  }
  if (lane == 0) traffic().count(name);
}

}  // namespace emulator
