// Typed reading of a JSON object's fields, with errors that name the field as the client wrote it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "server/json.h"

namespace relay::server {

/// A view of one JSON object. Absent and null are the same to every reader. All throw ApiError 400.
class JsonFields {
 public:
  /// `path` is the object's own name in errors, "" for the body. Throws if `object` is no object.
  JsonFields(const Json& object, std::string path);

  /// "path.name"
  std::string name_of(const char* name) const;

  /// nullptr if absent or null.
  const Json* find(const char* name) const;
  const Json& require(const char* name) const;

  bool boolean(const char* name, bool fallback) const;
  /// Whole numbers, also written as 16.0; both bounds belong to the range.
  std::optional<int64_t> integer(const char* name, int64_t least, int64_t most) const;
  /// Finite numbers; `least_excluded` takes the lower bound out of the range.
  std::optional<double> number(const char* name, double least, double most,
                               bool least_excluded = false) const;
  std::optional<std::string> string(const char* name, size_t max_bytes) const;
  std::string require_string(const char* name, size_t max_bytes) const;
  /// nullptr if absent or null.
  const Json* array(const char* name, size_t max_items) const;
  const Json* object(const char* name) const;

 private:
  const Json& object_;
  std::string path_;
};

}  // namespace relay::server
