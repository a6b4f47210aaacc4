#include "engine/kv_state.h"

#include <cstring>
#include <stdexcept>

namespace relay::engine {

namespace {

constexpr uint32_t kMagic = 0xaf143cd8;  // of llama.cpp's llama_state_seq_get_data
constexpr uint32_t kMostLayers = 4096;

class Reader {
 public:
  explicit Reader(std::span<const uint8_t> bytes) : bytes_(bytes) {}

  std::span<const uint8_t> take(uint64_t count) {
    if (count > bytes_.size()) throw std::runtime_error("llama.cpp's state ends too early");
    const auto taken = bytes_.first(count);
    bytes_ = bytes_.subspan(count);
    return taken;
  }
  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof(T)).data(), sizeof(T));
    return value;
  }
  void expect(uint32_t value, const char* what) {
    if (number<uint32_t>() != value) {
      throw std::runtime_error(std::string("llama.cpp's state has ") + what);
    }
  }
  bool at_end() const { return bytes_.empty(); }

 private:
  std::span<const uint8_t> bytes_;
};

/// Everything before the cells; returns how many there are.
uint32_t read_head(Reader& reader) {
  reader.expect(kMagic, "another signature");
  reader.number<int32_t>();  // the sequence's id
  reader.expect(1, "more than one stream");
  return reader.number<uint32_t>();
}

int32_t read_cell(Reader& reader) {
  const auto position = reader.number<int32_t>();
  reader.expect(1, "cells of another form");
  reader.number<int32_t>();  // the sequence's id
  return position;
}

KvLayout::Rows read_rows(Reader& reader) {
  KvLayout::Rows rows;
  rows.type = reader.number<int32_t>();
  rows.row_bytes = reader.number<uint64_t>();
  return rows;
}

class Writer {
 public:
  explicit Writer(size_t size) { bytes_.reserve(size); }

  template <typename T>
  void number(T value) {
    const auto* at = reinterpret_cast<const uint8_t*>(&value);
    bytes_.insert(bytes_.end(), at, at + sizeof(T));
  }
  void bytes(std::span<const uint8_t> more) {
    bytes_.insert(bytes_.end(), more.begin(), more.end());
  }
  std::vector<uint8_t> finish() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

}  // namespace

size_t KvLayout::bytes_per_token() const {
  size_t bytes = 0;
  for (const Rows& rows : tensors) bytes += rows.row_bytes;
  return bytes;
}

std::string KvLayout::describe() const {
  std::string text = std::to_string(layers) + " layers";
  for (const Rows& rows : tensors) {
    text += ' ' + std::to_string(rows.type) + ':' + std::to_string(rows.row_bytes);
  }
  return text;
}

KvLayout read_kv_layout(std::span<const uint8_t> state) {
  Reader reader(state);
  if (read_head(reader) != 1) throw std::runtime_error("llama.cpp's state is not of one position");
  read_cell(reader);
  reader.expect(0, "transposed values");
  KvLayout layout;
  layout.layers = reader.number<uint32_t>();
  if (layout.layers == 0 || layout.layers > kMostLayers) {
    throw std::runtime_error("llama.cpp's state has no usual number of layers");
  }
  // A layer may have no values of its own; so those there are, are known by the end.
  while (layout.tensors.size() < layout.layers || !reader.at_end()) {
    if (layout.tensors.size() == size_t{2} * layout.layers) {
      throw std::runtime_error("llama.cpp's state holds more than keys and values");
    }
    layout.tensors.push_back(read_rows(reader));
    reader.take(layout.tensors.back().row_bytes);
  }
  return layout;
}

std::vector<uint8_t> take_kv(const KvLayout& layout, std::span<const uint8_t> state, int32_t begin,
                             int32_t count) {
  Reader reader(state);
  const auto cells = static_cast<size_t>(count);
  if (read_head(reader) != cells) throw std::runtime_error("llama.cpp's state has other cells");
  // Cells lie in the cache in any order.
  std::vector<size_t> row_of(cells);
  std::vector<bool> seen(cells, false);
  for (size_t i = 0; i < cells; ++i) {
    const int64_t row = int64_t{read_cell(reader)} - begin;
    if (row < 0 || row >= count || seen[static_cast<size_t>(row)]) {
      throw std::runtime_error("llama.cpp's state has other positions");
    }
    seen[static_cast<size_t>(row)] = true;
    row_of[i] = static_cast<size_t>(row);
  }
  reader.expect(0, "transposed values");
  reader.expect(layout.layers, "another number of layers");
  std::vector<uint8_t> kv(cells * layout.bytes_per_token());
  uint8_t* to = kv.data();
  for (const KvLayout::Rows& rows : layout.tensors) {
    if (read_rows(reader) != rows) throw std::runtime_error("llama.cpp's state has other tensors");
    const auto data = reader.take(cells * rows.row_bytes);
    for (size_t i = 0; i < cells; ++i) {
      std::memcpy(to + row_of[i] * rows.row_bytes, data.data() + i * rows.row_bytes,
                  rows.row_bytes);
    }
    to += cells * rows.row_bytes;
  }
  if (!reader.at_end()) throw std::runtime_error("llama.cpp's state is longer than its contents");
  return kv;
}

std::vector<uint8_t> make_kv_state(const KvLayout& layout, int32_t begin,
                                   std::span<const uint8_t> kv) {
  const size_t per_token = layout.bytes_per_token();
  if (per_token == 0 || kv.size() % per_token != 0) {
    throw std::logic_error("kv state: bytes of half a position");
  }
  const size_t cells = kv.size() / per_token;
  Writer writer(kv.size() + 12 * cells + 12 * layout.tensors.size() + 24);
  writer.number(kMagic);
  writer.number(int32_t{0});
  writer.number(uint32_t{1});
  writer.number(static_cast<uint32_t>(cells));
  for (size_t i = 0; i < cells; ++i) {
    writer.number(begin + static_cast<int32_t>(i));
    writer.number(uint32_t{1});
    writer.number(int32_t{0});
  }
  writer.number(uint32_t{0});
  writer.number(layout.layers);
  size_t at = 0;
  for (const KvLayout::Rows& rows : layout.tensors) {
    writer.number(rows.type);
    writer.number(rows.row_bytes);
    writer.bytes(kv.subspan(at, cells * rows.row_bytes));
    at += cells * rows.row_bytes;
  }
  return writer.finish();
}

}  // namespace relay::engine
