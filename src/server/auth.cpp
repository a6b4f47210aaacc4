#include "server/auth.h"

#include <cctype>
#include <fstream>

#include "engine/sha256.h"
#include "relay/types.h"

namespace relay::server {

namespace {

std::string_view trim(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) {
    text.remove_prefix(1);
  }
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) {
    text.remove_suffix(1);
  }
  return text;
}

/// The token of "Bearer <token>"; the scheme's case does not matter (RFC 9110).
std::string_view bearer_token(std::string_view authorization) {
  constexpr std::string_view kScheme = "bearer ";
  authorization = trim(authorization);
  if (authorization.size() < kScheme.size()) return {};
  for (size_t i = 0; i < kScheme.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(authorization[i])) != kScheme[i]) return {};
  }
  return trim(authorization.substr(kScheme.size()));
}

/// Index of the key or -1. Looks at all keys whatever it finds, for the sake of equal time.
int find_key(const std::vector<std::string>& keys, std::string_view candidate) {
  int found = -1;
  for (size_t i = 0; i < keys.size(); ++i) {
    const bool equal = equal_constant_time(candidate, keys[i]);
    found = equal ? static_cast<int>(i) : found;
  }
  return found;
}

}  // namespace

bool equal_constant_time(std::string_view candidate, std::string_view secret) {
  if (secret.empty()) return false;
  unsigned difference = candidate.size() == secret.size() ? 0 : 1;
  for (size_t i = 0; i < candidate.size(); ++i) {
    difference |= static_cast<unsigned char>(candidate[i]) ^
                  static_cast<unsigned char>(secret[i % secret.size()]);
  }
  volatile unsigned result = difference;  // keeps the loop from being cut short
  return result == 0;
}

std::vector<std::string> read_key_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error("cannot read the key file '" + path + "'");
  std::vector<std::string> keys;
  std::string line;
  while (std::getline(file, line)) {
    const std::string_view key = trim(line);
    if (!key.empty() && key.front() != '#') keys.emplace_back(key);
  }
  if (keys.empty()) throw Error("the key file '" + path + "' holds no key");
  return keys;
}

KeyRing::KeyRing(std::vector<std::string> api_keys, std::vector<std::string> admin_keys)
    : api_keys_(std::move(api_keys)), admin_keys_(std::move(admin_keys)) {}

Caller KeyRing::identify(std::string_view authorization, std::string_view x_api_key) const {
  const std::string_view bearer = bearer_token(authorization);
  const std::string_view candidate = bearer.empty() ? x_api_key : bearer;
  const int admin = find_key(admin_keys_, candidate);
  const int user = find_key(api_keys_, candidate);
  Caller caller;
  caller.admin = admin >= 0;
  caller.allowed = open() || admin >= 0 || user >= 0;
  if (admin >= 0) {
    caller.salt = "admin#" + engine::sha256_hex(admin_keys_[static_cast<size_t>(admin)]);
  } else if (user >= 0) {
    caller.salt = "key#" + engine::sha256_hex(api_keys_[static_cast<size_t>(user)]);
  }
  return caller;
}

}  // namespace relay::server
