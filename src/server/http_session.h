// One connection: reads requests, bounds them in size and time, answers them in order, and notices
// when its client leaves. Everything runs on the connection's strand, apart from what run_on()
// takes to a pool; the engine thread only posts to the strand.
#pragma once

#include <boost/asio/awaitable.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/http/message.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <type_traits>

#include "server/errors.h"
#include "server/generation.h"
#include "server/http_response.h"
#include "server/runtime.h"
#include "server/transport.h"

namespace relay::server {

class HttpSession : public std::enable_shared_from_this<HttpSession> {
 public:
  /// `runtime` outlives the session; the socket's executor is a strand.
  HttpSession(boost::asio::ip::tcp::socket socket, Runtime& runtime);
  ~HttpSession();

  /// Serves the connection until it ends.
  void start();
  /// From any thread: ends the connection, at once or when the answer under way is written.
  void close(bool at_once);

 private:
  template <typename T>
  using Awaitable = boost::asio::awaitable<T>;
  using Clock = std::chrono::steady_clock;
  using Parser = boost::beast::http::request_parser<boost::beast::http::string_body>;

  /// What is known of the request being answered.
  struct Exchange {
    std::string method;
    std::string target;
    std::string request_id;
    bool http_1_0 = false;
    bool keep_alive = true;
    bool header_sent = false;
    HeaderFields cors;  ///< what lets a page of another origin read the answer
    ErrorForm error_form = ErrorForm::kOpenAi;
    int status = 0;
    Clock::time_point begin;
  };

  Awaitable<void> run();
  /// Reads and answers one request; false ends the connection.
  Awaitable<bool> serve_one();
  /// Reads the header into `parser`; false: nothing to answer.
  Awaitable<bool> read_header(Parser& parser, Exchange& exchange);
  /// All of a request whose header has been read; throws ApiError for the caller to answer.
  Awaitable<void> handle(Parser& parser, Exchange& exchange);
  struct Body;
  Awaitable<void> read_body(Parser& parser, Body& body, Exchange& exchange);
  Awaitable<void> answer_plain(const Route& route, const std::string& body, const Caller& caller,
                               Exchange& exchange);
  /// Frees `body` as soon as it has been read.
  Awaitable<void> answer_generation(Endpoint endpoint, Body& body, const Caller& caller,
                                    Exchange& exchange);
  /// Follows a started generation to its end.
  Awaitable<void> follow(Generation& generation, Exchange& exchange);
  Awaitable<void> follow_stream(Generation& generation, Exchange& exchange);

  /// A browser's question whether a page of another origin may ask; none: it is no such question,
  /// or the origin is not allowed.
  std::optional<Answer> preflight(const Parser& parser, const Exchange& exchange) const;
  void log_exchange(const Exchange& exchange) const;

  Awaitable<void> write_answer(Answer answer, Exchange& exchange);
  std::string stream_header(Exchange& exchange);
  /// Starts the time that the client has for taking `bytes`.
  void begin_write(size_t bytes);
  /// Ends that time; after a failed write the client counts as gone.
  void end_write(const boost::system::error_code& error);
  /// Ends our side but reads on for a while: a client that is still sending can read the answer.
  Awaitable<void> linger();

  /// Runs `work` on `pool`. The coroutine itself goes there and comes back to the strand, so what
  /// `work` refers to in its frames lives as long as `work` runs. Throws what `work` throws.
  template <typename Work>
  Awaitable<std::invoke_result_t<Work&>> run_on(boost::asio::thread_pool& pool, Work& work);

  // Watching for the client's leaving while it waits for an answer. What it sends meanwhile (the
  // next request) is kept in buffer_.
  void start_watching();
  void watch();
  Awaitable<void> stop_watching();
  void on_gone();
  void cut_off_slow_reader();

  // Waking the coroutine: notices come from the engine and the watch.
  void notify();
  Awaitable<void> wait_for_notice(Clock::time_point until = Clock::time_point::max());

  enum class OnExpiry { kStopReading, kClose };
  void arm(std::chrono::milliseconds after, OnExpiry action);
  void disarm();
  std::chrono::milliseconds with_rate(std::chrono::milliseconds base, size_t bytes) const;
  void close_socket();

  Transport transport_;
  Runtime& runtime_;
  const ServerOptions& options_;
  boost::beast::flat_buffer buffer_;

  boost::asio::steady_timer deadline_;
  uint64_t deadline_turn_ = 0;
  bool deadline_expired_ = false;

  boost::asio::steady_timer notice_timer_;
  bool noticed_ = false;

  boost::asio::cancellation_signal watch_cancel_;
  bool watching_ = false;     ///< wanted
  bool watch_idle_ = true;    ///< no read of the watch is under way
  bool gone_ = false;         ///< the client left or the connection broke
  bool busy_ = false;         ///< between a request's header and the end of its answer
  bool closing_ = false;      ///< end after the answer under way
  bool body_unread_ = false;  ///< the connection cannot be used for another request
  Generation* generation_ = nullptr;
};

}  // namespace relay::server
