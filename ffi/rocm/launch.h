// What the ROCm handlers call. No XLA types. Every function returns an empty string, or what went wrong.
#ifndef JAX_DSV4_ROCM_LAUNCH_H_
#define JAX_DSV4_ROCM_LAUNCH_H_

#include <string>

#include "common/plan.h"
#include "rocm/aiter.h"
#include "rocm/gluon.h"
#include "rocm/aiter_metadata.h"
#include "rocm/hip.h"
#include "rocm/params.h"

namespace jax_dsv4::rocm {

// Where our own code objects are: dsv4_<architecture>.co. Set once, when the library is loaded.
void set_kernel_directory(const std::string& path);

// Where `python -m jax_dsv4.build_aiter` puts AITER's plan builders, a folder for each architecture. Set once, when the
// library is loaded.
void set_builders_directory(const std::string& path);

// Loads AITER's plan builder, and its code on a device by building one small plan. Not to be called under capture.
std::string load_metadata(int device, hip::Stream stream);

// The architecture of a device, as in "gfx950".
std::string architecture_of(int device, std::string* reason);

// Loads our kernels on a device, and `kernel` (if not null), once. Not to be called under capture.
std::string load_modules(int device, const KernelFile* kernel);

// These enqueue on the stream, and fail if the modules were not loaded on the device. Nothing is allocated,
// synchronised or read back.
std::string enqueue_plan(int device, hip::Stream stream, const PlanParams& p);
// The same plan from AITER's builder; load_metadata comes first. `work_pointers` [2] is scratch.
std::string enqueue_metadata(int device, hip::Stream stream, const MetadataParams& p, int heads,
                             uint64_t* work_pointers);
std::string enqueue_decode(int device, hip::Stream stream, const AiterKernel& kernel, const DecodeScopeParams& p);
// AITER's Gluon kernel, at most so many tokens a launch.
std::string enqueue_gluon_decode(int device, hip::Stream stream, const GluonKernel& kernel, const GluonDecodeParams& p,
                                 int32_t tokens_per_launch);
// [decodes enqueued, those recorded by a capture] XLA replays what it captured without calling the handler, so the two
// tell whether command buffers are in use.
void decode_calls(int64_t* calls);
std::string enqueue_append(int device, hip::Stream stream, const PoolAppendParams& p);
// To layout fp8_ds_mla, blocks at even addresses.
std::string enqueue_packed_append(int device, hip::Stream stream, const AppendParams& p);

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_LAUNCH_H_
