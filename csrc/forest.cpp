#include "forest.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace tropd {
namespace {

using Ints = std::vector<int64_t>;

// Sequences first .. last - 1 of the order, which are known to agree in their first `depth` tokens.
struct Branch {
  std::size_t first, last;
  int64_t depth;
};

class TrieSort {
 public:
  TrieSort(const int64_t* tokens, const int64_t* starts, const int64_t* lengths, const int64_t* ids, std::size_t n)
      : tokens_(tokens), starts_(starts), lengths_(lengths), ids_(ids) {
    result_.order.resize(n);
    result_.common.assign(n, 0);
    std::iota(result_.order.begin(), result_.order.end(), 0);
  }

  TrieOrder run() && {
    open_.push_back({0, result_.order.size(), 0});
    while (!open_.empty()) {
      const Branch branch = open_.back();
      open_.pop_back();
      if (branch.last - branch.first > 1) split(branch);
    }
    return std::move(result_);
  }

 private:
  // How far all sequences of the branch agree, which is `depth` at least.
  int64_t agreement(const Branch& branch) const {
    const int64_t one = result_.order[branch.first];
    const int64_t* reference = tokens_ + starts_[one];
    int64_t agreed = lengths_[one];
    for (std::size_t i = branch.first + 1; i < branch.last && agreed > branch.depth; ++i) {
      const int64_t other = result_.order[i];
      const int64_t* begin = tokens_ + starts_[other];
      const int64_t most = std::min(agreed, lengths_[other]);
      agreed = std::mismatch(reference + branch.depth, reference + most, begin + branch.depth).first - reference;
    }
    return agreed;
  }

  void split(const Branch& branch) {
    const int64_t depth = agreement(branch);
    keyed_.clear();
    for (std::size_t i = branch.first; i < branch.last; ++i) {
      const int64_t sequence = result_.order[i];
      const bool ends = lengths_[sequence] == depth;  // before every token; the ends are equal, and go by id
      keyed_.push_back({ends ? -1 : tokens_[starts_[sequence] + depth], ends ? ids_[sequence] : 0, sequence});
    }
    std::sort(keyed_.begin(), keyed_.end());
    std::size_t first = branch.first;
    for (std::size_t i = 0; i < keyed_.size(); ++i) {
      const std::size_t at = branch.first + i;
      result_.order[at] = keyed_[i].sequence;
      if (i > 0) result_.common[at] = depth;  // branches below raise it among their own
      if (i > 0 && keyed_[i].token != keyed_[i - 1].token) {
        if (keyed_[i - 1].token >= 0) open_.push_back({first, at, depth + 1});
        first = at;
      }
    }
    if (keyed_.back().token >= 0) open_.push_back({first, branch.last, depth + 1});
  }

  struct Keyed {
    int64_t token, id, sequence;
    bool operator<(const Keyed& other) const {
      if (token != other.token) return token < other.token;
      if (id != other.id) return id < other.id;
      return sequence < other.sequence;
    }
  };

  const int64_t *tokens_, *starts_, *lengths_, *ids_;
  TrieOrder result_;
  std::vector<Branch> open_;
  std::vector<Keyed> keyed_;
};

}  // namespace

TrieOrder trie_order(const int64_t* tokens, const int64_t* starts, const int64_t* lengths, const int64_t* ids,
                     std::size_t n) {
  return TrieSort(tokens, starts, lengths, ids, n).run();
}

void find_rows(const int64_t* tokens, const int64_t* lengths, const int64_t* pack_offsets, const int64_t* token_offsets,
               std::size_t num_packs, int64_t* row, int64_t* num_rows) {
  for (std::size_t pack = 0; pack < num_packs; ++pack) {
    int64_t start = token_offsets[pack], before = start, length_before = 0, next = 0;
    for (int64_t sequence = pack_offsets[pack]; sequence < pack_offsets[pack + 1]; ++sequence) {
      const int64_t length = lengths[sequence];
      const int64_t most = std::min(length, length_before);
      const int64_t* begin = tokens + before;
      const int64_t common = std::mismatch(begin, begin + most, tokens + start).first - begin;
      std::copy(row + before, row + before + common, row + start);
      std::iota(row + start + common, row + start + length, next);
      next += length - common;
      before = start;
      length_before = length;
      start += length;
    }
    std::fill(row + start, row + token_offsets[pack + 1], int64_t{-1});
    num_rows[pack] = next;
  }
}

}  // namespace tropd
