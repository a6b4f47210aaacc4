#include "test_graphs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace relay::ggml::test {
namespace {

constexpr size_t kMaxNodes = 256;

std::vector<float> values_of(const ggml_tensor* t) {
  std::vector<float> out(static_cast<size_t>(ggml_nelements(t)));
  const std::vector<char> raw = [&] {
    std::vector<char> bytes(ggml_nbytes(t));
    ggml_backend_tensor_get(t, bytes.data(), 0, bytes.size());
    return bytes;
  }();
  if (t->type == GGML_TYPE_F32) {
    std::copy_n(reinterpret_cast<const float*>(raw.data()), out.size(), out.begin());
  } else {
    ggml_get_type_traits(t->type)->to_float(raw.data(), out.data(), ggml_nelements(t));
  }
  return out;
}

void set_values(ggml_tensor* t, const std::vector<float>& values) {
  std::vector<char> raw(ggml_nbytes(t));
  if (t->type == GGML_TYPE_F32) {
    std::copy_n(values.begin(), values.size(), reinterpret_cast<float*>(raw.data()));
  } else {
    ggml_quantize_chunk(t->type, values.data(), raw.data(), 0, ggml_nelements(t) / t->ne[0],
                        t->ne[0], nullptr);
  }
  ggml_backend_tensor_set(t, raw.data(), 0, raw.size());
}

}  // namespace

Graph::Graph()
    : context_(ggml_init({.mem_size = kMaxNodes * ggml_tensor_overhead() +
                                      ggml_graph_overhead_custom(kMaxNodes, false),
                          .mem_buffer = nullptr,
                          .no_alloc = true})),
      graph_(ggml_new_graph_custom(context_.get(), kMaxNodes, false)) {}

size_t Graph::add(const AttentionCase& c) {
  ggml_tensor* source = nullptr;
  ggml_tensor* mask = nullptr;
  if (c.mask) {
    source = ggml_new_tensor_4d(context(), c.computed_mask ? GGML_TYPE_F32 : GGML_TYPE_F16, c.slots,
                                c.rows, c.mask_heads, c.shared_mask ? 1 : c.streams);
    mask = c.computed_mask ? ggml_cast(context(), source, GGML_TYPE_F16) : source;
  }
  return add(c, source, mask);
}

size_t Graph::add_with_mask_of(const AttentionCase& c, size_t other) {
  return add(c, nodes_[other].mask_source, nodes_[other].mask);
}

size_t Graph::add(const AttentionCase& c, ggml_tensor* source, ggml_tensor* mask) {
  ggml_context* const ctx = context();
  Node n{c, nullptr, nullptr, nullptr, source, mask, nullptr, nullptr};
  n.q = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, c.k_dim, c.rows, c.heads, c.streams);
  n.k = ggml_new_tensor_4d(ctx, c.k_type, c.k_dim, c.slots, c.kv_heads, c.streams);
  n.v = ggml_new_tensor_4d(ctx, c.v_type, c.v_dim, c.slots, c.kv_heads, c.streams);
  n.out = ggml_flash_attn_ext(ctx, n.q, n.k, n.v, mask, 1.0f / std::sqrt(float(c.k_dim)),
                              c.max_bias, c.softcap);
  if (c.sinks) {
    n.sinks = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, c.heads);
    ggml_flash_attn_ext_add_sinks(n.out, n.sinks);
  }
  ggml_build_forward_expand(graph_, n.out);
  nodes_.push_back(n);
  return nodes_.size() - 1;
}

