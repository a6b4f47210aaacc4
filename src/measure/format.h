// Numbers for people.
#pragma once

#include <string>

namespace relay::measure {

/// As printf.
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
/// "12.3 us", "4.56 ms", "7.89 s".
std::string duration(double seconds);
/// "12.3 KiB", "4.56 GiB".
std::string bytes(double count);

}  // namespace relay::measure
