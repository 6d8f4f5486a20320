// One unit, because each of these reads MLX's headers: that takes longer than what stands in them.
#include "lookup.cpp"
#include "primitives.cpp"
#include "step_primitives.cpp"
#include "weights.cpp"
