#include "synth/write_model.h"

#include <fcntl.h>
#include <ggml.h>
#include <gguf.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "synth/tensors.h"
#include "synth/vocabulary.h"

namespace relay::synth {
namespace {

namespace fs = std::filesystem;

struct WeightType {
  std::string_view name;
  ggml_type type;
  uint32_t file_type;  // llama_ftype: what llama.cpp prints as the model's type
};
constexpr std::array<WeightType, 15> kWeightTypes = {{{"f32", GGML_TYPE_F32, 0},
                                                      {"f16", GGML_TYPE_F16, 1},
                                                      {"bf16", GGML_TYPE_BF16, 32},
                                                      {"q8_0", GGML_TYPE_Q8_0, 7},
                                                      {"q4_0", GGML_TYPE_Q4_0, 2},
                                                      {"q4_1", GGML_TYPE_Q4_1, 3},
                                                      {"q5_0", GGML_TYPE_Q5_0, 8},
                                                      {"q5_1", GGML_TYPE_Q5_1, 9},
                                                      {"q2_k", GGML_TYPE_Q2_K, 10},
                                                      {"q3_k", GGML_TYPE_Q3_K, 11},
                                                      {"q4_k", GGML_TYPE_Q4_K, 14},
                                                      {"q5_k", GGML_TYPE_Q5_K, 16},
                                                      {"q6_k", GGML_TYPE_Q6_K, 18},
                                                      {"iq4_nl", GGML_TYPE_IQ4_NL, 25},
                                                      {"iq4_xs", GGML_TYPE_IQ4_XS, 30}}};

const WeightType& find_type(std::string_view name) {
  std::string known;
  for (const WeightType& type : kWeightTypes) {
    if (type.name == name) {
      return type;
    }
    known += known.empty() ? "" : ", ";
    known += type.name;
  }
  throw std::invalid_argument("no weight type '" + std::string(name) + "'; there are: " + known);
}

std::runtime_error file_error(const std::string& what, const fs::path& path) {
  return std::runtime_error(what + " " + path.string() + ": " + std::strerror(errno));
}

std::string megabytes(uint64_t bytes) {
  return std::to_string((bytes + 999'999) / 1'000'000) + " MB";
}

struct ContextDeleter {
  void operator()(ggml_context* context) const { ggml_free(context); }
};

// Everything that is decided before the first byte is written.
struct Model {
  WeightType type{};
  Vocabulary vocabulary;
  std::vector<TensorSpec> tensors;
  GgufPtr header;
  uint64_t header_bytes = 0;
  std::vector<uint64_t> offsets;  // of each tensor in the file
  uint64_t bytes = 0;
};

void set_keys(gguf_context* header, const Shape& shape, const Model& model, uint64_t seed) {
  const std::string arch(architecture_name(shape.architecture));
  const auto key = [&](const char* name) { return arch + "." + name; };
  const auto set_u32 = [&](const char* name, int64_t value) {
    gguf_set_val_u32(header, key(name).c_str(), static_cast<uint32_t>(value));
  };
  const auto set_f32 = [&](const char* name, float value) {
    gguf_set_val_f32(header, key(name).c_str(), value);
  };
  gguf_set_val_str(header, "general.architecture", arch.c_str());
  gguf_set_val_str(header, "general.type", "model");
  gguf_set_val_str(header, "general.name", (shape.name + " with random weights").c_str());
  gguf_set_val_str(header, "general.description",
                   ("Made by relay synth with seed " + std::to_string(seed) +
                    ": no training, no meaning, for tests and measurements.")
                       .c_str());
  gguf_set_val_u32(header, "general.file_type", model.type.file_type);
  if (ggml_is_quantized(model.type.type)) {
    gguf_set_val_u32(header, "general.quantization_version", GGML_QNT_VERSION);
  }
  set_u32("vocab_size", model.vocabulary.size());
  set_u32("context_length", shape.context);
  set_u32("embedding_length", shape.width);
  set_u32("block_count", shape.layers);
  set_u32("feed_forward_length", shape.ffn);
  set_u32("attention.head_count", shape.heads);
  set_u32("attention.head_count_kv", shape.kv_heads);
  set_u32("attention.key_length", shape.head_dim);
  set_u32("attention.value_length", shape.head_dim);
  set_u32("rope.dimension_count", shape.rope_dim);
  set_f32("rope.freq_base", shape.rope_base);
  set_f32(shape.architecture == Architecture::kPhi2 ? "attention.layer_norm_epsilon"
                                                    : "attention.layer_norm_rms_epsilon",
          shape.norm_epsilon);
  if (shape.sliding_window > 0) {
    set_u32("attention.sliding_window", shape.sliding_window);
  }
  if (shape.attention_soft_cap > 0) {
    set_f32("attn_logit_softcapping", shape.attention_soft_cap);
  }
  if (shape.output_soft_cap > 0) {
    set_f32("final_logit_softcapping", shape.output_soft_cap);
  }
  gguf_set_kv(header, model.vocabulary.keys.get());
}

void add_tensors(Model& model) {
  const ggml_init_params params = {
      .mem_size = (model.tensors.size() + 1) * ggml_tensor_overhead(),
      .mem_buffer = nullptr,
      .no_alloc = true,
  };
  const std::unique_ptr<ggml_context, ContextDeleter> context(ggml_init(params));
  if (context == nullptr) {
    throw std::runtime_error("ggml_init failed");
  }
  for (const TensorSpec& spec : model.tensors) {
    ggml_tensor* tensor =
        spec.matrix ? ggml_new_tensor_2d(context.get(), spec.type, spec.columns, spec.rows)
                    : ggml_new_tensor_1d(context.get(), spec.type, spec.columns);
    ggml_set_name(tensor, spec.name.c_str());
    gguf_add_tensor(model.header.get(), tensor);
  }
}

Model make_model(const Request& request) {
  check_shape(request.shape);
  Model model;
  model.type = find_type(request.type);
  // The shape's own template and padding belong to its own vocabulary.
  const bool own = request.vocabulary.empty() || request.vocabulary == request.shape.vocabulary;
  model.vocabulary = load_vocabulary(
      own ? request.shape.vocabulary : request.vocabulary,
      request.chat_template.empty() && own ? request.shape.chat_template : request.chat_template,
      own ? request.shape.vocabulary_size : 0);
  model.tensors = make_tensors(request.shape, model.vocabulary, model.type.type, request.seed);
  model.header.reset(gguf_init_empty());
  set_keys(model.header.get(), request.shape, model, request.seed);
  add_tensors(model);

  model.header_bytes = gguf_get_meta_size(model.header.get());
  const uint64_t alignment = gguf_get_alignment(model.header.get());
  uint64_t end = model.header_bytes;
  for (size_t i = 0; i < model.tensors.size(); ++i) {
    const uint64_t offset =
        model.header_bytes + gguf_get_tensor_offset(model.header.get(), static_cast<int64_t>(i));
    model.offsets.push_back(offset);
    end = std::max(end, offset + model.tensors[i].bytes());
  }
  model.bytes = (end + alignment - 1) / alignment * alignment;
  return model;
}

Result describe(const Model& model) {
  Result result;
  result.bytes = model.bytes;
  result.tensors = static_cast<int64_t>(model.tensors.size());
  for (const TensorSpec& tensor : model.tensors) {
    result.parameters += static_cast<uint64_t>(tensor.elements());
  }
  result.vocabulary_size = model.vocabulary.size();
  result.vocabulary_source = model.vocabulary.source;
  result.template_source = model.vocabulary.template_source;
  return result;
}

uint64_t free_space_of(const fs::path& folder) {
  std::error_code error;
  const fs::space_info space = fs::space(folder, error);
  if (error) {
    throw std::runtime_error("cannot tell the free space of " + folder.string() + ": " +
                             error.message());
  }
  return space.available;
}

// A file under a temporary name that vanishes unless it is kept.
class TemporaryFile {
 public:
  explicit TemporaryFile(const fs::path& output)
      : output_(output),
        path_(output.string() + ".partial-" + std::to_string(::getpid())),
        descriptor_(::open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644)) {
    if (descriptor_ < 0) {
      throw file_error("cannot create", path_);
    }
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() {
    if (descriptor_ >= 0) {
      ::close(descriptor_);
    }
    if (!kept_) {
      ::unlink(path_.c_str());
    }
  }

  void resize(uint64_t bytes) {
    if (::ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) {
      throw file_error("cannot resize", path_);
    }
  }

  // Any thread may write anywhere.
  void write(const void* data, size_t bytes, uint64_t offset) const {
    const auto* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::pwrite(descriptor_, from, bytes, static_cast<off_t>(offset));
      if (written < 0 && errno == EINTR) {
        continue;
      }
      if (written <= 0) {
        throw file_error("cannot write", path_);
      }
      from += written;
      bytes -= static_cast<size_t>(written);
      offset += static_cast<uint64_t>(written);
    }
  }

  // Gives the file its name. Without `replace`, a file that has appeared in the meantime is left
  // alone: link() is the call that refuses to overwrite.
  void keep(bool replace) {
    if (::close(std::exchange(descriptor_, -1)) != 0) {
      throw file_error("cannot write", path_);
    }
    if (!replace) {
      if (::link(path_.c_str(), output_.c_str()) == 0) {
        return;  // the destructor takes the temporary name away
      }
      if (errno == EEXIST) {
        throw std::runtime_error(output_.string() + " has appeared meanwhile; it was left alone");
      }
      // Some file systems have no hard links.
      std::error_code ignored;
      if (fs::exists(output_, ignored)) {
        throw std::runtime_error(output_.string() + " has appeared meanwhile; it was left alone");
      }
    }
    if (::rename(path_.c_str(), output_.c_str()) != 0) {
      throw file_error("cannot rename to", output_);
    }
    kept_ = true;
  }

 private:
  fs::path output_;
  fs::path path_;
  int descriptor_;
  bool kept_ = false;
};

// Rows of one tensor: what a thread makes and writes at a time.
struct Chunk {
  size_t tensor = 0;
  int64_t first = 0;
  int64_t count = 0;
};

std::vector<Chunk> cut_into_chunks(const std::vector<TensorSpec>& tensors) {
  constexpr int64_t kElements = 1 << 20;  // 4 MiB of floats: a second-level cache or two
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t step = std::max<int64_t>(1, kElements / tensors[i].columns);
    for (int64_t first = 0; first < tensors[i].rows; first += step) {
      chunks.push_back({i, first, std::min(step, tensors[i].rows - first)});
    }
  }
  return chunks;
}

class Writer {
 public:
  Writer(const Request& request, const Model& model, const TemporaryFile& file)
      : request_(request),
        model_(model),
        file_(file),
        chunks_(cut_into_chunks(model.tensors)),
        done_(model.header_bytes) {}

