// Runs a fuzz target over files, without libFuzzer: each as it is, cut short at every length, and
// with every byte changed in a few ways. For compilers that have no fuzzer, and for every test run.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int argc, char** argv) {
  size_t files = 0;
  size_t inputs = 0;
  const auto run = [&](const std::vector<uint8_t>& input) {
    LLVMFuzzerTestOneInput(input.data(), input.size());
    ++inputs;
  };
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::recursive_directory_iterator(argv[i])) {
      if (!entry.is_regular_file()) continue;
      ++files;
      std::ifstream file(entry.path(), std::ios::binary);
      const std::vector<uint8_t> whole{std::istreambuf_iterator<char>(file), {}};
      run(whole);
      for (size_t length = 0; length < whole.size(); ++length) {
        run({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(length)});
      }
      for (size_t at = 0; at < whole.size(); ++at) {
        for (const uint8_t flip : {0x01, 0x20, 0x80}) {
          std::vector<uint8_t> changed = whole;
          changed[at] ^= flip;
          run(changed);
        }
      }
    }
  }
  std::printf("%zu files, %zu inputs\n", files, inputs);
  return files > 0 ? 0 : 1;  // an empty corpus proves nothing
}
