// What the C interfaces have in common: errors as a status and a message, and structs that grow.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>

#include "relay/forest.h"
#include "relay/relay.h"

namespace relay::c_abi {

/// Calls f; no exception leaves it. `last_error` is the library's own: a thread of a host may use
/// several of them.
template <typename F>
relay_status guarded(std::string& last_error, F f) {
  try {
    f();
    return RELAY_OK;
  } catch (const Error& e) {
    last_error = e.what();
    return RELAY_INVALID;
  } catch (const std::exception& e) {
    last_error = e.what();
    return RELAY_INTERNAL;
  }
}

inline void require(bool condition, const char* what) {
  if (!condition) throw Error(what);
}

/// sizeof(T) in the first version that had the struct: where the first field appended since begins.
template <typename T>
constexpr size_t kFirstSize = sizeof(T);

/// No struct will ever be as large: such a size is a mistake, and no memory to look at.
inline constexpr size_t kAbsurdSize = 4096;

/// The first field of every struct, which says how much of it there is.
template <typename T>
size_t given_size(const T* given, const char* name) {
  if (given == nullptr) throw Error(std::string(name) + " is null");
  size_t size;
  std::memcpy(&size, given, sizeof(size));
  if (size < kFirstSize<T> || size >= kAbsurdSize) {
    throw Error(std::string(name) + ".size is " + std::to_string(size) +
                ", which no version has: set it with sizeof");
  }
  return size;
}

/// The bytes of a caller's struct that this version knows.
template <typename T>
size_t known_size(const T* given, const char* name) {
  return std::min(given_size(given, name), sizeof(T));
}

/// A caller's struct as this version knows it. What the caller's version lacks is 0, the default of
/// every appended field; what this version lacks must be 0, since it cannot be done.
template <typename T>
T known_part(const T* given, const char* name) {
  const size_t size = given_size(given, name);
  const size_t known = std::min(size, sizeof(T));
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (std::any_of(bytes + known, bytes + size, [](unsigned char byte) { return byte != 0; })) {
    throw Error(std::string(name) + " sets a field that this version of the library does not " +
                "know: leave it 0, or use a newer one");
  }
  T part{};
  std::memcpy(&part, bytes, known);
  return part;
}

/// The field `sharing` of plan options: 1 on, 0 off, -1 as the environment says.
inline Sharing sharing(int32_t value, const char* options) {
  if (value < -1 || value > 1) {
    throw Error(std::string(options) + ".sharing must be 1, 0 or -1");
  }
  if (value < 0) return sharing_from_env();
  return value == 1 ? Sharing::kOn : Sharing::kOff;
}

}  // namespace relay::c_abi
