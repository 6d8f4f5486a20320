// What MLX's headers ask of a library that they come without.
#pragma once

#include <string>

namespace fmt {

template <typename... Values>
std::string format(const char* text, Values&&...) {
  return text;
}

} // namespace fmt
