// The live allocations: every access of a kernel must lie inside one of them.
#ifndef JAX_DSV4_TESTS_GFX950_MEMORY_H_
#define JAX_DSV4_TESTS_GFX950_MEMORY_H_

#include <cstdint>
#include <map>
#include <string>

namespace gfx950 {

class Memory {
 public:
  struct Range {
    uint64_t begin = 0, end = 0;
    bool writable = true, owned = false;  // owned: hipMalloc'd here, so hipFree takes it
    int uses = 1;                         // how often it was declared
  };

  // Declares [begin, begin + bytes) live. A range declared twice stays live until it was withdrawn twice.
  void add(uint64_t begin, uint64_t bytes, bool writable, bool owned);
  bool remove(uint64_t begin, uint64_t bytes);
  // The live range that holds all of [address, address + bytes), or null.
  const Range* find(uint64_t address, uint64_t bytes) const;
  // The range that hipMalloc made at this address, or null.
  const Range* owned_at(uint64_t begin) const;
  // Where an address lies relative to the nearest live ranges, for a message.
  std::string describe(uint64_t address) const;
  uint64_t count() const { return ranges_.size(); }

 private:
  // Ranges may overlap: XLA hands out slices of one arena, each declared by itself. Keyed by begin, then end.
  std::map<std::pair<uint64_t, uint64_t>, Range> ranges_;
  uint64_t longest_ = 0;
};

}  // namespace gfx950

#endif  // JAX_DSV4_TESTS_GFX950_MEMORY_H_
