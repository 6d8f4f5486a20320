// The part of CUDA's standard library that kernels use. The whole takes NVRTC a second for each
// kernel, this a hundredth. What is not here does not compile, and such a kernel is left to MLX.
#pragma once

using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
using intptr_t = int64_t;
using uintptr_t = uint64_t;

#define INT8_MIN (-128)
#define INT16_MIN (-32768)
#define INT32_MIN (-2147483647 - 1)
#define INT64_MIN (-9223372036854775807ll - 1)
#define INT8_MAX 127
#define INT16_MAX 32767
#define INT32_MAX 2147483647
#define INT64_MAX 9223372036854775807ll
#define UINT8_MAX 255
#define UINT16_MAX 65535
#define UINT32_MAX 4294967295u
#define UINT64_MAX 18446744073709551615ull

#define INFINITY ::cuda::std::numeric_limits<float>::infinity()
#define NAN ::cuda::std::numeric_limits<float>::quiet_NaN()

namespace cuda::std {

using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using size_t = decltype(sizeof(0));

// ---- types ---------------------------------------------------------------------------------------

template <class T, T Value>
struct integral_constant {
  using value_type = T;
  using type = integral_constant;
  static constexpr T value = Value;
  constexpr operator T() const noexcept { return Value; }
  constexpr T operator()() const noexcept { return Value; }
};
template <bool Value>
using bool_constant = integral_constant<bool, Value>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool Condition, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool Condition, class T, class F>
using conditional_t = typename conditional<Condition, T, F>::type;

template <bool Condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool Condition, class T = void>
using enable_if_t = typename enable_if<Condition, T>::type;

template <class T>
struct remove_cv {
  using type = T;
};
template <class T>
struct remove_cv<const T> {
  using type = T;
};
template <class T>
struct remove_cv<volatile T> {
  using type = T;
};
template <class T>
struct remove_cv<const volatile T> {
  using type = T;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
struct remove_reference<T&&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
using remove_cvref_t = remove_cv_t<remove_reference_t<T>>;

template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
struct remove_pointer<T* const> {
  using type = T;
};
template <class T>
struct remove_pointer<T* volatile> {
  using type = T;
};
template <class T>
struct remove_pointer<T* const volatile> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;

// Enumerators: every variable, used or not, ends up in the binary.
template <class A, class B>
struct same {
  enum : bool { value = false };
};
template <class T>
struct same<T, T> {
  enum : bool { value = true };
};
template <class A, class B>
inline constexpr bool is_same_v = same<A, B>::value;
template <class A, class B>
struct is_same : bool_constant<is_same_v<A, B>> {};

template <class T, class... Among>
constexpr bool is_one_of() {
  return (bool(same<remove_cv_t<T>, Among>::value) || ...);
}
template <class T>
inline constexpr bool is_void_v = is_one_of<T, void>();
template <class T>
inline constexpr bool is_floating_point_v = is_one_of<T, float, double, long double>();
template <class T>
inline constexpr bool is_integral_v =
    is_one_of<T, bool, char, signed char, unsigned char, wchar_t, char16_t, char32_t, short,
              unsigned short, int, unsigned int, long, unsigned long, long long, unsigned long long>();
template <class T>
inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T>
inline constexpr bool is_pointer_v = !same<remove_pointer_t<T>, T>::value;
template <class T>
inline constexpr bool is_lvalue_reference_v = false;
template <class T>
inline constexpr bool is_lvalue_reference_v<T&> = true;
template <class T>
inline constexpr bool is_const_v = false;
template <class T>
inline constexpr bool is_const_v<const T> = true;

template <class T, bool = is_arithmetic_v<T>>
inline constexpr bool is_signed_v = T(-1) < T(0);
template <class T>
inline constexpr bool is_signed_v<T, false> = false;
template <class T, bool = is_arithmetic_v<T>>
inline constexpr bool is_unsigned_v = T(0) < T(-1);
template <class T>
inline constexpr bool is_unsigned_v<T, false> = false;

template <class T>
struct is_integral : bool_constant<is_integral_v<T>> {};
template <class T>
struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T>
struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T>
struct is_signed : bool_constant<is_signed_v<T>> {};
template <class T>
struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T>
struct is_pointer : bool_constant<is_pointer_v<T>> {};

// What an argument of this type is in a parameter by value.
template <class T, bool Function = !is_const_v<const T>>
struct passed {
  using type = conditional_t<Function, T*, remove_cv_t<T>>;
};
template <class T>
struct passed<T[], false> {
  using type = T*;
};
template <class T, size_t N>
struct passed<T[N], false> {
  using type = T*;
};
template <class T>
struct decay : passed<remove_reference_t<T>> {};
template <class T>
using decay_t = typename decay<T>::type;

// A type with the constness of another.
template <class From, class To>
struct like {
  using type = To;
};
template <class From, class To>
struct like<const From, To> {
  using type = const To;
};
template <class T>
struct signs;
#define ZMLX_SIGNS(SIGNED, UNSIGNED)   \
  template <>                          \
  struct signs<SIGNED> {               \
    using is_not = UNSIGNED;           \
    using is = SIGNED;                 \
  };                                   \
  template <>                          \
  struct signs<UNSIGNED> : signs<SIGNED> {};
ZMLX_SIGNS(signed char, unsigned char)
ZMLX_SIGNS(short, unsigned short)
ZMLX_SIGNS(int, unsigned int)
ZMLX_SIGNS(long, unsigned long)
ZMLX_SIGNS(long long, unsigned long long)
#undef ZMLX_SIGNS
template <>
struct signs<char> : signs<signed char> {};
template <class T>
struct make_unsigned : like<T, typename signs<remove_cv_t<T>>::is_not> {};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
struct make_signed : like<T, typename signs<remove_cv_t<T>>::is> {};
template <class T>
using make_signed_t = typename make_signed<T>::type;

// ---- sequences, arrays ---------------------------------------------------------------------------

template <class T, T... I>
struct integer_sequence {
  using value_type = T;
  static constexpr size_t size() noexcept { return sizeof...(I); }
};
// Not the compiler's own: NVRTC has it from 13.1 on.
template <class T, size_t N, T... I>
struct counted : counted<T, N - 1, T(N - 1), I...> {};
template <class T, T... I>
struct counted<T, 0, I...> {
  using type = integer_sequence<T, I...>;
};
template <class T, T N>
using make_integer_sequence = typename counted<T, N>::type;
template <size_t... I>
using index_sequence = integer_sequence<size_t, I...>;
template <size_t N>
using make_index_sequence = make_integer_sequence<size_t, N>;

template <class T, size_t N>
struct array {
  using value_type = T;
  T elements[N];

