// Stage one of packing: who goes where, sequences -> packs -> replicas. Plain C++: knows nothing of Python or numpy.
//
// The twin in megatron_tropd/data/packing/reference.py returns exactly the same numbers: all arithmetic is on integers
// and every tie is broken by a stated rule.
//
// The caller validates (megatron_tropd/data/packing/validate.py); what is called a precondition here is not checked again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tropd {

// Who goes where. Pack p holds the sequences order[pack_offsets[p]] .. order[pack_offsets[p + 1] - 1] (indices into the
// input), longest first. The packs of replica r are [r * P / R, (r + 1) * P / R), most work first.
struct Assignment {
  std::vector<int64_t> order;
  std::vector<int64_t> pack_offsets;
};

// Assigns n sequences to packs of at most `capacity` tokens and deals the packs to replicas, as many to each.
//
// The work of a sequence of L tokens is L * (linear_work + L). The answer does not depend on the order of the input.
// Preconditions: 1 <= n < 2^31, 1 <= lengths[i] <= capacity < 2^31, ids are distinct, num_replicas >= 1,
// linear_work >= 0, and the work of everything together fits 61 bits.
Assignment assign_packs(const int64_t* lengths, const int64_t* ids, std::size_t n, int64_t capacity,
                        int64_t num_replicas, int64_t linear_work);

// The same for items whose work is given, and need not follow from their size. Preconditions as above.
Assignment assign_items(const int64_t* sizes, const int64_t* works, const int64_t* ids, std::size_t n, int64_t capacity,
                        int64_t num_replicas);

}  // namespace tropd
