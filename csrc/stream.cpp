#include "stream.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tropd {
namespace {

constexpr uint8_t kPrefix = 1, kContinuation = 2, kPad = 3;  // megatron_tropd.types.Region

bool carries_loss(uint8_t region) { return region == kPrefix || region == kContinuation; }

// Returns how many of its predictions carry loss.
int64_t write_sequence(const int64_t* tokens, const uint8_t* regions, const SequenceRow& row, int64_t at,
                       const Stream& out) {
  const int64_t* source = tokens + row.start;
  const int64_t last = row.length - 1;
  std::memcpy(out.token + at, source, row.length * sizeof(int64_t));
  std::memcpy(out.target + at, source + 1, last * sizeof(int64_t));
  out.target[at + last] = 0;
  std::iota(out.position + at, out.position + at + row.length, int64_t{0});
  std::fill_n(out.sequence + at, row.length, row.sequence_id);
  // Position t predicts token t + 1 and has the region of that.
  uint8_t* region = out.region + at;
  std::memcpy(region, regions + row.start + 1, last);
  region[last] = kPad;
  return std::count_if(region, region + last, carries_loss);
}

void write_padding(int64_t at, int64_t count, const Stream& out) {
  std::fill_n(out.token + at, count, int64_t{0});
  std::fill_n(out.target + at, count, int64_t{0});
  std::iota(out.position + at, out.position + at + count, int64_t{0});
  std::fill_n(out.region + at, count, kPad);
  std::fill_n(out.sequence + at, count, int64_t{-1});
}

}  // namespace

Layout plan_stream(const SequenceRow* rows, const int64_t* pack_offsets, std::size_t num_packs, int64_t multiple_of) {
  Layout layout;
  layout.token_offsets.assign(num_packs + 1, 0);
  layout.cu_offsets.assign(num_packs + 1, 0);
  for (std::size_t pack = 0; pack < num_packs; ++pack) {
    int64_t used = 0;
    for (int64_t i = pack_offsets[pack]; i < pack_offsets[pack + 1]; ++i) used += rows[i].length;
    const int64_t blocks = std::max<int64_t>((used + multiple_of - 1) / multiple_of, 1);
    const int64_t size = blocks * multiple_of;
    const int64_t sequences = pack_offsets[pack + 1] - pack_offsets[pack];
    layout.token_offsets[pack + 1] = layout.token_offsets[pack] + size;
    layout.cu_offsets[pack + 1] = layout.cu_offsets[pack] + sequences + 1 + (size > used ? 1 : 0);
  }
  return layout;
}

void build_stream(const int64_t* tokens, const uint8_t* regions, const SequenceRow* rows, const int64_t* pack_offsets,
                  const Layout& layout, const Stream& out) {
  for (std::size_t pack = 0; pack + 1 < layout.token_offsets.size(); ++pack) {
    const int64_t begin = layout.token_offsets[pack], end = layout.token_offsets[pack + 1];
    int32_t* boundary = out.cu_seqlens + layout.cu_offsets[pack];
    int64_t at = begin, valid = 0;
    *boundary++ = 0;
    for (int64_t i = pack_offsets[pack]; i < pack_offsets[pack + 1]; ++i) {
      valid += write_sequence(tokens, regions, rows[i], at, out);
      at += rows[i].length;
      *boundary++ = static_cast<int32_t>(at - begin);
    }
    if (at < end) {
      write_padding(at, end - at, out);
      *boundary = static_cast<int32_t>(end - begin);
    }
    out.num_valid[pack] = valid;
  }
}

}  // namespace tropd
