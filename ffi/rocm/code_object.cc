#include "rocm/code_object.h"

#include <cstring>
#include <map>

namespace jax_dsv4::rocm {
namespace {

// ELF64, little endian; the fields used here. (elf.h is not everywhere that the wheel is built.)
struct ElfHeader {
  uint8_t ident[16];
  uint16_t type, machine;
  uint32_t version;
  uint64_t entry, program_headers, section_headers;
  uint32_t flags;
  uint16_t header_bytes, program_header_bytes, program_header_count, section_header_bytes, section_header_count, names;
};
struct ProgramHeader {
  uint32_t type, flags;
  uint64_t offset, address, physical, file_bytes, memory_bytes, alignment;
};
struct NoteHeader {
  uint32_t name_bytes, text_bytes, type;
};
static_assert(sizeof(ElfHeader) == 64 && sizeof(ProgramHeader) == 56 && sizeof(NoteHeader) == 12, "ELF64");

constexpr uint16_t kMachineAmdGpu = 224;
constexpr uint32_t kSegmentNote = 4, kNoteMetadata = 32;  // PT_NOTE, NT_AMDGPU_METADATA
constexpr uint32_t kArchitectureMask = 0xff, kGfx942 = 0x4c, kGfx950 = 0x4f;

// The metadata is msgpack, and uses its maps, arrays, strings, integers and booleans.
struct Value {
  enum Kind { kNil, kInteger, kString, kArray, kMap } kind = kNil;
  int64_t number = 0;
  std::string text;
  std::vector<Value> items;
  std::map<std::string, Value> fields;

  const Value* field(const char* name) const {
    const auto it = fields.find(name);
    return it == fields.end() ? nullptr : &it->second;
  }
  int integer(const char* name, int otherwise) const {
    const Value* f = field(name);
    return f && f->kind == kInteger ? static_cast<int>(f->number) : otherwise;
  }
  std::string string(const char* name) const {
    const Value* f = field(name);
    return f ? f->text : "";
  }
};

class MsgPack {
 public:
  MsgPack(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}
  bool ok() const { return ok_; }

  Value value(int depth = 0) {
    const uint8_t tag = static_cast<uint8_t>(big_endian(1));
    if (!ok_ || depth > 16) return fail();
    if (tag <= 0x7f || tag >= 0xe0) return integer(static_cast<int8_t>(tag));
    if (tag <= 0x8f) return map(tag & 0xf, depth);
    if (tag <= 0x9f) return array(tag & 0xf, depth);
    if (tag <= 0xbf) return string(tag & 0x1f);
    switch (tag) {
      case 0xc0:
        return Value();
      case 0xc2:
      case 0xc3:
        return integer(tag & 1);
      case 0xcc:
      case 0xcd:
      case 0xce:
      case 0xcf:
        return integer(static_cast<int64_t>(big_endian(1 << (tag - 0xcc))));
      case 0xd0:
        return integer(static_cast<int8_t>(big_endian(1)));
      case 0xd1:
        return integer(static_cast<int16_t>(big_endian(2)));
      case 0xd2:
        return integer(static_cast<int32_t>(big_endian(4)));
      case 0xd3:
        return integer(static_cast<int64_t>(big_endian(8)));
      case 0xd9:
      case 0xda:
      case 0xdb:
        return string(big_endian(1 << (tag - 0xd9)));
      case 0xdc:
      case 0xdd:
        return array(big_endian(2 << (tag - 0xdc)), depth);
      case 0xde:
      case 0xdf:
        return map(big_endian(2 << (tag - 0xde)), depth);
      default:
        return fail();
    }
  }

 private:
  Value fail() {
    ok_ = false;
    return Value();
  }
  uint64_t big_endian(int bytes) {
    if (end_ - next_ < bytes) {
      ok_ = false;
      return 0;
    }
    uint64_t value = 0;
    while (bytes--) value = value << 8 | *next_++;
    return value;
  }
  static Value integer(int64_t number) {
    Value v;
    v.kind = Value::kInteger;
    v.number = number;
    return v;
  }
  Value string(uint64_t size) {
    if (size > static_cast<uint64_t>(end_ - next_)) return fail();
    Value v;
    v.kind = Value::kString;
    v.text.assign(reinterpret_cast<const char*>(next_), size);
    next_ += size;
    return v;
  }
  Value array(uint64_t size, int depth) {
    Value v;
    v.kind = Value::kArray;
    for (; size && ok_; --size) v.items.push_back(value(depth + 1));
    return v;
  }
  Value map(uint64_t size, int depth) {
    Value v;
    v.kind = Value::kMap;
    for (; size && ok_; --size) {
      const std::string key = value(depth + 1).text;
      v.fields[key] = value(depth + 1);
    }
    return v;
  }

