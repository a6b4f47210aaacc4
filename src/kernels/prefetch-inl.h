// Asking for what comes next while working on what is here.

// A tile's vectors lie a whole slot apart, too far for the hardware's prefetchers, so the kernels
// ask for what comes next themselves, spread evenly over the work on this tile.
class Prefetcher {
 public:
  Prefetcher(const Tile& tile, int steps)
      : tile_(tile),
        lines_per_step_(
            (tile.next_slots * (lines(tile.next_k_bytes) + lines(tile.next_v_bytes)) + steps - 1) /
            steps) {}

  void step() {
    for (int n = lines_per_step_; n > 0 && slot_ < tile_.next_slots;) {
      const uint8_t* p = values_ ? tile_.next_v[slot_] + tile_.next_v_offset
                                 : tile_.next_k[slot_] + tile_.next_k_offset;
      const int bytes = values_ ? tile_.next_v_bytes : tile_.next_k_bytes;
      for (; n > 0 && at_ < bytes; --n, at_ += 64) __builtin_prefetch(p + at_, 0, 2);
      if (at_ < bytes) return;
      at_ = 0;
      slot_ += values_;
      values_ = !values_;
    }
  }

 private:
  static int lines(int bytes) { return (bytes + 63) / 64; }

  const Tile& tile_;
  const int lines_per_step_;
  int slot_ = 0;
  bool values_ = false;
  int at_ = 0;
};
