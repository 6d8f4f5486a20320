// Logging, which Metal has from version 3.2 on.
#pragma once

namespace metal {

struct os_log {
  constexpr os_log(const constant char*, const constant char*) constant {}
#define ZMLX_LOG(NAME)                                    \
  template <typename... Args>                             \
  void NAME(const constant char*, Args...) const constant; \
  template <typename... Args>                             \
  void NAME(const constant char*, Args...) const;
  ZMLX_LOG(log)
  ZMLX_LOG(log_debug)
  ZMLX_LOG(log_info)
  ZMLX_LOG(log_error)
  ZMLX_LOG(log_fault)
#undef ZMLX_LOG
};
static constant os_log os_log_default("", "");

} // namespace metal