  void run() {
    std::vector<char> header(model_.header_bytes);
    gguf_get_meta_data(model_.header.get(), header.data());
    file_.write(header.data(), header.size(), 0);

    const unsigned all = std::max(1u, std::thread::hardware_concurrency());
    const size_t threads = request_.threads > 0 ? static_cast<size_t>(request_.threads) : all;
    {
      std::vector<std::jthread> workers;
      for (size_t i = 1; i < std::min(threads, chunks_.size()); ++i) {
        workers.emplace_back([this] { work(); });
      }
      work();
    }
    if (failure_) {
      std::rethrow_exception(failure_);
    }
    if (cancelled()) {
      throw Cancelled();
    }
  }

 private:
  bool cancelled() const { return request_.cancel != nullptr && request_.cancel->load(); }

  void work() {
    try {
      std::vector<float> values;
      std::vector<char> packed;
      for (size_t i = next_++; i < chunks_.size() && !stop_ && !cancelled(); i = next_++) {
        write_chunk(chunks_[i], values, packed);
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!failure_) {
        failure_ = std::current_exception();
      }
      stop_ = true;
    }
  }

  void write_chunk(const Chunk& chunk, std::vector<float>& values, std::vector<char>& packed) {
    const TensorSpec& tensor = model_.tensors[chunk.tensor];
    values.resize(static_cast<size_t>(chunk.count * tensor.columns));
    packed.resize(tensor.row_bytes() * static_cast<size_t>(chunk.count));
    fill_rows(tensor, request_.seed, chunk.first, chunk.count, values.data());
    const size_t written = ggml_quantize_chunk(tensor.type, values.data(), packed.data(), 0,
                                               chunk.count, tensor.columns, nullptr);
    if (written != packed.size()) {
      throw std::logic_error("ggml_quantize_chunk wrote another size than ggml_row_size says");
    }
    file_.write(
        packed.data(), packed.size(),
        model_.offsets[chunk.tensor] + static_cast<uint64_t>(chunk.first) * tensor.row_bytes());
    const std::lock_guard lock(mutex_);
    done_ += packed.size();
    if (request_.progress) {
      request_.progress(done_, model_.bytes);
    }
  }