  constexpr T& operator[](size_t i) noexcept { return elements[i]; }
  constexpr const T& operator[](size_t i) const noexcept { return elements[i]; }
  constexpr T* data() noexcept { return elements; }
  constexpr const T* data() const noexcept { return elements; }
  constexpr T* begin() noexcept { return elements; }
  constexpr const T* begin() const noexcept { return elements; }
  constexpr T* end() noexcept { return elements + N; }
  constexpr const T* end() const noexcept { return elements + N; }
  static constexpr size_t size() noexcept { return N; }
};

// ---- limits --------------------------------------------------------------------------------------

template <class T, bool = is_integral_v<T>>
struct limits;
template <class T>
struct numeric_limits : limits<remove_cv_t<T>> {};

template <class T>
struct limits<T, true> {
  static constexpr bool is_specialized = true, is_integer = true, is_exact = true;
  static constexpr bool is_signed = is_signed_v<T>, is_bounded = true;
  static constexpr bool is_modulo = !is_signed && !is_same_v<T, bool>;
  static constexpr bool has_infinity = false, has_quiet_NaN = false, has_signaling_NaN = false;
  static constexpr int radix = 2;
  static constexpr int digits = is_same_v<T, bool> ? 1 : 8 * int(sizeof(T)) - is_signed;
  static constexpr int digits10 = digits * 3 / 10, max_digits10 = 0;
  static constexpr T max() noexcept { return T(~0ull >> (64 - digits)); }
  static constexpr T min() noexcept { return is_signed ? T(-max() - 1) : T(0); }
  static constexpr T lowest() noexcept { return min(); }
  static constexpr T epsilon() noexcept { return T(0); }
  static constexpr T round_error() noexcept { return T(0); }
  static constexpr T infinity() noexcept { return T(0); }
  static constexpr T quiet_NaN() noexcept { return T(0); }
  static constexpr T signaling_NaN() noexcept { return T(0); }
  static constexpr T denorm_min() noexcept { return T(0); }
};
// A float's bits, the digits of its fraction and its largest exponent; of no other type.
template <class T>
struct format;
template <>
struct format<float> {
  using Bits = uint32_t;
  enum { digits = 24, exponent = 128 };
};
template <>
struct format<double> {
  using Bits = uint64_t;
  enum { digits = 53, exponent = 1024 };
};
template <class T>
struct limits<T, false> {
  using Bits = typename format<T>::Bits;
  enum { Digits = format<T>::digits, Exponent = format<T>::exponent };
  static constexpr bool is_specialized = true, is_integer = false, is_exact = false;
  static constexpr bool is_signed = true, is_modulo = false, is_bounded = true, is_iec559 = true;
  static constexpr bool has_infinity = true, has_quiet_NaN = true, has_signaling_NaN = true;
  static constexpr int radix = 2, digits = Digits, digits10 = (Digits - 1) * 30103 / 100000;
  static constexpr int max_digits10 = 2 + Digits * 30103 / 100000;
  static constexpr int max_exponent = Exponent, min_exponent = 3 - Exponent;
  static constexpr T of(Bits bits) noexcept { return __builtin_bit_cast(T, bits); }
  enum : Bits {
    one = 1,
    implied = one << (Digits - 1),
    infinite = Bits(2 * Exponent - 1) << (Digits - 1)
  };
  static constexpr T max() noexcept { return of(infinite - 1); }
  static constexpr T min() noexcept { return of(implied); }
  static constexpr T lowest() noexcept { return -max(); }
  static constexpr T epsilon() noexcept { return of(Bits(Exponent - Digits) << (Digits - 1)); }
  static constexpr T round_error() noexcept { return T(0.5); }
  static constexpr T infinity() noexcept { return of(infinite); }
  static constexpr T quiet_NaN() noexcept { return of(infinite | implied >> 1); }
  static constexpr T signaling_NaN() noexcept { return of(infinite | implied >> 2); }
  static constexpr T denorm_min() noexcept { return of(one); }
};

}  // namespace cuda::std
