#include "memory.h"

#include <algorithm>
#include <cstdio>

namespace gfx950 {

void Memory::add(uint64_t begin, uint64_t bytes, bool writable, bool owned) {
  auto [it, fresh] = ranges_.try_emplace({begin, begin + bytes}, Range{begin, begin + bytes, writable, owned, 1});
  if (!fresh) {
    it->second.uses++;
    it->second.writable |= writable;
  }
  longest_ = std::max(longest_, bytes);
}

bool Memory::remove(uint64_t begin, uint64_t bytes) {
  auto it = ranges_.find({begin, begin + bytes});
  if (it == ranges_.end()) return false;
  if (--it->second.uses == 0) ranges_.erase(it);
  return true;
}

const Memory::Range* Memory::find(uint64_t address, uint64_t bytes) const {
  // Overlapping ranges: walk back from the last that begins at or before the address, no further than the longest
  // reaches.
  for (auto it = ranges_.upper_bound({address, ~uint64_t{0}}); it != ranges_.begin();) {
    --it;
    if (it->second.begin + longest_ < address) break;
    if (address + bytes <= it->second.end) return &it->second;
  }
  return nullptr;
}

const Memory::Range* Memory::owned_at(uint64_t begin) const {
  for (auto it = ranges_.lower_bound({begin, 0}); it != ranges_.end() && it->second.begin == begin; ++it)
    if (it->second.owned) return &it->second;
  return nullptr;
}

std::string Memory::describe(uint64_t address) const {
  char text[200];
  auto it = ranges_.upper_bound({address, ~uint64_t{0}});
  std::string out;
  if (it != ranges_.begin()) {
    const Range& below = std::prev(it)->second;
    snprintf(text, sizeof text, "%llu bytes past the end of [%#llx, %#llx)",
             static_cast<unsigned long long>(address - std::min(address, below.end)),
             static_cast<unsigned long long>(below.begin), static_cast<unsigned long long>(below.end));
    out = text;
  }
  if (it != ranges_.end()) {
    snprintf(text, sizeof text, "%s%llu bytes before [%#llx, %#llx)", out.empty() ? "" : ", ",
             static_cast<unsigned long long>(it->second.begin - address),
             static_cast<unsigned long long>(it->second.begin), static_cast<unsigned long long>(it->second.end));
    out += text;
  }
  return out.empty() ? "nothing is allocated" : out;
}

}  // namespace gfx950