  const Request& request_;
  const Model& model_;
  const TemporaryFile& file_;
  const std::vector<Chunk> chunks_;
  std::atomic<size_t> next_ = 0;
  std::atomic<bool> stop_ = false;
  std::mutex mutex_;
  uint64_t done_;
  std::exception_ptr failure_;
};

fs::path folder_of(const fs::path& output) {
  return output.has_parent_path() ? output.parent_path() : fs::path(".");
}

}  // namespace

std::vector<std::string> weight_types() {
  std::vector<std::string> names;
  names.reserve(kWeightTypes.size());
  for (const WeightType& type : kWeightTypes) {
    names.emplace_back(type.name);
  }
  return names;
}

Result measure_model(const Request& request) { return describe(make_model(request)); }

Result write_model(const Request& request) {
  if (request.output.filename().empty()) {
    throw std::invalid_argument("the output must be a file name");
  }
  std::error_code error;
  if (fs::is_directory(request.output, error)) {
    throw std::invalid_argument(request.output.string() + " is a folder");
  }
  if (!request.force && fs::exists(request.output, error)) {
    throw std::invalid_argument(request.output.string() + " exists; --force replaces it");
  }
  const fs::path folder = folder_of(request.output);
  if (!fs::is_directory(folder, error)) {
    throw std::invalid_argument("there is no folder " + folder.string());
  }

  const Model model = make_model(request);
  const uint64_t free = request.free_space ? request.free_space(folder) : free_space_of(folder);
  if (free < model.bytes) {
    throw std::runtime_error(request.output.string() + " needs " + megabytes(model.bytes) +
                             ", but " + folder.string() + " has " + megabytes(free) + " free");
  }

  TemporaryFile file(request.output);
  file.resize(model.bytes);
  Writer(request, model, file).run();
  if (request.progress) {
    request.progress(model.bytes, model.bytes);
  }
  file.keep(request.force);
  return describe(model);
}

}  // namespace relay::synth
