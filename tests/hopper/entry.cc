// What software_hopper.py calls.
#include "common/params.h"
#include "common/plan.h"
#include "cuda/launch.h"
#include "machine.h"

using jax_dsv4::cuda::launch_append, jax_dsv4::cuda::launch_decode, jax_dsv4::cuda::launch_plan,
    jax_dsv4::cuda::prepare_decode;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int hopper_plan(const jax_dsv4::PlanParams* params) { return launch_plan(*params, nullptr); }
EXPORT int hopper_decode(const jax_dsv4::DecodeParams* params) { return launch_decode(*params, nullptr); }
EXPORT int hopper_append(const jax_dsv4::AppendParams* params) { return launch_append(*params, nullptr); }
EXPORT const char* hopper_error() { return hopper::error(); }
EXPORT int hopper_options(int processors, uint32_t schedule) {
  hopper::options() = {processors, schedule};
  return prepare_decode();
}
EXPORT void hopper_sizes(size_t* sizes) {
  sizes[0] = sizeof(jax_dsv4::PlanParams);
  sizes[1] = sizeof(jax_dsv4::DecodeParams);
  sizes[2] = sizeof(jax_dsv4::AppendParams);
}
