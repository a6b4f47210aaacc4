// The HTTP server: listens, keeps connections, ends them in good order. One coroutine per
// connection over a small pool of threads.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "server/options.h"
#include "server/service.h"

namespace relay::server {

class Server {
 public:
  /// Throws Error if the certificate or its key cannot be used.
  explicit Server(const ServerOptions& options);
  /// shutdown() with no time to spare.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  /// Binds, listens and starts the threads; requests are answered from now on (503 until
  /// service().set_engine()). Throws Error, saying what to change, if the address cannot be had.
  void listen();
  uint16_t port() const;
  std::string url() const;

  Service& service();

  /// Stops listening, lets answers under way be written for `grace` at most, closes all connections
  /// and ends the threads. Call after the engine has stopped. Idempotent.
  void shutdown(std::chrono::milliseconds grace);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace relay::server
