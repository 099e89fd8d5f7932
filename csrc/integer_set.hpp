// An ordered set of small integers: what best-fit packing asks of a balanced tree, in a few machine words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tropd {

// A set of integers in [0, size) that finds its smallest member >= x in a few steps: 64-way tree of bits.
class IntegerSet {
 public:
  explicit IntegerSet(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(static_cast<std::size_t>(size), 0);
    } while (size > 1);
  }

  void insert(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] |= uint64_t{1} << (x & 63);
      x >>= 6;
    }
  }

  void erase(int64_t x) {
    for (auto& level : levels_) {
      level[x >> 6] &= ~(uint64_t{1} << (x & 63));
      if (level[x >> 6] != 0) return;
      x >>= 6;
    }
  }

  // The smallest member >= x, or -1.
  int64_t at_least(int64_t x) const {
    for (std::size_t depth = 0; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      if (static_cast<std::size_t>(x >> 6) >= level.size()) return -1;
      const uint64_t word = level[x >> 6] & (~uint64_t{0} << (x & 63));
      if (word != 0) return descend(depth, (x & ~int64_t{63}) | __builtin_ctzll(word));
      x = (x >> 6) + 1;
    }
    return -1;
  }

 private:
  int64_t descend(std::size_t depth, int64_t x) const {
    while (depth-- > 0) x = (x << 6) | __builtin_ctzll(levels_[depth][x]);
    return x;
  }

  std::vector<std::vector<uint64_t>> levels_;
};

}  // namespace tropd
