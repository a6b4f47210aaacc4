#include "engine/scheduler.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <unordered_map>

namespace relay::engine {

namespace {

constexpr int32_t kMostOvertaken = 16;

void insert_in_order(std::vector<Sequence*>& list, Sequence* sequence) {
  const auto place =
      std::upper_bound(list.begin(), list.end(), sequence,
                       [](const Sequence* a, const Sequence* b) { return before(*a, *b); });
  list.insert(place, sequence);
}

int32_t common_prefix(const std::vector<Token>& a, const std::vector<Token>& b, int32_t limit) {
  const auto count =
      static_cast<std::ptrdiff_t>(std::min({static_cast<size_t>(limit), a.size(), b.size()}));
  const auto end = std::mismatch(a.begin(), a.begin() + count, b.begin()).first;
  return static_cast<int32_t>(end - a.begin());
}

}  // namespace

void Scheduler::enqueue(Sequence* sequence) { insert_in_order(waiting_, sequence); }

StepPlan Scheduler::plan(const std::function<PrefillBudget(int32_t)>& budget) {
  StepPlan plan;
  for (;;) {
    plan.slices.clear();
    plan.rows = plan.prefill_rows = 0;
    plan.adapter = next_adapter();
    plan_decode(plan);
    plan_admissions(plan);
    plan_prefill(plan, budget(plan.adapter));
    // (An admitted sequence without a slice is one to pin that was in the cache already, or has to
    // wait for its own or its adapter's turn.)
    if (!plan.slices.empty() || !plan.admitted.empty() || running_.empty()) break;
    if (!has_running(plan.adapter)) continue;  // they have given way: the turn is another's
    // Every running sequence of this adapter is in its prefill and none can have another cell.
    if (!preempt_youngest()) {
      plan.exhausted.push_back(running_.front());
      return plan;
    }
  }
  if (running_.empty() && !waiting_.empty()) {
    // With nothing running, all but the pinned cells were to be had.
    plan.exhausted.push_back(admission_order().front());
    return plan;
  }
  order_by_prefix(plan);
  return plan;
}

bool Scheduler::has_running(int32_t adapter) const {
  return std::any_of(running_.begin(), running_.end(),
                     [=](const Sequence* s) { return s->scope.adapter == adapter; });
}

int32_t Scheduler::next_adapter() const {
  if (had_.size() == 1) return 0;
  if (running_.empty()) return waiting_.empty() ? 0 : waiting_.front()->scope.adapter;
  const auto had = [this](const Sequence* s) {
    return had_[static_cast<size_t>(s->scope.adapter)];
  };
  const auto next =
      std::min_element(running_.begin(), running_.end(),
                       [&](const Sequence* a, const Sequence* b) { return had(a) < had(b); });
  return (*next)->scope.adapter;
}

std::vector<int32_t> Scheduler::adapters_of(const std::vector<Sequence*>& sequences) {
  std::set<int32_t> adapters;
  for (const Sequence* s : sequences) adapters.insert(s->scope.adapter);
  return {adapters.begin(), adapters.end()};
}

int32_t Scheduler::decoding(int32_t adapter) const {
  return static_cast<int32_t>(std::count_if(
      running_.begin(), running_.end(),
      [=](const Sequence* s) { return s->scope.adapter == adapter && s->pending() == 1; }));
}

void Scheduler::add_slice(StepPlan& plan, Sequence* sequence, int32_t count) {
  plan.slices.push_back({sequence, count, sequence->generates && count == sequence->pending()});
  plan.rows += count;
  if (sequence->pending() > 1) plan.prefill_rows += count;
}

void Scheduler::plan_decode(StepPlan& plan) {
  while (!kv_.make_room(decoding(plan.adapter))) {
    if (!preempt_youngest()) return;  // alone and out of cells: plan() sees no slices
  }
  for (Sequence* s : running_) {
    if (s->scope.adapter == plan.adapter && s->pending() == 1) add_slice(plan, s, 1);
  }
}

void Scheduler::plan_prefill(StepPlan& plan, PrefillBudget budget) {
  std::vector<Sequence*> prompts;
  for (Sequence* s : running_) {
    if (s->scope.adapter == plan.adapter && s->pending() > 1) prompts.push_back(s);
  }
  if (prompts.empty()) return;
  Sequence* first = prompts.front();
  std::stable_sort(prompts.begin(), prompts.end(), [](const Sequence* a, const Sequence* b) {
    return a->priority != b->priority ? a->priority < b->priority : a->pending() < b->pending();
  });
  const bool paced = plan.rows > 0;  // requests decode
  const int32_t room = options_.batch_tokens - plan.rows;
  int32_t rows = std::min(paced ? budget.beside : budget.alone, room);
  const int32_t more_for_short = paced ? std::min(budget.short_prompts, room) - rows : 0;

  std::vector<int32_t> counts(prompts.size(), 0);
  int32_t scored_rows = options_.scored_rows;
  const auto give = [&](size_t i, int32_t most) {
    most = std::min({most, rows, prompts[i]->pending() - counts[i]});
    if (prompts[i]->scoring()) {
      most = std::min(most, scored_rows);
      scored_rows -= most;
    }
    counts[i] += most;
    rows -= most;
  };
  const auto at =
      static_cast<size_t>(std::find(prompts.begin(), prompts.end(), first) - prompts.begin());
  give(at, rows - rows / 2);
  for (size_t i = 0; i < prompts.size(); ++i) give(i, rows);
  rows = std::max(more_for_short, 0);
  for (size_t i = 0; i < prompts.size(); ++i) {
    // Not by what is left of it: the end of a long prompt goes on at its pace.
    if (prompts[i]->generates && prompts[i]->uncached <= budget.alone) give(i, rows);
  }
  for (size_t i = 0; i < prompts.size(); ++i) {
    int32_t count = counts[i];
    if (count <= 0) continue;
    if (!kv_.make_room(plan.rows + count)) count = std::min(count, kv_.cells_free() - plan.rows);
    if (count > 0) add_slice(plan, prompts[i], count);
  }
}

bool Scheduler::follows_another(Sequence& sequence) const {
  if (!kv_.prefix_caching()) return false;
  int32_t cached = -1;
  for (const Sequence* leader : running_) {
    if (leader->pending() <= 1 || leader->scope != sequence.scope) continue;
    const int32_t limit = std::min(sequence.match_limit(), leader->prompt_length);
    const int32_t same = common_prefix(leader->tokens, sequence.tokens, limit);
    if (same <= leader->computed) continue;  // what we share is published already
    if (cached < 0)
      cached = kv_.cached_prefix(sequence.scope, sequence.all(), sequence.match_limit());
    // Having waited for most of it, it waits for the rest too.
    const int32_t worthwhile = sequence.leader == leader->arrival ? 1 : options_.min_follow_tokens;
    if (same - cached < worthwhile) continue;
    sequence.leader = leader->arrival;
    return true;
  }
  return false;
}

int32_t Scheduler::headroom(const Sequence& sequence) const {
  if (!sequence.generates || running_.empty()) return 0;
  // Some cells to begin with, more for one that had to give way before, so that it does not at once
  // give way again; never more than it can use.
  const int32_t remaining = sequence.max_tokens - sequence.generated();
  const int32_t wish = 16 << std::min(sequence.preemptions, 6);
  return std::clamp(remaining - 1, 0, wish);
}

int32_t Scheduler::promised_cells() const {
  // What running sequences need to get through their prompts, and one more step of each.
  int32_t cells = 0;
  for (const Sequence* s : running_) cells += s->pending() + (s->generates ? 1 : 0);
  return cells;
}

std::vector<Sequence*> Scheduler::admission_order() const {
  std::vector<Sequence*> order = waiting_;
  if (!kv_.prefix_caching() || order.size() < 2) return order;
  // Within a priority: who has been overtaken often enough, then who shares most of its prompt.
  std::unordered_map<const Sequence*, int32_t> rank;
  for (const Sequence* s : order) {
    const auto shares = [&] {
      return 2 * kv_.cached_prefix(s->scope, s->all(), s->match_limit()) >= s->length();
    };
    rank[s] = s->overtaken >= kMostOvertaken ? 0 : shares() ? 1 : 2;
  }
  std::stable_sort(order.begin(), order.end(), [&](const Sequence* a, const Sequence* b) {
    return a->priority != b->priority ? a->priority < b->priority : rank[a] < rank[b];
  });
  return order;
}

void Scheduler::plan_admissions(StepPlan& plan) {
  if (waiting_.empty()) return;
  // In order, so that small ones behind do not starve a large one. Those that are not admitted
  // still note whom they could follow, so as not to miss most of it.
  bool closed = running() >= options_.parallel;
  for (Sequence* s : closed ? waiting_ : admission_order()) {
    closed = closed || running() >= options_.parallel;
    if (follows_another(*s) || closed) continue;
    const auto admission =
        kv_.admit(s->scope, s->all(), s->match_limit(), headroom(*s), promised_cells());
    if (!admission) {
      closed = true;
      continue;
    }
    std::erase(waiting_, s);
    for (Sequence* other : waiting_) {
      if (before(*other, *s) && other->priority == s->priority) ++other->overtaken;
    }
    s->kv = admission->seq;
    s->computed = admission->cached;
    s->uncached = s->pending();
    if (!s->began) s->cached = std::min(admission->cached, s->prompt_length);
    s->began = true;
    const int32_t adapter = s->scope.adapter;
    double& had = had_[static_cast<size_t>(adapter)];
    if (!has_running(adapter)) had = std::max(had, last_turn_);
    insert_in_order(running_, s);
    plan.admitted.push_back(s);
    if (adapter == plan.adapter && s->pending() == 1) add_slice(plan, s, 1);
  }
}

void Scheduler::order_by_prefix(StepPlan& plan) const {
  if (plan.slices.size() < 2) return;
  SeqSet set;
  for (const Slice& slice : plan.slices) set.set(static_cast<size_t>(slice.sequence->kv));
  std::vector<int32_t> rank(kMaxSequences, 0);
  int32_t next = 0;
  for (const SeqId s : kv_.tree().depth_first(set)) rank[static_cast<size_t>(s)] = next++;
  std::stable_sort(plan.slices.begin(), plan.slices.end(), [&](const Slice& a, const Slice& b) {
    return rank[static_cast<size_t>(a.sequence->kv)] < rank[static_cast<size_t>(b.sequence->kv)];
  });
}

void Scheduler::commit(const StepPlan& plan, double seconds) {
  double& had = had_[static_cast<size_t>(plan.adapter)];
  last_turn_ = had;
  had += std::min(seconds, kMostCharged);
  for (const Slice& slice : plan.slices) {
    Sequence* s = slice.sequence;
    s->computed += slice.count;
    kv_.grow(s->kv, slice.count);
    const int32_t known = std::min(s->computed, s->prompt_length);
    if (known > kv_.published(s->kv)) {
      kv_.publish(s->kv, s->scope, s->all().first(static_cast<size_t>(known)));
    }
  }
}

void Scheduler::remove(Sequence* sequence, Keep keep) {
  std::erase(waiting_, sequence);
  if (!sequence->running()) return;
  std::erase(running_, sequence);
  if (keep == Keep::kNothing || !kv_.prefix_caching()) {
    kv_.release(sequence->kv);
  } else {
    if (keep == Keep::kAll) {
      kv_.publish(sequence->kv, sequence->scope,
                  sequence->all().first(static_cast<size_t>(sequence->computed)));
    }
    kv_.retain(sequence->kv);
  }
  sequence->kv = -1;
}

SeqId Scheduler::remove_pinned(Sequence* sequence) {
  if (!sequence->running()) throw std::logic_error("scheduler: pinning a sequence not running");
  std::erase(running_, sequence);
  kv_.pin(sequence->kv);
  const SeqId id = sequence->kv;
  sequence->kv = -1;
  return id;
}

void Scheduler::preempt(Sequence* sequence) {
  std::erase(running_, sequence);
  kv_.release(sequence->kv);
  sequence->kv = -1;
  sequence->computed = 0;
  ++sequence->preemptions;
  ++preemptions_;
  insert_in_order(waiting_, sequence);
}

bool Scheduler::preempt_youngest() {
  if (running_.size() < 2) return false;
  preempt(running_.back());
  return true;
}

}  // namespace relay::engine
