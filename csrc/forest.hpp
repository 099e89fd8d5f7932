// Sequences that begin alike: their order in a trie, and the rows that remain when equal histories are one. Plain C++:
// knows nothing of Python or numpy. The twin in megatron_tropd/data/packing/forest.py returns exactly the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tropd {

// Sequences as a walk through their trie meets them: by tokens, a sequence before those that continue it, equal ones by
// id. common[i] is the number of tokens with which order[i] begins like order[i - 1]; common[0] is 0.
struct TrieOrder {
  std::vector<int64_t> order;
  std::vector<int64_t> common;
};

// Sequence i is tokens[starts[i]] .. tokens[starts[i] + lengths[i] - 1]. Every token is looked at once, and of what
// sequences share, once in each: linear time but for sorting the branches of a node.
// Preconditions: n >= 1, lengths[i] >= 1, ids are distinct, tokens are >= 0.
TrieOrder trie_order(const int64_t* tokens, const int64_t* starts, const int64_t* lengths, const int64_t* ids,
                     std::size_t n);

// The row of every token of a stream of packs, numbered within its pack in the order of first appearance: two tokens
// whose sequences are equal up to them have one. Padding has row -1.
//
// Pack p holds the sequences pack_offsets[p] .. pack_offsets[p + 1] - 1, which lie one after the other from
// token_offsets[p] on and must be in the order of their trie. Fills row[0] .. row[token_offsets[num_packs] - 1] and
// num_rows[0] .. num_rows[num_packs - 1].
void find_rows(const int64_t* tokens, const int64_t* lengths, const int64_t* pack_offsets, const int64_t* token_offsets,
               std::size_t num_packs, int64_t* row, int64_t* num_rows);

}  // namespace tropd
