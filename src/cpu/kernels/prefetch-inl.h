// Prefetching the next tile while working on this one.
//
// A tile's vectors lie a whole slot apart, too far for the hardware's prefetchers, so the kernels
// prefetch by themselves, in the order of memory: one line at a time, evenly over the work. A core
// has some twenty misses under way at most, and a burst beyond that stalls it.
class Prefetcher {
 public:
  /// `steps`: how often step() will be called.
  Prefetcher(const Tile& tile, int steps) : tile_(tile), steps_(steps) {
    lines_ = tile.next_slots * (lines_of(tile.next_k_bytes) + lines_of(tile.next_v_bytes));
    if (lines_ > 0) begin_run();
  }

  RELAY_INLINE void step() {
    for (due_ += lines_; due_ >= steps_; due_ -= steps_) {
      __builtin_prefetch(at_, 0, 2);
      at_ += 64;
      if (at_ >= end_) next_run();
    }
  }

 private:
  static int lines_of(int bytes) { return (bytes + 63) / 64; }

  /// All K of the next slots, then all V: each in the order of memory.
  void begin_run() {
    const bool k = run_ < tile_.next_slots;
    at_ = k ? tile_.next_k[run_] + tile_.next_k_offset
            : tile_.next_v[run_ - tile_.next_slots] + tile_.next_v_offset;
    end_ = at_ + (k ? tile_.next_k_bytes : tile_.next_v_bytes);
  }
  __attribute__((noinline)) void next_run() {
    if (++run_ < 2 * tile_.next_slots) {
      begin_run();
    } else {
      lines_ = 0;
      due_ = 0;
    }
  }

  const Tile& tile_;
  int steps_;
  int lines_;    ///< in all; 0 once all are asked for
  int due_ = 0;  ///< lines not asked for yet that should be by now, times steps_
  int run_ = 0;
  const uint8_t* at_ = nullptr;
  const uint8_t* end_ = nullptr;
};
