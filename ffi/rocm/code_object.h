// What an AMDGPU code object says of its kernels, in its ELF notes.
#ifndef JAX_DSV4_ROCM_CODE_OBJECT_H_
#define JAX_DSV4_ROCM_CODE_OBJECT_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace jax_dsv4::rocm {

// A kernel on disk.
struct KernelFile {
  std::string file, symbol;
  const struct Mend* mend = nullptr;  // what is done to its bytes before they are loaded
};

// A 32-bit word of a file, and what is put in its place.
struct Mend {
  uint64_t sum;  // of the whole file: no other is touched
  size_t offset;
  uint32_t from, to;
};

// FNV-1a.
uint64_t sum_of(const std::string& bytes);
// False, and `bytes` as they were, where they are not those that the mend is for.
bool apply(const Mend& mend, std::string* bytes);

struct KernelArgument {
  std::string kind;  // global_buffer, by_value, hidden_...
  int offset = 0, size = 0;
};

struct KernelNotes {
  std::string name;  // what hipModuleGetFunction wants
  int kernarg_bytes = 0, max_workgroup = 1024;
  int required_workgroup[3] = {0, 0, 0};
  std::vector<KernelArgument> arguments;
};

struct CodeObjectNotes {
  std::string architecture;  // gfx950, gfx942, or "" for any other
  std::vector<KernelNotes> kernels;
};

// False, with the reason, for what is not an AMDGPU code object or is malformed. One may hold no kernels at all.
bool read_notes(const void* elf, size_t size, CodeObjectNotes* notes, std::string* reason);

}  // namespace jax_dsv4::rocm

#endif  // JAX_DSV4_ROCM_CODE_OBJECT_H_
