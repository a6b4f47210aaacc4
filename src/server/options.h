// Settings of the HTTP server; every bound it keeps is here.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace relay::server {

struct ServerOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8080;                  ///< 0: any free one; Server::port() tells which
  std::vector<std::string> model_names;  ///< public names, the first is answered with; empty: the
                                         ///< engine's own
  std::vector<std::string> api_keys;     ///< empty: no key is asked for
  std::vector<std::string> admin_keys;   ///< may manage cached prompts; empty: nobody may

  std::string tls_certificate_file;  ///< PEM, with its chain; empty: no TLS
  std::string tls_key_file;          ///< PEM, not encrypted

  std::vector<std::string> cors_origins;  ///< whose pages may ask from a browser; "*": all of them
  bool json_logs = false;                 ///< requests are logged as JSON objects (json_log.h)

  std::chrono::milliseconds pin_refresh{60'000};  ///< between looks whether a pinned prompt still
                                                  ///< reads the same; 0: never

  int32_t io_threads = 2;      ///< move bytes and write answers
  int32_t worker_threads = 2;  ///< parse, render, tokenise, compile grammars
  size_t max_connections = 4096;
  size_t max_header_bytes = 16 * 1024;  ///< request line and all header fields
  size_t max_target_bytes = 4096;       ///< path and query
  size_t max_body_bytes = 16 * 1024 * 1024;
  size_t max_buffered_body_bytes = 256 * 1024 * 1024;  ///< of all connections together
  size_t max_queued_bytes = 1024 * 1024;               ///< events one slow reader may fall behind

  std::chrono::milliseconds idle_timeout{75'000};    ///< between requests on one connection
  std::chrono::milliseconds header_timeout{15'000};  ///< for a whole header
  std::chrono::milliseconds body_timeout{30'000};    ///< for a whole body, and longer for long ones
  size_t min_body_bytes_per_second = 16 * 1024;
  std::chrono::milliseconds write_timeout{30'000};    ///< for one write to be taken by the reader
  std::chrono::milliseconds first_byte_delay{5'000};  ///< a stream that waits longer for its first
                                                      ///< token sends its header before it
  std::chrono::milliseconds keep_alive_interval{15'000};  ///< comments on a silent stream
};

}  // namespace relay::server
