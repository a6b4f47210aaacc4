#include "engine/engine_core.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <utility>

namespace relay::engine {

namespace {

double seconds_between(Clock::time_point a, Clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Where as many may run as there are sequence ids, pinned prompts take some of theirs.
int32_t most_pins(const Model& model, int32_t parallel) {
  constexpr int32_t kLeast = 16;
  const int32_t ids = model.max_sequences();
  return std::max(ids - parallel, std::min(kLeast, ids / 2));
}

SchedulerOptions scheduler_options(const Model& model, const CoreOptions& options) {
  SchedulerOptions scheduler = options.scheduler;
  // Each running sequence may want the logits of one row.
  scheduler.scored_rows = std::max(1, model.max_logits() - scheduler.parallel);
  return scheduler;
}

}  // namespace

EngineCore::EngineCore(Model& model, const Vocabulary& vocabulary, const CoreOptions& options,
                       PromptCache* cache)
    : model_(model),
      vocabulary_(vocabulary),
      options_(options),
      kv_(model, options.prefix_caching),
      scheduler_(kv_, scheduler_options(model, options)),
      pins_(kv_, scheduler_,
            {.budget = options.pin_budget,
             .prompts = most_pins(model, options.scheduler.parallel),
             .kv_bytes_per_token = options.kv_bytes_per_token,
             .adapters = options.adapters}),
      persistence_(kv_, cache),
      pacers_(static_cast<size_t>(options.scheduler.adapters) + 1,
              {options.step_seconds, options.decode_stretch, options.scheduler.batch_tokens}) {}

EngineCore::~EngineCore() = default;

int32_t EngineCore::cells_for(const Scope& scope, std::span<const Token> tokens) const {
  return kv_.cells_total() - kv_.cells_pinned() + kv_.pinned_prefix(scope, tokens);
}

void EngineCore::submit(std::unique_ptr<Request> request) {
  Request& r = *request;
  const Salt pinned_for = r.pin_salt.empty() ? nullptr : kv_.salt(r.pin_salt);
  const Scope scope{r.adapter, kv_.salt(r.cache_salt, pinned_for)};
  const auto prompt = static_cast<int32_t>(r.prompt.size());
  // The last token of a completion is never stored.
  const std::span<const Token> shareable = r.prompt_logprobs ? std::span<const Token>() : r.prompt;
  const int32_t room = cells_for(scope, shareable) - prompt + 1;
  if (r.max_tokens_may_shrink) r.max_tokens = std::clamp(room, 1, r.max_tokens);
  if (r.max_tokens > room) {
    ++counters_.refused;
    r.sink->on_error(ErrorKind::kContextLengthExceeded,
                     "The prompt (" + std::to_string(prompt) + " tokens) and max_tokens (" +
                         std::to_string(r.max_tokens) + ") need more than the " +
                         std::to_string(room + prompt - 1) +
                         " KV cells that pinned prompts leave; use fewer, or start the server "
                         "with a larger KV cache.");
    return;
  }
  // First of all, so that fail_all() finds the request if something below throws.
  requests_.emplace(r.id, std::move(request));
  r.usage.prompt_tokens = prompt;
  r.open = static_cast<int32_t>(r.samplers.size());
  for (size_t i = 0; i < r.samplers.size(); ++i) {
    auto s = std::make_unique<Sequence>();
    s->arrival = ++arrivals_;
    s->priority = r.priority;
    s->request = &r;
    s->choice = static_cast<int32_t>(i);
    s->scope = scope;
    s->prompt_length = prompt;
    s->max_tokens = r.max_tokens;
    s->scores_prompt = r.prompt_logprobs;
    s->sampler = std::move(r.samplers[i]);
    s->text = TextStream(r.stop);
    s->tokens = r.prompt;
    r.choices.push_back(std::move(s));
    scheduler_.enqueue(r.choices.back().get());
  }
  r.prompt.clear();
  r.prompt.shrink_to_fit();
}

void EngineCore::cancel(RequestId id) {
  const auto it = requests_.find(id);
  if (it == requests_.end()) return;
  Request& r = *it->second;
  for (auto& s : r.choices) {
    // What it computed of the prompt stays as an ordinary cached prefix: others may be waiting for
    // it, and its cells are free for whoever needs them.
    if (s) finish_choice(r, *s, FinishReason::kCancelled);
  }
  finish_request(r, FinishReason::kCancelled);
}

void EngineCore::cancel_all() {
  std::vector<RequestId> ids;
  for (const auto& [id, r] : requests_) ids.push_back(id);
  for (const RequestId id : ids) cancel(id);
  pins_.fail_all(ErrorKind::kShuttingDown, "The engine is stopping.");
}

void EngineCore::fail_all(ErrorKind kind, const std::string& message) {
  while (!requests_.empty()) {
    try {
      fail_request(*requests_.begin()->second, kind, message, Scheduler::Keep::kNothing);
    } catch (const std::exception& e) {  // the others have to be told all the same
      std::fprintf(stderr, "relay: a request could not be told its failure: %s\n", e.what());
    }
  }
  pins_.fail_all(kind, message);
}

// --- pinned prompts

void EngineCore::pin(const PinRequest& request, PinCallbacks callbacks) {
  pins_.pin(request, ++arrivals_, std::move(callbacks));
}

std::vector<PinnedPrompt> EngineCore::pinned() const { return pins_.list(); }

PinnedPrompt EngineCore::set_pin_ttl(const std::string& id, int64_t ttl_seconds) {
  return pins_.set_ttl(id, ttl_seconds);
}

void EngineCore::unpin(const std::string& id) { pins_.unpin(id); }

// --- steps

void EngineCore::restore_prompts(const ProgressFn& progress) {
  const int32_t most = most_pins(model_, options_.scheduler.parallel);
  const auto start = Clock::now();
  counters_.restored_tokens = persistence_.restore(most, progress);
  counters_.seconds_restoring = seconds_between(start, Clock::now());
}

PrefillBudget EngineCore::prefill_budget(int32_t adapter) const {
  int32_t turns = 1;
  if (options_.scheduler.adapters > 0) {
    const auto adapters = Scheduler::adapters_of(scheduler_.running_sequences());
    turns = std::max(1, static_cast<int32_t>(adapters.size()));
  }
  return pacers_[static_cast<size_t>(adapter)].budget(scheduler_.decoding(adapter), turns);
}

bool EngineCore::step() {
  pins_.expire();
  const StepPlan plan =
      scheduler_.plan([this](int32_t adapter) { return prefill_budget(adapter); });
  const auto now = Clock::now();
  note_admissions(plan, now);
  for (Sequence* s : plan.exhausted) end_exhausted(*s);
  if (plan.slices.empty()) {
    if (pins_.finish()) persistence_.look_soon();
    const bool busy = !plan.exhausted.empty() || !plan.admitted.empty();
    return persistence_.step(!busy) || busy;
  }
  compute(plan);
  if (pins_.finish()) persistence_.look_soon();
  persistence_.step(false);
  return true;
}

void EngineCore::note_admissions(const StepPlan& plan, Clock::time_point now) {
  for (Sequence* s : plan.admitted) {
    if (s->request == nullptr || s->preemptions > 0) continue;
    counters_.prefix_queries += s->prompt_length;
    counters_.prefix_hits += s->cached;
    Request& r = *s->request;
    if (r.began) continue;
    r.began = true;
    r.began_at = now;
    r.usage.cached_tokens = s->cached;
    r.usage.cache_write_tokens = options_.prefix_caching ? s->prompt_length - s->cached : 0;
    counters_.prompt_tokens += s->prompt_length;
  }
}

void EngineCore::compute(const StepPlan& plan) {
  batch_.clear();
  batch_.adapter = plan.adapter;
  for (const Slice& slice : plan.slices) {
    const Sequence& s = *slice.sequence;
    for (int32_t i = 0; i < slice.count; ++i) {
      const int32_t at = s.computed + i;
      batch_.add(s.tokens[static_cast<size_t>(at)], at, s.kv,
                 (slice.samples && i == slice.count - 1) || s.scores(at));
    }
  }
  const auto start = Clock::now();
  const DecodeStatus status = model_.decode(batch_);
  const double seconds = seconds_between(start, Clock::now());
  counters_.seconds_computing += seconds;
  if (status == DecodeStatus::kNoCells) {
    // By our own count there was room. The youngest sequence gives way; one that does not even fit
    // alone ends.
    if (!scheduler_.preempt_youngest()) {
      fail_sequence(*plan.slices.front().sequence, ErrorKind::kInternal,
                    "The model found no KV cells for this request.", Scheduler::Keep::kNothing);
    }
    return;
  }
  if (status == DecodeStatus::kFailed) {
    std::vector<Sequence*> failed;
    for (const Slice& slice : plan.slices) failed.push_back(slice.sequence);
    for (Sequence* s : failed) {
      // Failing one choice ends its whole request; the others of it are then gone from running.
      const auto& running = scheduler_.running_sequences();
      if (std::find(running.begin(), running.end(), s) == running.end()) continue;
      fail_sequence(*s, ErrorKind::kInternal, "The model failed to compute this step.",
                    Scheduler::Keep::kNothing);
    }
    return;
  }
  scheduler_.commit(plan, seconds);
  ++counters_.steps;
  counters_.computed_prompt_tokens += plan.prefill_rows;
  pacers_[static_cast<size_t>(plan.adapter)].note(plan.rows - plan.prefill_rows, plan.prefill_rows,
                                                  seconds);
  note_sharing(plan);
  sample(plan);
}

void EngineCore::note_sharing(const StepPlan& plan) {
  SeqSet readers;
  for (const Slice& slice : plan.slices) {
    const SeqId seq = slice.sequence->kv;
    readers.set(static_cast<size_t>(seq));
    counters_.kv_tokens_read_private += kv_.length(seq) - kv_.published(seq);
  }
  const PrefixTree::Sharing sharing = kv_.tree().sharing(readers);
  counters_.kv_tokens_read_shared += sharing.shared_tokens;
  counters_.kv_tokens_read_private += sharing.single_tokens;
  counters_.kv_tokens_saved += sharing.saved_tokens;
  counters_.shared_group_size = sharing.group;
  counters_.shared_prefix_tokens = sharing.prefix;
}

void EngineCore::score_prompt(const Slice& slice, int32_t first_row) {
  Sequence& s = *slice.sequence;
  Request& r = *s.request;
  const int32_t first = s.computed - slice.count;  // its rows are committed
  TokensDelta delta;
  delta.usage = r.usage;
  const auto token_at = [&](int32_t position) { return s.tokens[static_cast<size_t>(position)]; };
  if (s.scored == 0) {
    const Token token = token_at(0);
    delta.prompt.push_back({{token, vocabulary_.piece(token, true), std::nanf("")}, {}});
    s.scored = 1;
  }
  for (int32_t i = 0; i < slice.count; ++i) {
    if (!s.scores(first + i)) continue;
    delta.prompt.push_back(describe(r, token_at(first + i + 1), first_row + i));
    ++s.scored;
  }
  if (!delta.prompt.empty()) r.sink->on_tokens(s.choice, std::move(delta));
}

void EngineCore::sample(const StepPlan& plan) {
  const auto start = Clock::now();
  // By value: taking a token may end a request and with it sequences.
  std::vector<std::pair<Sequence*, int32_t>> rows;
  int32_t row = 0;
  for (const Slice& slice : plan.slices) {
    if (slice.sequence->scores_prompt) score_prompt(slice, row);
    row += slice.count;
    if (slice.samples) rows.emplace_back(slice.sequence, row - 1);
  }
  for (const auto& [s, at] : rows) {
    // A sibling's failure may have ended this one.
    const auto& running = scheduler_.running_sequences();
    if (std::find(running.begin(), running.end(), s) == running.end()) continue;
    take_token(*s->request, *s, at);
  }
  counters_.seconds_sampling += seconds_between(start, Clock::now());
}

GeneratedToken EngineCore::describe(const Request& request, Token token, int32_t row) {
  GeneratedToken result;
  const auto named = [&](Token t, float logprob) {
    return TokenLogprob{t, vocabulary_.piece(t, true), logprob};
  };
  if (request.logprobs < 0) {
    result.self = named(token, 0.0f);
    return result;
  }
  const auto scored = logprobs(model_.logits(row), token, request.logprobs);
  result.self = named(token, scored.front().logprob);
  for (size_t i = 1; i < scored.size(); ++i) {
    result.top.push_back(named(scored[i].token, scored[i].logprob));
  }
  return result;
}

void EngineCore::take_token(Request& r, Sequence& s, int32_t row) {
  if (s.max_tokens == 0) {
    finish_choice(r, s, FinishReason::kLength);
    if (r.open == 0) finish_request(r, FinishReason::kLength);
    return;
  }
  Token token = -1;
  try {
    token = s.sampler->sample(model_, row);
  } catch (const EngineError& e) {
    fail_request(r, e.kind(), e.what(), Scheduler::Keep::kPrompt);
    return;
  } catch (const std::exception& e) {
    fail_request(r, ErrorKind::kInternal, std::string("Sampling failed: ") + e.what(),
                 Scheduler::Keep::kPrompt);
    return;
  }
  if (token < 0) {
    fail_request(r, ErrorKind::kInternal, "The model computed no usable logits.",
                 Scheduler::Keep::kPrompt);
    return;
  }
  const auto now = Clock::now();
  if (!r.has_token) {
    r.has_token = true;
    r.first_token_at = now;
    if (observer_) observer_->on_first_token(seconds_between(r.submitted, now));
  }
  if (s.generated() > 0 && observer_) {
    observer_->on_inter_token(seconds_between(s.last_token_at, now));
  }
  s.last_token_at = r.last_token_at = now;
  s.tokens.push_back(token);
  ++r.usage.completion_tokens;
  ++counters_.generation_tokens;

  const bool ends = !r.ignore_end && vocabulary_.is_end(token);
  const bool last = s.generated() >= s.max_tokens;
  TokensDelta delta;
  delta.usage = r.usage;
  if (!ends || r.prompt_logprobs) delta.tokens.push_back(describe(r, token, row));
  if (!ends) {
    delta.text = s.text.push(vocabulary_.piece(token, r.visible.contains(token)));
  }
  const bool stopped = s.text.stopped();
  if (ends || (last && !stopped)) delta.text += s.text.finish();
  if (!delta.tokens.empty() || !delta.text.empty()) r.sink->on_tokens(s.choice, std::move(delta));
  if (!ends && !stopped && !last) return;
  finish_choice(r, s, ends || stopped ? FinishReason::kStop : FinishReason::kLength);
  if (r.open == 0) finish_request(r, ends || stopped ? FinishReason::kStop : FinishReason::kLength);
}

void EngineCore::finish_choice(Request& r, Sequence& s, FinishReason reason) {
  scheduler_.remove(
      &s, reason == FinishReason::kCancelled ? Scheduler::Keep::kPrompt : Scheduler::Keep::kAll);
  switch (reason) {
    case FinishReason::kStop:
      ++counters_.finished_stop;
      break;
    case FinishReason::kLength:
      ++counters_.finished_length;
      break;
    case FinishReason::kCancelled:
      ++counters_.finished_cancelled;
      break;
    case FinishReason::kError:
      ++counters_.finished_error;
      break;
  }
  const std::unique_ptr<Sequence> finished = std::move(r.choices[static_cast<size_t>(s.choice)]);
  --r.open;
  r.sink->on_choice_finish(finished->choice, reason, finished->text.stop_string());
}

void EngineCore::finish_request(Request& r, FinishReason reason) {
  const auto now = Clock::now();
  const auto began = r.began ? r.began_at : now;
  const auto first = r.has_token ? r.first_token_at : now;
  RequestTimings t;
  t.queue = seconds_between(r.submitted, began);
  t.prefill = seconds_between(began, first);
  t.decode = seconds_between(first, now);
  t.time_to_first_token = r.has_token ? seconds_between(r.submitted, first) : 0.0;
  t.total = seconds_between(r.submitted, now);
  if (r.began) {
    // A moving average, over some sixteen requests once there have been as many.
    constexpr double kWeight = 1.0 / 16;
    double& mean = counters_.request_seconds;
    const double took = t.prefill + t.decode;
    mean = mean > 0 ? mean + kWeight * (took - mean) : took;
  }
  if (observer_) observer_->on_request_end(reason, r.usage, t);
  if (before_end_) before_end_();
  const auto ended = requests_.extract(r.id);
  r.sink->on_done(r.usage, t);
}

void EngineCore::fail_request(Request& r, ErrorKind kind, const std::string& message,
                              Scheduler::Keep keep) {
  const auto ended = requests_.extract(r.id);
  for (auto& s : r.choices) {
    if (!s) continue;
    scheduler_.remove(s.get(), keep);
    ++counters_.finished_error;
  }
  if (before_end_) before_end_();
  r.sink->on_error(kind, message);
}

void EngineCore::fail_sequence(Sequence& sequence, ErrorKind kind, const std::string& message,
                               Scheduler::Keep keep) {
  if (sequence.request != nullptr) {
    fail_request(*sequence.request, kind, message, keep);
    return;
  }
  pins_.fail(sequence, kind, message, keep);
}

void EngineCore::end_exhausted(Sequence& s) {
  // Checked at submit; but more may have been pinned since.
  if (s.request != nullptr && s.generated() > 0) {
    Request& r = *s.request;
    if (std::string rest = s.text.finish(); !rest.empty()) {
      TokensDelta delta;
      delta.text = std::move(rest);
      delta.usage = r.usage;
      r.sink->on_tokens(s.choice, std::move(delta));
    }
    finish_choice(r, s, FinishReason::kLength);
    if (r.open == 0) finish_request(r, FinishReason::kLength);
    return;
  }
  fail_sequence(s, ErrorKind::kContextLengthExceeded,
                "The prompt (" + std::to_string(s.prompt_length) +
                    " tokens) does not fit the KV cells that pinned prompts leave.",
                Scheduler::Keep::kNothing);
}

EngineStats EngineCore::stats() const {
  EngineStats s = counters_;
  s.running = scheduler_.running();
  s.waiting = scheduler_.waiting();
  s.preemptions = scheduler_.preemptions();
  s.kv_cells_total = kv_.cells_total();
  s.kv_cells_used = kv_.cells_used();
  s.kv_cells_cached = kv_.cells_evictable();
  s.pinned_tokens = kv_.cells_pinned();
  s.evicted_tokens = kv_.evicted_tokens();
  s.kv_bytes_used = s.kv_cells_used * options_.kv_bytes_per_token;
  if (options_.scheduler.adapters > 0) {
    s.running_adapters = Scheduler::adapters_of(scheduler_.running_sequences());
    s.waiting_adapters = Scheduler::adapters_of(scheduler_.waiting_sequences());
    std::erase(s.running_adapters, 0);
    std::erase(s.waiting_adapters, 0);
  }
  for (const Sequence* q : scheduler_.running_sequences()) {
    s.kv_bytes_unshared += kv_.length(q->kv) * options_.kv_bytes_per_token;
  }
  if (s.running == 0) s.shared_group_size = s.shared_prefix_tokens = 0;
  return s;
}

}  // namespace relay::engine