  const uint8_t *next_, *end_;
  bool ok_ = true;
};

KernelNotes describe(const Value& kernel) {
  KernelNotes k;
  k.name = kernel.string(".name");
  k.kernarg_bytes = kernel.integer(".kernarg_segment_size", 0);
  k.max_workgroup = kernel.integer(".max_flat_workgroup_size", 1024);
  if (const Value* required = kernel.field(".reqd_workgroup_size")) {
    for (size_t d = 0; d < 3 && d < required->items.size(); ++d) {
      k.required_workgroup[d] = static_cast<int>(required->items[d].number);
    }
  }
  if (const Value* arguments = kernel.field(".args")) {
    for (const Value& a : arguments->items) {
      k.arguments.push_back({a.string(".value_kind"), a.integer(".offset", 0), a.integer(".size", 0)});
    }
  }
  return k;
}

}  // namespace

uint64_t sum_of(const std::string& bytes) {
  uint64_t sum = 0xcbf29ce484222325;
  for (unsigned char byte : bytes) sum = (sum ^ byte) * 0x100000001b3;
  return sum;
}

bool apply(const Mend& mend, std::string* bytes) {
  uint32_t word = 0;
  if (sum_of(*bytes) != mend.sum || mend.offset + sizeof word > bytes->size()) return false;
  std::memcpy(&word, bytes->data() + mend.offset, sizeof word);
  if (word != mend.from) return false;
  std::memcpy(&(*bytes)[mend.offset], &mend.to, sizeof mend.to);
  return true;
}

bool read_notes(const void* elf, size_t size, CodeObjectNotes* notes, std::string* reason) {
  const uint8_t* file = static_cast<const uint8_t*>(elf);
  const auto fail = [&](const char* why) {
    *reason = why;
    return false;
  };
  ElfHeader header;
  if (size < sizeof header) return fail("too short for an ELF file");
  std::memcpy(&header, file, sizeof header);
  if (std::memcmp(header.ident, "\177ELF", 4) != 0 || header.machine != kMachineAmdGpu)
    return fail("not an AMDGPU ELF file");
  const uint32_t architecture = header.flags & kArchitectureMask;
  notes->architecture = architecture == kGfx950 ? "gfx950" : architecture == kGfx942 ? "gfx942" : "";
  notes->kernels.clear();
  for (int i = 0; i < header.program_header_count; ++i) {
    ProgramHeader segment;
    const uint64_t at = header.program_headers + i * sizeof segment;
    if (at > size || size - at < sizeof segment) return fail("truncated program headers");
    std::memcpy(&segment, file + at, sizeof segment);
    if (segment.type != kSegmentNote) continue;
    if (segment.offset > size || segment.file_bytes > size - segment.offset) return fail("truncated notes");
    const uint64_t end = segment.offset + segment.file_bytes;
    for (uint64_t offset = segment.offset; offset + sizeof(NoteHeader) <= end;) {
      NoteHeader note;
      std::memcpy(&note, file + offset, sizeof note);
      const uint64_t text = offset + sizeof note + (note.name_bytes + 3ull) / 4 * 4;
      if (text > end || note.text_bytes > end - text) return fail("truncated notes");
      if (note.type == kNoteMetadata) {
        MsgPack pack(file + text, note.text_bytes);
        const Value metadata = pack.value();
        if (!pack.ok()) return fail("malformed metadata");
        if (const Value* kernels = metadata.field("amdhsa.kernels")) {
          for (const Value& kernel : kernels->items) notes->kernels.push_back(describe(kernel));
        }
      }
      offset = text + (note.text_bytes + 3ull) / 4 * 4;
    }
  }
  return true;
}

}  // namespace jax_dsv4::rocm
