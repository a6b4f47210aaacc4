#include "server/server.h"

#include <spdlog/spdlog.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http/write.hpp>
#include <optional>
#include <thread>

#include "relay/types.h"
#include "server/http_response.h"
#include "server/http_session.h"
#include "server/runtime.h"

namespace relay::server {

namespace net = boost::asio;
using boost::system::error_code;
using net::ip::tcp;

namespace {

/// One file descriptor per connection: the soft limit of 1024 is a leftover of select().
void raise_file_limit(size_t wanted) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur =
      limit.rlim_max == RLIM_INFINITY ? wanted : std::min<rlim_t>(wanted, limit.rlim_max);
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur < wanted) {
    spdlog::warn("only {} files may be open: fewer connections than asked for (ulimit -n)",
                 static_cast<size_t>(limit.rlim_cur));
  }
}

constexpr size_t kFilesBesidesConnections = 256;

void refuse_connection(tcp::socket& socket) {
  const auto response = whole_response(
      answer_error(unavailable("too_many_connections", "Too many connections are open.", 1)),
      random_id("req_"), /*keep_alive=*/false);
  error_code ignored;
  socket.non_blocking(true, ignored);
  boost::beast::http::write(socket, response, ignored);
  socket.close(ignored);
}

/// A handler's exception leaves run(), which may be called again.
void run_handlers(net::io_context& io) {
  for (;;) {
    try {
      io.run();
      return;
    } catch (const std::exception& failure) {
      spdlog::error("an event could not be handled: {}", failure.what());
    }
  }
}

}  // namespace

struct Server::State {
  explicit State(const ServerOptions& options)
      : runtime(options),
        strand(net::make_strand(runtime.io)),
        acceptor(strand),
        refresh_timer(strand) {}

  net::awaitable<void> accept_loop();
  void take(tcp::socket socket);
  net::awaitable<void> refresh_loop();

  Runtime runtime;
  net::strand<net::io_context::executor_type> strand;  // of the two below
  tcp::acceptor acceptor;
  net::steady_timer refresh_timer;
  std::atomic<bool> refreshing{false};
  std::optional<net::executor_work_guard<net::io_context::executor_type>> work;
  std::vector<std::thread> threads;
  std::string host_in_url;
  uint16_t port = 0;
};

void Server::State::take(tcp::socket socket) {
  if (runtime.connections() >= runtime.service.options().max_connections) {
    if (runtime.tls == nullptr) refuse_connection(socket);  // a handshake would make it wait
    return;
  }
  const auto session = std::make_shared<HttpSession>(std::move(socket), runtime);
  session->start();
  if (runtime.stopping) session->close(/*at_once=*/true);  // shutdown() may have missed it
}

net::awaitable<void> Server::State::accept_loop() {
  net::steady_timer pause(acceptor.get_executor());
  while (!runtime.stopping) {
    tcp::socket socket(net::make_strand(runtime.io));
    const auto [error] = co_await acceptor.async_accept(socket, net::as_tuple(net::use_awaitable));
    if (runtime.stopping) break;
    if (error) {
      // Out of file descriptors, mostly: connections will end.
      spdlog::warn("cannot accept a connection: {}", error.message());
      pause.expires_after(std::chrono::milliseconds(100));
      co_await pause.async_wait(net::as_tuple(net::use_awaitable));
      continue;
    }
    try {
      take(std::move(socket));
    } catch (const std::exception& failure) {  // it is one connection's
      spdlog::error("a connection could not be served: {}", failure.what());
    }
  }
}

net::awaitable<void> Server::State::refresh_loop() {
  const std::chrono::milliseconds interval = runtime.service.options().pin_refresh;
  while (!runtime.stopping) {
    refresh_timer.expires_after(interval);
    co_await refresh_timer.async_wait(net::as_tuple(net::use_awaitable));
    if (runtime.stopping || refreshing.exchange(true)) continue;
    net::post(runtime.pinners, [this] {
      try {
        runtime.service.refresh_pinned();
      } catch (const std::exception& failure) {
        spdlog::error("the pinned prompts could not be looked at: {}", failure.what());
      }
      refreshing = false;
    });
  }
}

Server::Server(const ServerOptions& options) : state_(std::make_unique<State>(options)) {}

Server::~Server() { shutdown(std::chrono::milliseconds(0)); }

Service& Server::service() { return state_->runtime.service; }
uint16_t Server::port() const { return state_->port; }
std::string Server::url() const {
  const std::string scheme = state_->runtime.tls != nullptr ? "https://" : "http://";
  return scheme + state_->host_in_url + ":" + std::to_string(state_->port);
}

void Server::listen() {
  State& state = *state_;
  const ServerOptions& options = state.runtime.service.options();
  const std::string where = options.host + ":" + std::to_string(options.port);

  error_code error;
  tcp::resolver resolver(state.runtime.io);
  const auto found =
      resolver.resolve(options.host, std::to_string(options.port), tcp::resolver::passive, error);
  if (error || found.empty()) {
    throw Error("cannot listen on " + where + ": the host is not known (--host)");
  }
  const tcp::endpoint endpoint = found.begin()->endpoint();
  state.acceptor.open(endpoint.protocol(), error);
  if (!error) state.acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) state.acceptor.bind(endpoint, error);
  if (!error) state.acceptor.listen(net::socket_base::max_listen_connections, error);
  if (error == net::error::address_in_use) {
    throw Error("cannot listen on " + where +
                ": the port is in use; choose another with --port, or end what listens there");
  }
  if (error == net::error::access_denied) {
    throw Error("cannot listen on " + where + ": not allowed; ports below 1024 need privileges");
  }
  if (error) throw Error("cannot listen on " + where + ": " + error.message());

  raise_file_limit(options.max_connections + kFilesBesidesConnections);
  state.port = state.acceptor.local_endpoint().port();
  const bool v6 = endpoint.address().is_v6();
  state.host_in_url = endpoint.address().is_unspecified() ? "localhost"
                      : v6 ? "[" + endpoint.address().to_string() + "]"
                           : endpoint.address().to_string();

  state.work.emplace(state.runtime.io.get_executor());
  net::co_spawn(state.strand, state.accept_loop(), net::detached);
  if (options.pin_refresh.count() > 0) {
    net::co_spawn(state.strand, state.refresh_loop(), net::detached);
  }
  for (int32_t i = 0; i < options.io_threads; ++i) {
    state.threads.emplace_back([&io = state.runtime.io] { run_handlers(io); });
  }
}

void Server::shutdown(std::chrono::milliseconds grace) {
  State& state = *state_;
  Runtime& runtime = state.runtime;
  if (runtime.stopping.exchange(true)) return;
  net::post(state.strand, [&state] {
    error_code ignored;
    state.acceptor.close(ignored);
    state.refresh_timer.cancel();
  });
  for (const auto& session : runtime.sessions()) session->close(/*at_once=*/false);
  const auto deadline = std::chrono::steady_clock::now() + grace;
  while (runtime.busy > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  for (const auto& session : runtime.sessions()) session->close(/*at_once=*/true);
  // Coroutines that are at work on the pools come back to the loop, so the pools end first.
  runtime.workers.join();
  runtime.waiters.join();
  runtime.pinners.join();
  state.work.reset();
  const auto last_call = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
  while (runtime.connections() > 0 && std::chrono::steady_clock::now() < last_call) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  runtime.io.stop();
  for (std::thread& thread : state.threads) thread.join();
  state.threads.clear();
}

}  // namespace relay::server
