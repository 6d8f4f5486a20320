// What a test sees of the driver that stands for CUDA's.
#pragma once

#include <string>

// What was asked of it since the last time, in its order.
std::string fake_events();

// How many things it made that were not given back.
int fake_living();

// Let the next graph not be instantiated.
void fake_failure();
