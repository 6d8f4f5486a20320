// In place of MLX's file of this name, which says some things once for each address space.
#pragma once

#include <zmlx/metal.h>

namespace metal {

using std::is_empty;
using std::is_empty_v;
using std::void_t;

template <class T>
struct is_static : std::is_empty<std::remove_cv_t<T>> {};

template <class T>
struct pointer_element {};
template <class T>
struct pointer_element<T*> {
  using type = std::remove_cv_t<T>;
};
template <class T>
using pointer_element_t = typename pointer_element<std::remove_cv_t<T>>::type;

} // namespace metal
