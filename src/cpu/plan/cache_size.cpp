#include "cpu/plan/cache_size.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>

namespace relay {
namespace {

/// First word of a file of sysfs; empty where there is none.
std::string read_word(const std::string& path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word;
}

/// CPUs of a list such as "0-3,8"; 1 where it cannot be read.
int64_t count_cpus(const std::string& list) {
  std::istringstream ranges(list);
  int64_t cpus = 0;
  for (std::string range; std::getline(ranges, range, ',');) {
    std::istringstream in(range);
    int64_t first = 0;
    int64_t last = 0;
    char dash = 0;
    if (!(in >> first)) return 1;
    cpus += in >> dash >> last ? last - first + 1 : 1;
  }
  return std::max<int64_t>(1, cpus);
}

struct CacheSizes {
  int64_t core = int64_t{1} << 20;
  int64_t last = int64_t{32} << 20;
};

/// Linux's sysfs. Elsewhere, and in containers that hide it, the guesses above stay.
CacheSizes read_caches() {
  const std::string cpu = "/sys/devices/system/cpu/cpu0/";
  const int64_t siblings = count_cpus(read_word(cpu + "topology/thread_siblings_list"));
  CacheSizes sizes;
  int64_t largest = 0;
  for (int index = 0; index < 8; ++index) {
    const std::string cache = cpu + "cache/index" + std::to_string(index) + "/";
    std::istringstream text(read_word(cache + "size"));  // "1024K", "32M"
    int64_t bytes = 0;
    char unit = 0;
    if (!(text >> bytes)) continue;
    text >> unit;
    bytes <<= unit == 'M' ? 20 : 10;
    largest = std::max(largest, bytes);
    if (read_word(cache + "level") == "2") {
      const int64_t cores =
          std::max<int64_t>(1, count_cpus(read_word(cache + "shared_cpu_list")) / siblings);
      sizes.core = std::clamp(bytes / cores, int64_t{128} << 10, int64_t{8} << 20);
    }
  }
  if (largest > 0) sizes.last = largest;
  return sizes;
}

const CacheSizes& caches() {
  static const CacheSizes sizes = read_caches();
  return sizes;
}

}  // namespace

int64_t core_cache_bytes() { return caches().core; }
int64_t last_level_cache_bytes() { return caches().last; }

}  // namespace relay
