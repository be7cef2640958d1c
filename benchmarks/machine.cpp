// What the machine gives (cpp/cpu/machine.h), as one line of JSON. A program of its own, so that
// the engine can be measured against it.
//   machine THREADS        rates are the best of about half a second each
#include "cpu/machine.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
  const ni::MachineRates rates = ni::measure_machine(threads, 0.5, 512);
  std::printf("{\"read\": %.4g, \"fp32\": %.4g, \"bf16\": %.4g}\n", rates.read, rates.fp32,
              rates.bf16);
}
