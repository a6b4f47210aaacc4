// What is wrong with a LoRA adapter's file that llama.cpp would not say: it ends the process over
// some of this, leaves out the rest in silence.
#pragma once

#include <string>
#include <vector>

namespace relay::engine {

/// `model` are the files of the model that the adapter is for. Throws std::runtime_error, saying
/// what is wrong.
void check_lora_file(const std::string& path, const std::vector<std::string>& model);

}  // namespace relay::engine
