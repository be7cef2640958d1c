// What the machine gives, measured: the ceilings that the engine is compared with. The loops share
// nothing with the engine's kernels.
#pragma once

namespace ni {

struct MachineRates {
  double read = 0;  // bytes a second out of memory
  double fp32 = 0;  // operations a second out of registers; a multiply-add is two
  double bf16 = 0;  // the same of bf16 dot products, where the CPU has them; else fp32's
};

// All threads at once; each rate is the best of rounds over about `seconds`. Takes `megabytes` of
// memory to read, which should be several times the caches.
MachineRates measure_machine(int threads, double seconds, int megabytes);

}  // namespace ni
