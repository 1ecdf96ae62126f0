#include "rocm/gluon.h"

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>

#include "rocm/params.h"

namespace jax_dsv4::rocm {
namespace {

// In the order of the kernel's parameters, constants left out; the last two are Triton's own scratch.
struct Arguments {
  const void* q;
  struct {
    const uint8_t* cache;
    const void* cache_as_bf16;
    const int32_t *indices, *indptr;
  } scopes[2];
  const float* sink;  // neither is looked at by a variant of two splits or more
  void* out;
  float *partial_max, *partial_sum, *partial_out;
  int32_t block_strides[2], num_slots[2];
  const void* scratch[2];
};
constexpr int kPointers = 14, kNumbersAt = 8 * kPointers, kNumbers = 4, kScratchAt = kNumbersAt + 4 * kNumbers;
static_assert(offsetof(Arguments, block_strides) == kNumbersAt && offsetof(Arguments, scratch) == kScratchAt, "");

std::string& directory() {
  static std::string* path = new std::string;
  return *path;
}

// Whether the notes describe the arguments above.
bool knows_abi(const KernelNotes& notes) {
  std::vector<std::pair<int, int>> expected;
  for (int i = 0; i < kPointers; ++i) expected.emplace_back(8 * i, 8);
  for (int i = 0; i < kNumbers; ++i) expected.emplace_back(kNumbersAt + 4 * i, 4);
  for (int i = 0; i < 2; ++i) expected.emplace_back(kScratchAt + 8 * i, 8);
  std::vector<std::pair<int, int>> found;
  for (const KernelArgument& a : notes.arguments) found.emplace_back(a.offset, a.size);
  return found == expected && notes.kernarg_bytes == sizeof(Arguments) && notes.max_workgroup == kThreads;
}

bool load(const std::string& variant, GluonKernel* kernel, std::string* reason) {
  const std::string before_lds = variant + "-lds";
  std::error_code absent;
  for (const auto& entry : std::filesystem::directory_iterator(directory(), absent)) {
    const std::string name = entry.path().filename().string();
    if (name.rfind(before_lds, 0) == 0) {
      kernel->file = entry.path().string();
      kernel->lds_bytes = std::atoi(name.c_str() + before_lds.size());
    }
  }
  if (kernel->file.empty()) {
    *reason = "AITER's kernel " + variant + " is not in " + directory() +
              "; python -m jax_dsv4.build_aiter --heads compiles such kernels";
    return false;
  }
  std::ifstream in(kernel->file, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  CodeObjectNotes notes;
  if (!read_notes(bytes.data(), bytes.size(), &notes, reason)) {
    *reason = kernel->file + ": " + *reason;
    return false;
  }
  if (notes.architecture != "gfx950" || notes.kernels.size() != 1 || !knows_abi(notes.kernels[0])) {
    *reason = kernel->file + ": it is not the kernel that is known";
    return false;
  }
  kernel->symbol = notes.kernels[0].name;
  return true;
}

}  // namespace

void set_gluon_directory(const std::string& path) { directory() = path; }

std::string gluon_variant(const GluonDecodeParams& p, float scale) {
  int alignment = 16;
  bool wide = false;
  std::string block_sizes;
  for (int i = 0; i < scopes_of(p); ++i) {
    const Cache& cache = p.scopes[i].scope.cache;
    while (cache.block_stride_bytes % alignment) alignment /= 2;
    wide |= cache.num_blocks * cache.block_stride_bytes >= kGluonBytes;
    block_sizes += (i ? "+" : "") + std::to_string(cache.block_size);
  }
  uint32_t scale_bits;
  std::memcpy(&scale_bits, &scale, sizeof scale_bits);
  char text[160];
  std::snprintf(text, sizeof text, "pa_decode_sparse-h%d-s%08x-b%s-a%d-%s-x%d", p.heads, scale_bits,
                block_sizes.c_str(), alignment, wide ? "wide" : "narrow", p.splits);
  return text;
}

const GluonKernel* find_gluon_kernel(const std::string& variant, std::string* reason) {
  // Variants may be compiled while the process runs, so only those found are kept.
  static std::mutex* mutex = new std::mutex;
  static auto* found = new std::map<std::string, GluonKernel>;
  const std::lock_guard<std::mutex> lock(*mutex);
  const auto it = found->find(variant);
  if (it != found->end()) return &it->second;
  GluonKernel kernel;
  return load(variant, &kernel, reason) ? &found->emplace(variant, kernel).first->second : nullptr;
}

std::vector<uint8_t> pack_arguments(const GluonDecodeParams& p, int32_t first) {
  const int64_t rows = int64_t{first} * p.splits * p.heads;  // of the partial buffers
  Arguments a{};
  a.q = static_cast<const uint16_t*>(p.q) + int64_t{first} * p.heads * kLatentDim;
  for (int i = 0; i < 2; ++i) {
    const GluonScope& s = p.scopes[i];
    const Cache& cache = s.scope.cache;
    a.scopes[i] = {cache.data, cache.data, s.slots, s.indptr + first};
    a.block_strides[i] = static_cast<int32_t>(cache.block_stride_bytes);
    a.num_slots[i] = static_cast<int32_t>(cache.num_blocks * cache.block_size);
  }
  a.partial_max = p.partial_max + rows;
  a.partial_sum = p.partial_sum + rows;
  a.partial_out = p.partial_out + rows * kLatentDim;
  std::vector<uint8_t> packed(sizeof a);
  std::memcpy(packed.data(), &a, sizeof a);
  return packed;
}

}  // namespace jax_dsv4::rocm