void Graph::fill(ggml_backend_t backend, unsigned seed) {
  if (buffer_ == nullptr) {
    buffer_.reset(ggml_backend_alloc_ctx_tensors(context(), backend));
  }
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  const auto fill_normal = [&](ggml_tensor* t) {
    std::vector<float> values(static_cast<size_t>(ggml_nelements(t)));
    for (float& x : values) x = normal(random);
    set_values(t, values);
  };
  for (const Node& n : nodes_) {
    fill_normal(n.q);
    fill_normal(n.k);
    fill_normal(n.v);
    if (n.sinks != nullptr) fill_normal(n.sinks);
    if (n.mask_source == nullptr) continue;
    // Half of the slots are everyone's; of the rest, every row sees its own; a bias here and there.
    std::vector<float> mask(static_cast<size_t>(ggml_nelements(n.mask_source)));
    const int64_t slots = n.mask_source->ne[0];
    const int64_t rows = n.mask_source->ne[1];
    for (size_t i = 0; i < mask.size(); ++i) {
      const int64_t slot = static_cast<int64_t>(i) % slots;
      const int64_t row = static_cast<int64_t>(i) / slots;  // over heads and streams, too
      const bool visible = slot < slots / 2 || (slot + row) % rows == 0;
      mask[i] = !visible ? -std::numeric_limits<float>::infinity()
                         : (n.c.max_bias > 0.0f ? -float((slot + row) % 32) : 0.0f);
    }
    set_values(n.mask_source, mask);
  }
}

double Graph::error(size_t index) const {
  const Node& n = nodes_[index];
  const AttentionCase& c = n.c;
  const std::vector<float> q = values_of(n.q);
  const std::vector<float> k = values_of(n.k);
  const std::vector<float> v = values_of(n.v);
  const std::vector<float> out = values_of(n.out);
  const std::vector<float> mask =
      n.mask_source != nullptr ? values_of(n.mask_source) : std::vector<float>();
  const std::vector<float> sinks = n.sinks != nullptr ? values_of(n.sinks) : std::vector<float>();

  double difference = 0.0;
  double norm = 0.0;
  std::vector<double> expected(static_cast<size_t>(c.v_dim));
  for (int64_t stream = 0; stream < c.streams; ++stream) {
    for (int64_t head = 0; head < c.heads; ++head) {
      // ggml's ALiBi: heads beyond the largest power of two interleave a second series.
      const double power = std::pow(2.0, std::floor(std::log2(double(c.heads))));
      const double h = double(head);
      const double slope = c.max_bias <= 0.0f ? 1.0
                           : h < power
                               ? std::pow(2.0, -c.max_bias * (h + 1) / power)
                               : std::pow(2.0, -c.max_bias / 2 * (2 * (h - power) + 1) / power);
      const int64_t kv_head = head / (c.heads / c.kv_heads);
      for (int64_t row = 0; row < c.rows; ++row) {
        double sum = 0.0;
        std::fill(expected.begin(), expected.end(), 0.0);
        if (!sinks.empty()) sum = std::exp(double(sinks[size_t(head)]));
        for (int64_t slot = 0; slot < c.slots; ++slot) {
          double bias = 0.0;
          if (n.mask_source != nullptr) {
            const int64_t plane = (n.mask_source->ne[3] == 1 ? 0 : stream) * n.mask_source->ne[2] +
                                  head % n.mask_source->ne[2];
            bias = slope * mask[size_t((plane * n.mask_source->ne[1] + row) * c.slots + slot)];
          }
          if (std::isinf(bias)) continue;
          double logit = 0.0;
          const size_t q_at = size_t(((stream * c.heads + head) * c.rows + row) * c.k_dim);
          const size_t kv_at = size_t((stream * c.kv_heads + kv_head) * c.slots + slot);
          for (int64_t d = 0; d < c.k_dim; ++d) {
            logit += double(q[q_at + size_t(d)]) * double(k[kv_at * size_t(c.k_dim) + size_t(d)]);
          }
          logit /= std::sqrt(double(c.k_dim));
          if (c.softcap > 0.0f) logit = c.softcap * std::tanh(logit / c.softcap);
          const double weight = std::exp(logit + bias);  // small logits: no overflow
          sum += weight;
          for (int64_t d = 0; d < c.v_dim; ++d) {
            expected[size_t(d)] += weight * double(v[kv_at * size_t(c.v_dim) + size_t(d)]);
          }
        }
        const size_t out_at = size_t(((stream * c.rows + row) * c.heads + head) * c.v_dim);
        for (int64_t d = 0; d < c.v_dim; ++d) {
          const double want = sum > 0.0 ? expected[size_t(d)] / sum : 0.0;
          const double delta = want - double(out[out_at + size_t(d)]);
          difference += delta * delta;
          norm += want * want;
        }
      }
    }
  }
  return norm > 0.0 ? difference / norm : difference;
}

}  // namespace relay::ggml::test
