// Objects that outlive the module's static ones.
#pragma once

#include <cstddef>
#include <new>

namespace relay::ggml {

/// For a static object that a host may still need while static objects are destroyed: its
/// destructor does not run. It lies in the module's own memory, so unloading the module leaves
/// nothing of it behind; what it has allocated has to be freed before.
template <typename T>
class NeverDestroyed {
 public:
  NeverDestroyed() { new (storage_) T(); }
  T& get() { return *std::launder(reinterpret_cast<T*>(storage_)); }

 private:
  alignas(T) std::byte storage_[sizeof(T)];
};

}  // namespace relay::ggml
