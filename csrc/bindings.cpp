// The only file that includes pybind11. Checks nothing but dtype and contiguity: validation lives in
// megatron_tropd/data/packing/validate.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "forest.hpp"
#include "packing.hpp"
#include "stream.hpp"

namespace py = pybind11;

namespace {

// Without a cast flag and with noconvert: another dtype is a TypeError, never a silent copy.
using Int64Array = py::array_t<int64_t, py::array::c_style>;
using UInt8Array = py::array_t<uint8_t, py::array::c_style>;

// Hands a vector over to numpy without copying it.
py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  py::capsule owner(owned, [](void* pointer) { delete static_cast<std::vector<int64_t>*>(pointer); });
  return py::array_t<int64_t>(static_cast<py::ssize_t>(owned->size()), owned->data(), owner);
}

py::tuple assign_packs(const Int64Array& lengths, const Int64Array& sequence_ids, int64_t capacity,
                       int64_t num_replicas, int64_t linear_work) {
  const int64_t *length = lengths.data(), *id = sequence_ids.data();
  const auto n = static_cast<std::size_t>(lengths.size());
  tropd::Assignment result;
  {
    py::gil_scoped_release release;
    result = tropd::assign_packs(length, id, n, capacity, num_replicas, linear_work);
  }
  return py::make_tuple(to_numpy(std::move(result.order)), to_numpy(std::move(result.pack_offsets)));
}

py::tuple assign_items(const Int64Array& sizes, const Int64Array& works, const Int64Array& ids, int64_t capacity,
                       int64_t num_replicas) {
  const int64_t *size = sizes.data(), *work = works.data(), *id = ids.data();
  const auto n = static_cast<std::size_t>(sizes.size());
  tropd::Assignment result;
  {
    py::gil_scoped_release release;
    result = tropd::assign_items(size, work, id, n, capacity, num_replicas);
  }
  return py::make_tuple(to_numpy(std::move(result.order)), to_numpy(std::move(result.pack_offsets)));
}

py::tuple trie_order(const Int64Array& tokens, const Int64Array& lengths, const Int64Array& sequence_ids) {
  const int64_t *token = tokens.data(), *length = lengths.data(), *id = sequence_ids.data();
  const auto n = static_cast<std::size_t>(lengths.size());
  tropd::TrieOrder result;
  {
    py::gil_scoped_release release;
    std::vector<int64_t> starts(n, 0);
    for (std::size_t i = 1; i < n; ++i) starts[i] = starts[i - 1] + length[i - 1];
    result = tropd::trie_order(token, starts.data(), length, id, n);
  }
  return py::make_tuple(to_numpy(std::move(result.order)), to_numpy(std::move(result.common)));
}

py::tuple find_rows(const Int64Array& tokens, const Int64Array& lengths, const Int64Array& pack_offsets,
                    const Int64Array& token_offsets) {
  const auto num_packs = static_cast<std::size_t>(pack_offsets.size()) - 1;
  py::array_t<int64_t> row(tokens.size()), num_rows(static_cast<py::ssize_t>(num_packs));
  const int64_t *token = tokens.data(), *length = lengths.data();
  const int64_t *sequences = pack_offsets.data(), *offset = token_offsets.data();
  int64_t *rows = row.mutable_data(), *counts = num_rows.mutable_data();
  {
    py::gil_scoped_release release;
    tropd::find_rows(token, length, sequences, offset, num_packs, rows, counts);
  }
  return py::make_tuple(row, num_rows);
}

py::tuple build_stream(const Int64Array& tokens, const UInt8Array& regions, const Int64Array& rows,
                       const Int64Array& pack_offsets, int64_t multiple_of) {
  static_assert(sizeof(tropd::SequenceRow) == 3 * sizeof(int64_t), "a row of the [S, 3] table is a SequenceRow");
  const auto* row = reinterpret_cast<const tropd::SequenceRow*>(rows.data());
  const auto num_packs = static_cast<std::size_t>(pack_offsets.size()) - 1;
  tropd::Layout layout = tropd::plan_stream(row, pack_offsets.data(), num_packs, multiple_of);
  const auto size = static_cast<py::ssize_t>(layout.token_offsets.back());
  py::array_t<int64_t> token(size), target(size), position(size), sequence(size);
  py::array_t<uint8_t> region(size);
  py::array_t<int32_t> cu_seqlens(static_cast<py::ssize_t>(layout.cu_offsets.back()));
  py::array_t<int64_t> num_valid(static_cast<py::ssize_t>(num_packs));
  const tropd::Stream out{token.mutable_data(),    target.mutable_data(),     position.mutable_data(),
                          region.mutable_data(),   sequence.mutable_data(),   cu_seqlens.mutable_data(),
                          num_valid.mutable_data()};
  const int64_t *token_in = tokens.data(), *offset = pack_offsets.data();
  const uint8_t* region_in = regions.data();
  {
    py::gil_scoped_release release;
    tropd::build_stream(token_in, region_in, row, offset, layout, out);
  }
  return py::make_tuple(token, target, position, region, sequence, cu_seqlens, num_valid,
                        to_numpy(std::move(layout.token_offsets)), to_numpy(std::move(layout.cu_offsets)));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled twins of megatron_tropd reference functions.";
  m.attr("INTERFACE") = 3;  // raised whenever a signature changes: data/packing/api.py knows an older build by it
  m.def("assign_packs", &assign_packs, py::arg("lengths").noconvert(), py::arg("sequence_ids").noconvert(),
        py::kw_only(), py::arg("capacity"), py::arg("num_replicas"), py::arg("linear_work"));
  m.def("build_stream", &build_stream, py::arg("tokens").noconvert(), py::arg("regions").noconvert(),
        py::arg("rows").noconvert(), py::arg("pack_offsets").noconvert(), py::kw_only(), py::arg("multiple_of"));
  m.def("assign_items", &assign_items, py::arg("sizes").noconvert(), py::arg("works").noconvert(),
        py::arg("ids").noconvert(), py::kw_only(), py::arg("capacity"), py::arg("num_replicas"));
  m.def("trie_order", &trie_order, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(),
        py::arg("sequence_ids").noconvert());
  m.def("find_rows", &find_rows, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(),
        py::arg("pack_offsets").noconvert(), py::arg("token_offsets").noconvert());
}
