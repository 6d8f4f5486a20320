// Where arrays lie that do not change: MLX moves one when the host asks for its elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/cuda/allocator.h"

namespace zmlx {

namespace mx = mlx::core;

class Places {
 public:
  // Of computed arrays, which are kept.
  explicit Places(std::vector<mx::array> arrays) : arrays_(std::move(arrays)) {
    for (const mx::array& array : arrays_) {
      const auto* buffer = static_cast<const mx::cu::CudaBuffer*>(array.buffer().ptr());
      places_.push_back({buffer, buffer->data});
    }
  }

  size_t count() const {
    return places_.size();
  }

  // Where an array was when last asked for what has moved.
  uint64_t at(size_t index) const {
    return reinterpret_cast<uint64_t>(places_.at(index).data) + uint64_t(arrays_[index].offset());
  }

  // Whether an array lies elsewhere.
  bool moved() const {
    return std::any_of(places_.begin(), places_.end(), is_moved);
  }

  // Have all of them count as moved.
  void forget() {
    for (Place& place : places_) {
      place.data = nullptr;
    }
  }

  // Call a function with the index of each array that lies elsewhere now.
  template <typename F>
  void each_moved(F function) {
    for (size_t i = 0; i < places_.size(); ++i) {
      Place& place = places_[i];
      if (is_moved(place)) {
        place.data = place.buffer->data;
        function(i);
      }
    }
  }

 private:
  // An array has one buffer for as long as it lives, and the buffer its memory until it is moved.
  struct Place {
    const mx::cu::CudaBuffer* buffer;
    const void* data;
  };

  static bool is_moved(const Place& place) {
    return place.buffer->data != place.data;
  }

  std::vector<mx::array> arrays_;
  std::vector<Place> places_;
};

} // namespace zmlx
