#include "core/test_env.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "core/random.h"
#include "relay/attention.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define RELAY_TEST_SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define RELAY_TEST_SANITIZED 1
#endif

namespace relay::test {
namespace {

#ifdef RELAY_TEST_SANITIZED
constexpr double kDefaultScale = 0.25;
#else
constexpr double kDefaultScale = 1.0;
#endif

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

/// Restores the kernel set that was in use, also when an assertion leaves the test.
class IsaScope {
 public:
  explicit IsaScope(const std::string& name) : before_(current_isa()) { select_isa(name); }
  ~IsaScope() { select_isa(before_); }
  IsaScope(const IsaScope&) = delete;
  IsaScope& operator=(const IsaScope&) = delete;

 private:
  std::string before_;
};

}  // namespace

double scale() {
  static const double value = [] {
    const std::string text = variable("RELAY_TEST_SCALE");
    const double parsed = text.empty() ? kDefaultScale : std::atof(text.c_str());
    return parsed > 0 ? parsed : kDefaultScale;
  }();
  return value;
}

std::vector<uint64_t> seeds(int count) {
  const std::string number = variable("RELAY_TEST_SEEDS");
  const int64_t total = number.empty() ? std::max<int64_t>(1, std::llround(count * scale()))
                                       : std::max<int64_t>(1, std::atoll(number.c_str()));
  const std::string text = variable("RELAY_TEST_SEED");
  const uint64_t first = text.empty() ? 1 : std::strtoull(text.c_str(), nullptr, 10);
  std::vector<uint64_t> result(total);
  for (int64_t i = 0; i < total; ++i) result[i] = first + i;
  return result;
}

uint64_t derive_seed(uint64_t seed, uint64_t purpose) {
  return Random(seed * 0x2545f4914f6cdd1dull + purpose).bits();
}

std::vector<std::string> isas() {
  const std::string only = variable("RELAY_ISA");
  return only.empty() ? available_isas() : std::vector<std::string>{only};
}

void for_each_isa(const std::function<void(const std::string& isa)>& body) {
  for (const std::string& isa : isas()) {
    SCOPED_TRACE("isa " + isa);
    IsaScope scope(isa);
    body(isa);
    if (::testing::Test::HasFatalFailure()) return;
  }
}

std::string repeat_command() {
  const ::testing::TestInfo* info = ::testing::UnitTest::GetInstance()->current_test_info();
  if (!info) return "";
  std::string command;
  for (const char* name :
       {"RELAY_ISA", "RELAY_TEST_SCALE", "RELAY_TEST_SEED", "RELAY_TEST_SEEDS"}) {
    if (std::getenv(name)) command += std::string(name) + "=" + variable(name) + " ";
  }
  return "repeat: " + command + ::testing::internal::GetArgvs()[0] +
         " --gtest_filter=" + info->test_suite_name() + "." + info->name();
}

}  // namespace relay::test
