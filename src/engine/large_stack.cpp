#include "engine/large_stack.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <new>
#include <system_error>
#include <vector>

namespace relay::engine {

namespace {

thread_local bool on_one = false;

/// A stack that takes no memory until it is used, with a page below it that cannot be.
class Stack {
 public:
  Stack() {
    data_ = mmap(nullptr, kLargeStackBytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(data_, page(), PROT_NONE);
    // Huge pages would make a few kilobytes of use two megabytes.
    madvise(data_, kLargeStackBytes, MADV_NOHUGEPAGE);
  }
  ~Stack() { munmap(data_, kLargeStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* data() const { return data_; }

  /// It grows downwards: the pages in use are those at the end.
  size_t used() const {
    constexpr size_t kPiece = size_t{1} << 22;
    std::vector<unsigned char> resident(kPiece / page());
    size_t used = 0;
    for (size_t end = kLargeStackBytes; end > 0; end -= kPiece) {
      if (mincore(static_cast<char*>(data_) + end - kPiece, kPiece, resident.data()) != 0) break;
      const auto pages = static_cast<size_t>(std::count_if(
          resident.begin(), resident.end(), [](unsigned char flags) { return (flags & 1) != 0; }));
      used += pages * page();
      if (pages == 0) break;
    }
    return used;
  }

 private:
  static size_t page() {
    static const auto kSize = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return kSize;
  }

  void* data_ = nullptr;
};

struct Job {
  const std::function<void()>* work;
  std::exception_ptr error;
};

void* run_job(void* data) {
  auto& job = *static_cast<Job*>(data);
  on_one = true;
  try {
    (*job.work)();
  } catch (...) {
    job.error = std::current_exception();
  }
  return nullptr;
}

}  // namespace

size_t run_on_large_stack(const std::function<void()>& work) {
  if (on_one) {
    work();
    return 0;
  }
  const Stack stack;
  Job job{&work, nullptr};
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, stack.data(), kLargeStackBytes);
  pthread_t thread{};
  const int failure = pthread_create(&thread, &attributes, run_job, &job);
  pthread_attr_destroy(&attributes);
  if (failure != 0) {
    throw std::system_error(failure, std::generic_category(), "a thread cannot be started");
  }
  pthread_join(thread, nullptr);
  if (job.error) std::rethrow_exception(job.error);
  return stack.used();
}

}  // namespace relay::engine
