// Type traits of namespace metal.
#pragma once

namespace metal {

template <typename T, T V>
struct integral_constant {
  static constexpr constant T value = V;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return V; }
  constexpr operator T() const constant { return V; }
  constexpr T operator()() const { return V; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, typename T, typename U>
struct conditional {
  using type = T;
};
template <typename T, typename U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool B, typename T, typename U>
using conditional_t = typename conditional<B, T, U>::type;

template <typename T, typename U>
struct is_same : false_type {};
template <typename T>
struct is_same<T, T> : true_type {};

template <typename T>
struct remove_const {
  using type = T;
};
template <typename T>
struct remove_const<const T> {
  using type = T;
};
template <typename T>
struct remove_volatile {
  using type = T;
};
template <typename T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <typename T>
struct remove_cv {
  using type = typename remove_volatile<typename remove_const<T>::type>::type;
};
template <typename T>
struct remove_addrspace {
  using type = T;
};
#define ZMLX_REMOVE(SPACE)         \
  template <typename T>            \
  struct remove_addrspace<SPACE T> { \
    using type = T;                \
  };
ZMLX_REMOVE(device)
ZMLX_REMOVE(threadgroup)
ZMLX_REMOVE(thread)
ZMLX_REMOVE(constant)
ZMLX_REMOVE(__generic)
#undef ZMLX_REMOVE
// A reference's address space goes with it, as a user of the type means it.
template <typename T>
struct remove_reference {
  using type = T;
};
template <typename T>
struct remove_reference<T&> {
  using type = T;
};
template <typename T>
struct remove_reference<T&&> {
  using type = T;
};
template <typename T>
using remove_const_t = typename remove_const<T>::type;
template <typename T>
using remove_volatile_t = typename remove_volatile<T>::type;
template <typename T>
using remove_cv_t = typename remove_cv<T>::type;
template <typename T>
using remove_reference_t = typename remove_reference<T>::type;
template <typename T>
using remove_addrspace_t = typename remove_addrspace<T>::type;
template <typename T>
using decay_t = remove_cv_t<remove_addrspace_t<remove_reference_t<T>>>;

template <typename T>
struct remove_pointer {
  using type = T;
};
template <typename T>
struct remove_pointer<T*> {
  using type = T;
};
template <typename T>
using remove_pointer_t = typename remove_pointer<T>::type;

template <typename T>
using zmlx_bare = remove_addrspace_t<remove_cv_t<T>>;

template <typename T>
struct is_const : bool_constant<__is_const(T)> {};
template <typename T>
struct is_pointer : false_type {};
template <typename T>
struct is_pointer<T*> : true_type {};
template <typename T>
struct is_integral : bool_constant<__is_integral(zmlx_bare<T>)> {};
template <typename T>
struct is_floating_point : bool_constant<__is_floating_point(zmlx_bare<T>)> {};
template <typename T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <typename T>
struct is_scalar : is_arithmetic<T> {};
template <typename T, bool = is_integral<T>::value>
struct is_signed : is_floating_point<T> {};
template <typename T>
struct is_signed<T, true> : bool_constant<(zmlx_bare<T>(-1) < zmlx_bare<T>(0))> {};
template <typename T>
struct is_unsigned : bool_constant<is_integral<T>::value && !is_signed<T>::value> {};
template <typename T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <typename T>
struct is_class : bool_constant<__is_class(T)> {};
template <typename T>
struct is_union : bool_constant<__is_union(T)> {};
template <typename T>
struct is_trivially_copyable : bool_constant<__is_trivially_copyable(T)> {};
template <typename B, typename D>
struct is_base_of : bool_constant<__is_base_of(B, D)> {};
template <typename From, typename To>
struct is_convertible : bool_constant<__is_convertible_to(From, To)> {};
template <typename T, typename... A>
struct is_constructible : bool_constant<__is_constructible(T, A...)> {};

template <typename...>
struct _disjunction : false_type {};
template <typename B, typename... Rest>
struct _disjunction<B, Rest...> : conditional_t<bool(B::value), B, _disjunction<Rest...>> {};
template <typename...>
struct _conjunction : true_type {};
template <typename B, typename... Rest>
struct _conjunction<B, Rest...> : conditional_t<bool(B::value), _conjunction<Rest...>, B> {};
template <typename... B>
using disjunction = _disjunction<B...>;
template <typename... B>
using conjunction = _conjunction<B...>;
template <typename B>
struct negation : bool_constant<!bool(B::value)> {};

#define ZMLX_VALUE(NAME) \
  template <typename T>  \
  static constexpr constant bool NAME##_v = NAME<T>::value;
ZMLX_VALUE(is_const)
ZMLX_VALUE(is_pointer)
ZMLX_VALUE(is_integral)
ZMLX_VALUE(is_floating_point)
ZMLX_VALUE(is_arithmetic)
ZMLX_VALUE(is_scalar)
ZMLX_VALUE(is_signed)
ZMLX_VALUE(is_unsigned)
ZMLX_VALUE(is_enum)
ZMLX_VALUE(is_class)
ZMLX_VALUE(is_union)
ZMLX_VALUE(is_trivially_copyable)
#undef ZMLX_VALUE
template <typename T, typename U>
static constexpr constant bool is_same_v = is_same<T, U>::value;
template <typename T, typename U>
static constexpr constant bool is_convertible_v = is_convertible<T, U>::value;
template <typename T, typename U>
static constexpr constant bool is_base_of_v = is_base_of<T, U>::value;
template <typename T, typename... A>
static constexpr constant bool is_constructible_v = is_constructible<T, A...>::value;
template <typename... B>
static constexpr constant bool disjunction_v = _disjunction<B...>::value;
template <typename... B>
static constexpr constant bool conjunction_v = _conjunction<B...>::value;

template <typename T>
struct make_unsigned {
  using type = conditional_t<
      sizeof(T) == 1, uchar,
      conditional_t<sizeof(T) == 2, ushort, conditional_t<sizeof(T) == 4, uint, ulong>>>;
};
template <typename T>
struct make_signed {
  using type = conditional_t<
      sizeof(T) == 1, int8_t,
      conditional_t<sizeof(T) == 2, short, conditional_t<sizeof(T) == 4, int, long>>>;
};
template <typename T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <typename T>
using make_signed_t = typename make_signed<T>::type;

template <typename T, T... I>
struct integer_sequence {};
template <typename T, T N>
using make_integer_sequence = __make_integer_seq<integer_sequence, T, N>;
template <size_t... I>
using index_sequence = integer_sequence<size_t, I...>;
template <size_t N>
using make_index_sequence = make_integer_sequence<size_t, N>;

template <typename T>
T&& declval();

template <typename To, typename From>
constexpr enable_if_t<sizeof(To) == sizeof(From), To> as_type(From value) {
  return __builtin_bit_cast(To, value);
}

} // namespace metal

using metal::as_type;
