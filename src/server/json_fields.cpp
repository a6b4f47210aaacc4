#include "server/json_fields.h"

#include <cmath>
#include <sstream>

#include "server/errors.h"

namespace relay::server {

namespace {

ApiError wrong_type(const std::string& param, const char* expected, const Json& got) {
  return invalid_request(param,
                         "'" + param + "' must be " + expected + ", not " + got.type_name() + ".",
                         "invalid_type");
}

template <typename Number>
ApiError out_of_range(const std::string& param, Number least, Number most, const char* bracket) {
  std::ostringstream text;
  text << "'" << param << "' must be in " << bracket << least << ", " << most << "].";
  return invalid_request(param, text.str());
}

}  // namespace

JsonFields::JsonFields(const Json& object, std::string path)
    : object_(object), path_(std::move(path)) {
  if (object_.is_object()) return;
  if (path_.empty()) {
    throw invalid_request(
        "", std::string("The body must be a JSON object, not ") + object_.type_name() + ".",
        "invalid_type");
  }
  throw wrong_type(path_, "an object", object_);
}

std::string JsonFields::name_of(const char* name) const {
  return path_.empty() ? name : path_ + "." + name;
}

const Json* JsonFields::find(const char* name) const {
  const auto it = object_.find(name);
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

const Json& JsonFields::require(const char* name) const {
  const Json* value = find(name);
  if (value == nullptr) {
    throw invalid_request(name_of(name), "'" + name_of(name) + "' is required.",
                          "missing_required_parameter");
  }
  return *value;
}

bool JsonFields::boolean(const char* name, bool fallback) const {
  const Json* value = find(name);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) throw wrong_type(name_of(name), "a boolean", *value);
  return value->get<bool>();
}

std::optional<int64_t> JsonFields::integer(const char* name, int64_t least, int64_t most) const {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  const std::string param = name_of(name);
  if (value->is_number_float()) {
    const double number = value->get<double>();
    if (number != std::floor(number)) throw wrong_type(param, "an integer", *value);
    if (number < static_cast<double>(least) || number > static_cast<double>(most) ||
        std::abs(number) > 9007199254740992.0) {
      throw out_of_range(param, least, most, "[");
    }
    return static_cast<int64_t>(number);
  }
  if (!value->is_number_integer()) throw wrong_type(param, "an integer", *value);
  const bool too_big =
      value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
  const int64_t number = too_big ? INT64_MAX : value->get<int64_t>();
  if (too_big || number < least || number > most) throw out_of_range(param, least, most, "[");
  return number;
}

std::optional<double> JsonFields::number(const char* name, double least, double most,
                                         bool least_excluded) const {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  const std::string param = name_of(name);
  if (!value->is_number()) throw wrong_type(param, "a number", *value);
  const double number = value->get<double>();
  const bool inside =
      (least_excluded ? number > least : number >= least) && number <= most;  // false for NaN
  if (!inside) throw out_of_range(param, least, most, least_excluded ? "(" : "[");
  return number;
}

std::optional<std::string> JsonFields::string(const char* name, size_t max_bytes) const {
  const Json* value = find(name);
  if (value == nullptr) return std::nullopt;
  const std::string param = name_of(name);
  if (!value->is_string()) throw wrong_type(param, "a string", *value);
  const auto& text = value->get_ref<const std::string&>();
  if (text.size() > max_bytes) {
    throw invalid_request(
        param, "'" + param + "' is longer than " + std::to_string(max_bytes) + " bytes.");
  }
  return text;
}

std::string JsonFields::require_string(const char* name, size_t max_bytes) const {
  require(name);
  return *string(name, max_bytes);
}

const Json* JsonFields::array(const char* name, size_t max_items) const {
  const Json* value = find(name);
  if (value == nullptr) return nullptr;
  const std::string param = name_of(name);
  if (!value->is_array()) throw wrong_type(param, "an array", *value);
  if (value->size() > max_items) {
    throw invalid_request(param,
                          "'" + param + "' has more than " + std::to_string(max_items) + " items.");
  }
  return value;
}

const Json* JsonFields::object(const char* name) const {
  const Json* value = find(name);
  if (value != nullptr && !value->is_object()) throw wrong_type(name_of(name), "an object", *value);
  return value;
}

}  // namespace relay::server
