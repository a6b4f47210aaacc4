#include "measure/format.h"

#include <cstdarg>
#include <cstdio>

namespace relay::measure {

std::string format(const char* pattern, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof(text), pattern, arguments);
  va_end(arguments);
  return text;
}

std::string duration(double seconds) {
  if (seconds < 1e-3) return format("%.1f us", seconds * 1e6);
  if (seconds < 1) return format("%.2f ms", seconds * 1e3);
  return format("%.2f s", seconds);
}

std::string bytes(double count) {
  if (count < 1024.0 * 1024) return format("%.1f KiB", count / 1024);
  if (count < 1024.0 * 1024 * 1024) return format("%.1f MiB", count / (1024 * 1024));
  return format("%.2f GiB", count / (1024.0 * 1024 * 1024));
}

}  // namespace relay::measure
