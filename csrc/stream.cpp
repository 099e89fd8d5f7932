#include "stream.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace tropd {
namespace {

constexpr uint8_t kPrompt = 0, kPrefix = 1, kContinuation = 2, kPad = 3;  // megatron_tropd.types.Region

void write_sequence(const int64_t* tokens, const SequenceRow& row, int64_t at, const Stream& out) {
  const int64_t* source = tokens + row.start;
  const int64_t last = row.length - 1;
  std::memcpy(out.token + at, source, row.length * sizeof(int64_t));
  std::memcpy(out.target + at, source + 1, last * sizeof(int64_t));
  out.target[at + last] = 0;
  std::iota(out.position + at, out.position + at + row.length, int64_t{0});
  std::fill_n(out.sequence + at, row.length, row.sequence_id);
  // Position t predicts token t + 1, so every region begins one position before its first token.
  uint8_t* region = out.region + at;
  const int64_t prompt_end = row.prompt_length - 1;
  std::fill_n(region, prompt_end, kPrompt);
  std::fill_n(region + prompt_end, row.prefix_length, kPrefix);
  std::fill(region + prompt_end + row.prefix_length, region + last, kContinuation);
  region[last] = kPad;
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

void build_stream(const int64_t* tokens, const SequenceRow* rows, const int64_t* pack_offsets, const Layout& layout,
                  const Stream& out) {
  for (std::size_t pack = 0; pack + 1 < layout.token_offsets.size(); ++pack) {
    const int64_t begin = layout.token_offsets[pack], end = layout.token_offsets[pack + 1];
    int32_t* boundary = out.cu_seqlens + layout.cu_offsets[pack];
    int64_t at = begin, valid = 0;
    *boundary++ = 0;
    for (int64_t i = pack_offsets[pack]; i < pack_offsets[pack + 1]; ++i) {
      write_sequence(tokens, rows[i], at, out);
      at += rows[i].length;
      valid += rows[i].length - rows[i].prompt_length;
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
