// Stage two of packing: writes every per-token array of all packs in one pass. Plain C++: knows nothing of Python.
//
// The conventions (what a position holds, the region of a target, the block of padding) are those of
// megatron_tropd/types.py; the twin is in megatron_tropd/data/packing/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tropd {

// One sequence, in the order of the stream. Its tokens are tokens[start] .. tokens[start + length - 1], and its regions
// lie likewise.
struct SequenceRow {
  int64_t start;
  int64_t length;
  int64_t sequence_id;
};

// Where each pack begins in the concatenated outputs: P + 1 offsets, the last one is the total size.
struct Layout {
  std::vector<int64_t> token_offsets;  // into the per-token arrays; each pack is rounded up to multiple_of
  std::vector<int64_t> cu_offsets;     // into cu_seqlens; a pack with padding has one block more
};

// An empty pack is multiple_of tokens of padding. Precondition: pack_offsets has num_packs + 1 ascending entries.
Layout plan_stream(const SequenceRow* rows, const int64_t* pack_offsets, std::size_t num_packs, int64_t multiple_of);

// Outputs of build_stream, owned by the caller and sized by a Layout.
struct Stream {
  int64_t* token;
  int64_t* target;
  int64_t* position;
  uint8_t* region;
  int64_t* sequence;
  int32_t* cu_seqlens;  // relative to the pack's own first token
  int64_t* num_valid;   // one per pack
};

// Fills every output. `layout` comes from plan_stream with the same rows and pack_offsets.
// Preconditions: a sequence has at least one token, and its first one carries no loss; a pack has fewer than 2^31 tokens.
void build_stream(const int64_t* tokens, const uint8_t* regions, const SequenceRow* rows, const int64_t* pack_offsets,
                  const Layout& layout, const Stream& out);

}  // namespace tropd
