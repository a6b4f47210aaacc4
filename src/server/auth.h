// API keys: who may ask, who may administer, and which KV they may share.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace relay::server {

/// True if equal; takes time that depends on `candidate`'s length alone, not on where they differ.
bool equal_constant_time(std::string_view candidate, std::string_view secret);

/// One key per line; blank lines and lines that begin with # are left out, surrounding blanks too.
/// Throws Error (relay/types.h) if the file cannot be read or holds no key.
std::vector<std::string> read_key_file(const std::string& path);

struct Caller {
  bool allowed = false;
  bool admin = false;
  /// Isolates the KV of callers with different keys; empty where no keys are in use. It names the
  /// key by its SHA-256, so that the key itself travels no further; not by its place in the list,
  /// for KV may outlive the list.
  std::string salt;
};

class KeyRing {
 public:
  KeyRing() = default;
  KeyRing(std::vector<std::string> api_keys, std::vector<std::string> admin_keys);

  /// No API key configured: everyone is allowed (but nobody is admin).
  bool open() const { return api_keys_.empty(); }
  bool has_admin_keys() const { return !admin_keys_.empty(); }

  /// `authorization` is the header's value ("Bearer ..."), `x_api_key` that of X-Api-Key; either
  /// may be empty. An admin key is allowed everything.
  Caller identify(std::string_view authorization, std::string_view x_api_key) const;

 private:
  std::vector<std::string> api_keys_;
  std::vector<std::string> admin_keys_;
};

}  // namespace relay::server
