// What all connections of a server share: threads, counters, and the list of connections.
#pragma once

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ssl/context.hpp>
#include <boost/asio/thread_pool.hpp>
#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "server/service.h"
#include "server/tls.h"

namespace relay::server {

class HttpSession;

class Runtime {
 public:
  explicit Runtime(const ServerOptions& options)
      : service(options),
        tls(options.tls_certificate_file.empty()
                ? nullptr
                : make_tls_context(options.tls_certificate_file, options.tls_key_file)),
        io(options.io_threads),
        workers(static_cast<size_t>(options.worker_threads)),
        waiters(1),
        pinners(1) {}

  /// A share of the memory for bodies; false if there is none left.
  bool reserve_body(size_t bytes) {
    if (body_bytes_.fetch_add(bytes) + bytes <= service.options().max_buffered_body_bytes) {
      return true;
    }
    release_body(bytes);
    return false;
  }
  void release_body(size_t bytes) { body_bytes_ -= bytes; }

  void add(HttpSession* session, std::weak_ptr<HttpSession> pointer) {
    const std::lock_guard lock(mutex_);
    sessions_.emplace(session, std::move(pointer));
  }
  void remove(HttpSession* session) {
    const std::lock_guard lock(mutex_);
    sessions_.erase(session);
  }
  size_t connections() const {
    const std::lock_guard lock(mutex_);
    return sessions_.size();
  }
  std::vector<std::shared_ptr<HttpSession>> sessions() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::shared_ptr<HttpSession>> alive;
    for (const auto& [raw, weak] : sessions_) {
      if (auto session = weak.lock()) alive.push_back(std::move(session));
    }
    return alive;
  }

 private:
  std::atomic<size_t> body_bytes_{0};
  mutable std::mutex mutex_;
  std::unordered_map<HttpSession*, std::weak_ptr<HttpSession>> sessions_;

 public:
  Service service;
  const std::unique_ptr<boost::asio::ssl::context> tls;  ///< null: none
  std::atomic<bool> stopping{false};
  std::atomic<int> busy{0};  ///< connections between the header of a request and its answer's end

  // Last, so destroyed first: connections wait in them, and use all of the above when they are
  // destroyed.
  boost::asio::io_context io;
  boost::asio::thread_pool workers;  ///< computes: parsing, templates, tokens, grammars
  boost::asio::thread_pool waiters;  ///< waits for a step of the engine
  boost::asio::thread_pool pinners;  ///< waits for prompts to be computed
};

}  // namespace relay::server
