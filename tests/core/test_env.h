// What the environment says about a test run, and how a failed case is repeated.
//
// - RELAY_TEST_SCALE: size of the run, by seeds and cases: 1 by default, 0.25 under sanitizers
// - RELAY_TEST_SEED: first seed of the random cases (default 1)
// - RELAY_TEST_SEEDS: number of seeds of each random test, instead of the scaled default
// - RELAY_ISA: run on this kernel set alone (default: on all that the CPU has)
// - RELAY_TEST_ISAS: the kernel sets that must be found here, best first, with spaces between
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace relay::test {

double scale();

/// `count` seeds, scaled, from RELAY_TEST_SEED on.
std::vector<uint64_t> seeds(int count);

/// One seed per case: tests and cases must not share random streams.
uint64_t derive_seed(uint64_t seed, uint64_t purpose);

/// The kernel sets to test, best first.
std::vector<std::string> isas();

/// Runs `body` once for each kernel set, selected and named in failure messages.
void for_each_isa(const std::function<void(const std::string& isa)>& body);

/// The command that repeats the running test, for failure messages.
std::string repeat_command();

}  // namespace relay::test
