// Fuzzing of the forest that is found in a mask: any pattern of hidden, visible and biased cells,
// in both types, with sharing and without. Whatever the mask, the forest is valid and says of each
// row what the mask says. Anything else aborts.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <vector>

#include "../require.h"
#include "reader.h"
#include "relay/forest.h"

namespace {

using relay::DType;
using relay::Forest;
using relay::Segment;
using relay::Sharing;
using relay::Span;
using relay::Visibility;

enum class Cell : uint8_t { kHidden, kVisible, kBiased, kNegativeZero };

uint32_t bits_of(Cell cell, DType type) {
  const bool half = type == DType::kF16;
  switch (cell) {
    case Cell::kHidden:
      return half ? 0xfc00u : 0xff800000u;
    case Cell::kVisible:
      return 0;
    case Cell::kBiased:
      return half ? 0x3c00u : 0x3f800000u;
    case Cell::kNegativeZero:
      break;
  }
  return half ? 0x8000u : 0x80000000u;
}

struct Mask {
  relay::MaskBatch batch;
  std::vector<Cell> cells;  // [stream][row][column]
  std::vector<uint8_t> bytes;

  explicit Mask(relay::fuzz::Reader& in) {
    batch.type = in.take<uint8_t>() % 2 == 0 ? DType::kF16 : DType::kF32;
    batch.rows_per_stream = in.take<uint8_t>() % 80;
    batch.streams = in.take<uint8_t>() % 3;
    batch.columns = in.take<uint8_t>() % 250;
    batch.slots_per_block = batch.columns + in.take<uint8_t>() % 70;
    const int64_t element = batch.type == DType::kF16 ? 2 : 4;
    batch.row_stride = (batch.columns + in.take<uint8_t>() % 4) * element;
    batch.stream_stride = batch.rows_per_stream * batch.row_stride;
    const auto rows =
        static_cast<size_t>(batch.rows_per_stream) * static_cast<size_t>(batch.streams);
    cells.resize(rows * static_cast<size_t>(batch.columns));
    // Runs of like cells, or the row above once more: masks have rows that are much alike.
    const auto width = static_cast<size_t>(batch.columns);
    for (size_t at = 0; at < cells.size();) {
      const auto what = in.take<uint8_t>();
      const size_t run = 1 + in.take<uint8_t>();
      for (size_t i = 0; i < run && at < cells.size(); ++i, ++at) {
        const bool again = what % 8 >= 4 && at >= width;
        cells[at] = again ? cells[at - width] : static_cast<Cell>(what % 4);
      }
    }
    bytes.assign(rows * static_cast<size_t>(batch.row_stride) + 1, 0xff);
    for (size_t row = 0; row < rows; ++row) {
      for (size_t c = 0; c < width; ++c) {
        const uint32_t bits = bits_of(cells[row * width + c], batch.type);
        std::memcpy(
            &bytes[row * static_cast<size_t>(batch.row_stride) + c * static_cast<size_t>(element)],
            &bits, static_cast<size_t>(element));
      }
    }
    batch.data = bytes.data();
  }
};

void check(const Mask& mask, const Forest& forest) {
  validate(forest);
  const relay::MaskBatch& batch = mask.batch;
  require(forest.rows == batch.rows_per_stream * batch.streams, "a row is a row");
  const auto width = static_cast<size_t>(batch.columns);
  std::vector<uint8_t> seen(mask.cells.size());
  for (const Segment& segment : forest.segments) {
    require(segment.visibility != Visibility::kPositions, "a mask knows no positions");
    for (const uint32_t row : forest.rows_of(segment)) {
      const int64_t stream = row / static_cast<uint32_t>(batch.rows_per_stream);
      for (const Span& span : forest.spans_of(segment)) {
        require(span.slot == stream * batch.slots_per_block + span.column, "a column has its slot");
        require(span.column + span.count <= batch.columns, "a column is one of the mask's");
        for (int64_t c = span.column; c < span.column + span.count; ++c) {
          const size_t at = row * width + static_cast<size_t>(c);
          const Cell cell = mask.cells[at];
          require(segment.visibility == Visibility::kBias || cell == Cell::kVisible ||
                      cell == Cell::kNegativeZero,
                  "what is hidden or biased is looked up in the mask");
          require(seen[at]++ == 0, "a row attends a column once");
        }
      }
    }
  }
  for (size_t at = 0; at < seen.size(); ++at) {
    require(seen[at] == 1 || mask.cells[at] == Cell::kHidden, "a row attends all that it sees");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  relay::fuzz::Reader in(data, size);
  const Mask mask(in);
  Forest on;
  Forest off;
  try {
    build_from_mask(mask.batch, Sharing::kOn, on);
    build_from_mask(mask.batch, Sharing::kOff, off);
    check(mask, on);
    check(mask, off);
  } catch (const std::exception& error) {
    require(false, error.what());  // these sizes are all legal
  }
  return 0;
}
