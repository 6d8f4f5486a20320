// What a test sees of the driver that stands for CUDA's.
#pragma once

#include <string>

// What was asked of it since the last time, in its order.
std::string fake_events();

// How many things it made that were not given back.
int fake_living();

// How the nodes of the graph that was instantiated last wait for each other, one letter for each: "p"
// where the next may begin early, "-" where not.
std::string fake_edges();

// Be a device of another compute capability: its first number.
void fake_capability(int major);

// Let the next graph not be instantiated, or the next node not be told.
void fake_failure();
