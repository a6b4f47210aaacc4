// Fuzzing of the file of a learned KV prefix: any bytes. What is not refused has the sizes that it
// names, and can be put into a cache of these sizes. Anything else aborts.
#include <ggml.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <stdexcept>

#include "engine/kv_prefix.h"
#include "require.h"

namespace {

using relay::engine::KeyOrder;
using relay::engine::KvLayout;
using relay::engine::KvPrefix;

void check(const KvPrefix& prefix) {
  const auto layers = static_cast<size_t>(prefix.layers);
  require(prefix.keys.size() == layers && prefix.values.size() == layers, "layers");
  const auto elements = static_cast<size_t>(prefix.positions * prefix.row());
  for (size_t i = 0; i < layers; ++i) {
    require(prefix.keys[i].size() == elements && prefix.values[i].size() == elements, "elements");
  }
  KvLayout layout;
  layout.layers = static_cast<uint32_t>(prefix.layers);
  layout.tensors.assign(2 * layers, {GGML_TYPE_BF16, ggml_row_size(GGML_TYPE_BF16, prefix.row())});
  const KeyOrder order = prefix.head_size % 2 == 0 ? KeyOrder::kNeighbours : KeyOrder::kHalves;
  const auto bytes = kv_bytes(prefix, layout, order);
  const auto positions = static_cast<size_t>(prefix.positions);
  require(bytes.size() == positions * layout.bytes_per_token(), "bytes of the cache");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = [] {
    ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    return true;
  }();
  require(quiet, "a log that is off");
  try {
    check(relay::engine::parse_kv_prefix(std::span(data, size)));
  } catch (const std::runtime_error&) {
  }
  return 0;
}
