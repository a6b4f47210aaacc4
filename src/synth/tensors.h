// Which tensors a shape has, and how each is filled.
#pragma once

#include <ggml.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "synth/shapes.h"
#include "synth/vocabulary.h"

namespace relay::synth {

/// Makes rows of one tensor resemble rows of another: normal(row, column) becomes a mixture, of
/// deviation 1 again, of its own and of the other tensor's numbers at (part.row, column).
struct Echo {
  struct Part {
    int64_t row = 0;
    float share = 0;  ///< the correlation with that row
  };
  std::string tensor;
  std::vector<std::array<Part, 2>> parts;  ///< per row
};

/// One tensor of the file. Element (row, column) is mean + row_deviation[row] * normal(row,
/// column), or, where `values` is not empty, what `values` says.
struct TensorSpec {
  std::string name;
  int64_t columns = 0;
  int64_t rows = 1;
  bool matrix = true;  ///< false: a vector, one row that is stored with one dimension
  ggml_type type = GGML_TYPE_F32;
  float mean = 0.0f;
  std::vector<float> row_deviation;
  Echo echo;                  ///< without parts: none
  bool random_signs = false;  ///< every second element or so is negated
  std::vector<float> values;

  int64_t elements() const { return columns * rows; }
  size_t row_bytes() const;
  size_t bytes() const { return row_bytes() * static_cast<size_t>(rows); }
};

/// Fills `count` rows from `first` on; `out` holds count * columns floats.
void fill_rows(const TensorSpec& tensor, uint64_t seed, int64_t first, int64_t count, float* out);

/// All tensors in file order. Matrices get `type`, the output matrix of a block-quantised model a
/// finer one, as llama-quantize does it.
std::vector<TensorSpec> make_tensors(const Shape& shape, const Vocabulary& vocabulary,
                                     ggml_type type, uint64_t seed);

}  // namespace relay::synth
